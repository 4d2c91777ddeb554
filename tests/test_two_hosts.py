"""Two machines, as two network namespaces joined by a cable: one dies in mid-save, both are started again."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .launching import REPOSITORY, free_port
from .test_integrations import KITS, Running, accelerate, kill

WORKER = str(REPOSITORY / "tests" / "workers" / "two_hosts.py")
NUM_STEPS = 25


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, list[list[str]], dict[str, str]]]:
    """The address of the first, how to run a command on each, and the environment. Where the machine may not make
    namespaces, two launchers on the loopback interface.
    """
    names, address = [f"tl{os.getpid()}-{i}" for i in range(2)], "10.213.7."
    try:
        for name in names:
            ip("netns", "add", name)
        # The same interface name on both: it tells gloo which one to use.
        ip("link", "add", "tl0", "netns", names[0], "type", "veth", "peer", "name", "tl0", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"{address}{i + 1}/24", "dev", "tl0")
            for interface in ("lo", "tl0"):
                ip("-n", name, "link", "set", interface, "up")
        prefixes = [["ip", "netns", "exec", name] for name in names]
        yield f"{address}1", prefixes, {"GLOO_SOCKET_IFNAME": "tl0"}
    except (OSError, subprocess.CalledProcessError):
        yield "127.0.0.1", [[], []], {}
    finally:
        for name in names:
            with suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def results(workspace: Path, step: int = NUM_STEPS) -> dict[str, Any]:
    """The last checkpoint: every byte of its tensors, and the state of the run without what names one run."""
    folder = workspace / "checkpoints" / f"step_{step:07d}"
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
    state = json.loads((folder / "state" / "global.json").read_text())
    state.pop("run_id")
    return {**found, "state": state}


def test_a_host_that_dies_in_mid_save_costs_nothing(
    tmp_path: Path, hosts: tuple[str, list[list[str]], dict[str, str]]
) -> None:
    """FSDP2, one process a host. SIGKILL on the second when its files are written and its vote is not cast: the first
    names it and ends; both start again from the commit before; the end is that of a run that was never killed, bit for
    bit.
    """
    master, prefixes, env = hosts

    def run(workspace: Path, *death: str) -> tuple[list[int], list[str]]:
        logs = tmp_path / f"logs{len(list(tmp_path.iterdir()))}"
        logs.mkdir()
        running, port = Running(logs), str(free_port())
        launchers = []
        for rank, prefix in enumerate(prefixes):
            where = ["--machine_rank", str(rank), "--main_process_ip", master, "--main_process_port", port]
            file = KITS / "accelerate" / "fsdp2_multinode.yaml"
            command = accelerate(file, "--num_processes", "2", *where, WORKER, str(workspace), str(NUM_STEPS), *death)
            launchers.append(running.start([*prefix, *command], **env))
        try:
            return running.wait(*launchers), [running.output(rank) for rank in range(2)]
        finally:
            for launcher in launchers:
                kill(launcher)

    codes, outputs = run(tmp_path / "whole")
    assert codes == [0, 0], outputs
    codes, outputs = run(tmp_path / "killed", "1", "20")
    assert 0 not in codes
    lost = r"TrainingError: Step 20: lost contact with other ranks after .* of saving a checkpoint\. Rank 1 \(.*is gone"
    assert re.search(lost, outputs[0]), outputs[0]
    codes, outputs = run(tmp_path / "killed")
    assert codes == [0, 0], outputs
    assert "The run continues after step 10." in outputs[0]
    expected, actual = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert len(expected) > 4
    assert actual == expected
