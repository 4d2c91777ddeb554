"""The launch files of integrations/ do what they say, in the form nearest to real that works without GPUs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from .launching import REPOSITORY, environment, free_port

KITS = REPOSITORY / "integrations"
SCRIPT = "integrations/train.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


class Running:
    """Commands that run at the same time, each with its output in a file, ended with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, []

    def start(self, command: Sequence[str], **env: str) -> subprocess.Popen[str]:
        with (self.folder / f"{len(self.processes)}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment(**env), stdout=log, stderr=subprocess.STDOUT, text=True
            )
        self.processes.append(process)
        return process

    def output(self, index: int = -1) -> str:
        return (self.folder / f"{index % len(self.processes)}.log").read_text()

    def outputs(self) -> str:
        return "\n".join(self.output(index)[-4000:] for index in range(len(self.processes)))

    def wait(self, *processes: subprocess.Popen[str], timeout: float = 200) -> list[int]:
        end = time.monotonic() + timeout
        for process in processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{process.args} hung:\n{self.outputs()}") from None
        return [process.returncode for process in processes]

    def wait_for(self, condition: Callable[[], Any], timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.outputs()
            assert self.processes[-1].poll() is None, self.outputs()
            time.sleep(0.05)


@pytest.fixture
def running(tmp_path: Path) -> Any:
    folder = tmp_path / "logs"
    folder.mkdir()
    every = Running(folder)
    yield every
    for process in every.processes:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and its ranks, which torch gives sessions of their own."""
    if process.poll() is None:
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def accelerate(file: Path, *args: str) -> list[str]:
    return [*LAUNCH, "--config_file", str(file), *args]


def report(output: str) -> list[str]:
    """The lines of the report at the start."""
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if re.search(r"INFO \[RANK 0\] \d+ process", line))
    rest = [line.strip() for line in lines[first + 1 : first + 6]]
    return [re.sub(r".*\[RANK 0\] ", "", lines[first]), *rest]


# ---------------------------------------------------------------------- accelerate/

SHARDED = "FSDP2 gathers the weights in 3 parts: 1 Sequential, 2 Block (auto-wrap policy: transformer_auto_wrap_policy)"


@pytest.mark.parametrize(
    ("name", "overrides", "strategy", "wrapped"),
    [
        ("ddp", ["--num_processes", "2"], "2 processes on HOST: DDP", None),
        ("fsdp2", ["--num_processes", "2"], "2 processes on HOST: FSDP2, mesh shard 2", SHARDED),
        (
            "hsdp",
            ["--num_machines", "1", "--num_processes", "4", "--parallelism_config_dp_shard_size", "2"],
            "4 processes on HOST: HSDP (FSDP2), mesh dp_replicate 2 x dp_shard 2",
            SHARDED,
        ),
    ],
)
def test_a_launch_file_starts_what_it_names(
    running: Any, tmp_path: Path, name: str, overrides: list[str], strategy: str, wrapped: str | None
) -> None:
    """On one machine, with nothing overridden but how many processes there are and the port: the report says the
    strategy, the wrapping and bf16, and the run comes to its end.
    """
    port = ["--main_process_port", str(free_port())]
    command = accelerate(KITS / "accelerate" / f"{name}.yaml", *overrides, *port, SCRIPT, "--max_steps", "3")
    assert running.wait(running.start(command, WORKSPACE=str(tmp_path))) == [0], running.outputs()
    lines = report(running.output())
    assert re.sub(" on [^:]+:", " on HOST:", lines[0]) == f"{strategy}, cpu over gloo, timeout 0:10:00"
    if wrapped is not None:
        assert lines.pop(1) == wrapped
    world = int(strategy.split()[0])
    assert lines[1] == "weights fp32, compute bf16, gradients reduced in fp32"
    assert lines[3] == f"global batch {4 * world} = 4 a process x 1 accumulated x {world} processes"
    assert lines[4] == f"seed 0, checkpoints in {tmp_path / 'checkpoints'}"
    assert "finished at step 3" in running.output()


def test_the_file_for_several_machines_joins_two_launchers(running: Any, tmp_path: Path) -> None:
    """One launcher for each machine, in the way that its first lines say."""
    file, port = KITS / "accelerate" / "fsdp2_multinode.yaml", str(free_port())
    machines = []
    for rank in range(2):
        where = ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        command = accelerate(file, "--num_processes", "2", *where, SCRIPT, "--max_steps", "3")
        machines.append(running.start(command, WORKSPACE=str(tmp_path)))
    assert running.wait(*machines) == [0, 0], running.outputs()
    assert report(running.output(0))[:2][1] == SHARDED
    assert re.match("2 processes on .*: FSDP2, mesh shard 2", report(running.output(0))[0])
    assert "finished at step 3" in running.output(0)


# ---------------------------------------------------------------------- slurm/

SRUN = f"""#!{sys.executable}
# Stands in for srun: one task a node, all on this machine; passes on the signals that it gets, as srun does.
import os, signal, subprocess, sys
command = sys.argv[1:]
options = [command.pop(0) for _ in range(len(command)) if command and command[0].startswith("--")]
nodes = int(os.environ["SLURM_NNODES"])
tasks = [subprocess.Popen(command, env={{**os.environ, "SLURM_NODEID": str(node)}}) for node in range(nodes)]
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda got, frame: [task.send_signal(got) for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """#!/bin/sh
# Stands in for scontrol.
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes of one process each, with stand-ins first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        path = folder / name
        path.write_text(text)
        path.chmod(0o755)
    return {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REQUEUED": str(tmp_path / "requeued"),
        "WORKSPACE": str(tmp_path / "workspace"),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
    }


def test_the_slurm_job_is_requeued_until_it_is_finished(running: Any, cluster: dict[str, str]) -> None:
    """SIGUSR1 to the batch shell, as Slurm sends it before the time is up: all ranks save after the same step, the job
    is requeued and goes on there. SIGTERM, as it comes with a preemption or `scancel`: saved, and left to Slurm.
    """
    sbatch = ["bash", str(KITS / "slurm" / "train.sbatch"), "--max_steps"]
    for number, requeues in ((signal.SIGUSR1, 1), (signal.SIGTERM, 1)):
        job = running.start([*sbatch, "100000"], **cluster)
        running.wait_for(lambda: re.search(r"step \d+0/100000", running.output()))
        job.send_signal(number)
        assert running.wait(job) != [0]
        saved = re.search(
            r"SIGTERM was received: saved after step (\d+) in \S+, exiting with code 143", running.output()
        )
        assert saved is not None, running.outputs()
        assert len(Path(cluster["REQUEUED"]).read_text().splitlines()) == requeues
    last = int(saved[1])
    assert running.wait(running.start([*sbatch, str(last + 5)], **cluster)) == [0], running.outputs()
    assert f"The run continues after step {last}." in running.output()
    assert f"finished at step {last + 5}" in running.output()
    assert Path(cluster["REQUEUED"]).read_text() == f"{cluster['SLURM_JOB_ID']}\n"


# ---------------------------------------------------------------------- kubernetes/


def test_the_kubernetes_job_survives_the_end_of_a_pod(running: Any, cluster: dict[str, str], tmp_path: Path) -> None:
    """The manifest's command in the manifest's environment, once for each index. One pod is told to end: both ranks
    save and end with a code that has the pods started again, and then they finish.
    """
    service, job = yaml.safe_load_all((KITS / "kubernetes" / "job.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    assert given["MASTER"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    def pods(max_steps: int) -> list[Any]:
        port = free_port()  # the manifest's is taken by whoever runs this test as well
        own = {"NUM_PROCESSES": "2", "MASTER": "127.0.0.1", "WORKSPACE": str(tmp_path), "PATH": cluster["PATH"]}
        command = [*container["command"], container["args"][0].replace(SCRIPT, f"--main_process_port {port} {SCRIPT}")]
        command[-1] += f" --max_steps {max_steps}"
        return [running.start(command, **{**given, **own, "JOB_COMPLETION_INDEX": str(i)}) for i in range(2)]

    both = pods(100000)
    running.wait_for(lambda: re.search(r"step \d+0/100000", running.output(0)))
    both[1].send_signal(signal.SIGTERM)
    assert 0 not in running.wait(*both)
    saved = re.search(r"SIGTERM was received: saved after step (\d+) in \S+, exiting with code 143", running.output(0))
    assert saved is not None, running.outputs()
    last = int(saved[1])
    assert running.wait(*pods(last + 5)) == [0, 0], running.outputs()
    assert f"The run continues after step {last}." in running.output(2)
    assert f"finished at step {last + 5}" in running.output(2)


# ---------------------------------------------------------------------- transformers/


def tiny_model(folder: Path) -> None:
    """A Llama of two layers with random weights, and a byte-level tokenizer trained on Python's own source."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([os.__file__], vocab_size=300, show_progress=False, special_tokens=["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_language_model_is_finetuned_and_exported(running: Any, tmp_path: Path) -> None:
    """Under FSDP2, wrapped by the layers that the model itself names: what is exported is read by `from_pretrained`, is
    what the checkpoint holds, and predicts the text better than the model that it began from.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, workspace, text = tmp_path / "tiny", tmp_path / "workspace", os.__file__
    tiny_model(model)
    overrides = ["--num_processes", "2", "--main_process_port", str(free_port())]
    arguments = ["--model", str(model), "--text", text, "--workspace", str(workspace), "--max_steps", "40"]
    arguments += ["--length", "32", "--lr", "1e-2"]
    script = str(KITS / "transformers" / "finetune.py")
    command = accelerate(KITS / "transformers" / "fsdp2.yaml", *overrides, script, *arguments)
    assert running.wait(running.start(command, HF_HUB_OFFLINE="1")) == [0], running.outputs()
    assert re.match(
        r"FSDP2 gathers the weights in .*\b2 LlamaDecoderLayer\b.*transformer_auto_wrap_policy",
        report(running.output())[1],
    )

    exported = workspace / "export"
    tuned = AutoModelForCausalLM.from_pretrained(exported)
    saved = AutoModelForCausalLM.from_pretrained(workspace / "checkpoints" / "latest" / "model")
    for (name, value), other in zip(tuned.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    tokens = AutoTokenizer.from_pretrained(exported)(Path(text).read_text(), return_tensors="pt").input_ids[:, :64]
    with torch.no_grad():
        before, after = (m(tokens, labels=tokens).loss for m in (AutoModelForCausalLM.from_pretrained(model), tuned))
    assert after < before - 1
