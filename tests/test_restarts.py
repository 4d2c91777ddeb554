"""`accelerate launch --max_restarts` goes on by itself, ends where a restart is of no use, and says why a run ended."""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch.distributed as dist

from trainloop import TrainingError
from trainloop.ranks.rendezvous import join_round

from .launching import FORMS, REPOSITORY, free_port, launch
from .test_integrations import LAUNCH, Running, kill
from .test_two_hosts import hosts as hosts
from .test_two_hosts import results

WORKER = REPOSITORY / "tests" / "workers" / "restarts.py"
NUM_STEPS = 25


def run(workspace: Path, form: str, max_restarts: int, *deaths: str, rdzv: str = "static") -> CompletedProcess[str]:
    options = ["--max_restarts", str(max_restarts), "--rdzv_backend", rdzv]
    return launch(WORKER, form, str(workspace), str(NUM_STEPS), *deaths, launch_args=options, check=False)


def lives(workspace: Path, rank: int = 0) -> int:
    return len(list(workspace.glob(f"life.{rank}.*")))


def test_a_run_is_restarted_until_it_is_asked_to_end(tmp_path: Path) -> None:
    """DDP under the launcher's defaults. One rank is killed, in the next life one raises, in the next one gets SIGTERM:
    the launcher starts the run again twice, and not a third time. Started by hand, it ends bitwise equal to a run that
    nothing has happened to.
    """
    assert run(tmp_path / "whole", "ddp2", 0).returncode == 0
    workspace = tmp_path / "killed"
    done = run(workspace, "ddp2", 5, "0:1:7:kill", "1:0:12:raise", "2:1:14:TERM")
    assert done.returncode == 1
    assert [lives(workspace, rank) for rank in (0, 1)] == [3, 3], done.stdout[-4000:]
    assert "The run continues after step 5." in done.stdout
    assert "The run continues after step 10." in done.stdout
    assert re.search(r"SIGTERM was received: saved after step 14 in \S+, exiting with code 143\.", done.stdout)
    assert re.search(r"The run was asked to end: ending the launcher \(process \d+\), which would", done.stdout)

    done = run(workspace, "ddp2", 0, "*:1:17:raise")
    assert done.returncode == 1
    # The summary: rank 1 was first, and says where and with what. Rank 0 only lost contact with it.
    others, first = done.stdout.split("Root Cause (first observed failure):")
    assert re.search(r"rank +: 1 (?s:.*)traceback : Rank 1, step 17: ValueError: sample 17 is broken\n", first)
    assert 'raise ValueError("sample 17 is broken")' in first
    assert "Rank 0, step 17: TrainingError: Step 17: lost contact" in others.split("Failures:")[1]

    assert run(workspace, "ddp2", 0).returncode == 0
    assert results(workspace, NUM_STEPS) == results(tmp_path / "whole", NUM_STEPS)


def test_a_run_that_fails_at_the_same_step_again_and_again_ends(tmp_path: Path) -> None:
    """FSDP2, joined by c10d: after three lives the launcher is ended, though it has restarts left. It is said that the
    machine is not the cause.
    """
    done = run(tmp_path, "fsdp2", 5, "*:1:7:raise", rdzv="c10d")
    assert done.returncode == 1
    assert [lives(tmp_path, rank) for rank in (0, 1)] == [3, 3], done.stdout[-4000:]
    assert done.stdout.count("The run continues after step 5.") == 2
    said = "ValueError: sample 17 is broken\n.*The run has failed at step 7 in 3 lives in a row. The cause is not the"
    assert re.search(said, done.stdout)


def test_each_attempt_meets_in_its_own_part_of_the_store() -> None:
    """Whichever rank comes first, and how often each was started: those that live meet, and none with a dead one."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def join(rank: int, timeout: float = 20.0) -> Any:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        return join_round(store, rank, 3, timedelta(seconds=timeout))

    def met(attempt: str, *ranks: Future[Any]) -> bool:
        for rank, store in enumerate(ranks):
            store.result().set(f"rank {rank}", attempt)
        return {store.result().get(f"rank {rank}").decode() for store in ranks for rank in range(3)} == {attempt}

    with ThreadPoolExecutor(8) as pool:
        first = [pool.submit(join, rank) for rank in (0, 1, 2)]
        assert met("first", *first)
        # Rank 2 dies at once; rank 0 waits in vain for its next process, and is started again.
        early = pool.submit(join, 1)
        with pytest.raises(TrainingError, match=r"rank 0 has waited 1 s for rank 2\. Look at the output of the launch"):
            join(0, 1.0)
        with pytest.raises(TrainingError, match="rank 2 has waited 0 s for rank 0"):
            join(2, 0.0)
        assert not early.done()
        late, leader = pool.submit(join, 2), pool.submit(join, 0)
        assert met("second", leader, early, late)
        assert first[0].result().get("rank 0") == b"first"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ddp2", "fsdp2"])
def test_ranks_that_are_killed_at_random_cost_nothing(tmp_path: Path, form: str) -> None:
    """SIGKILL at three random steps, to a random rank: the launcher brings the run to its end, bitwise equal to one
    that was never killed.
    """
    deaths = [f"{life}:{random.randrange(2)}:{random.randrange(6 * life + 2, 6 * life + 8)}:kill" for life in range(3)]
    assert run(tmp_path / "whole", form, 0).returncode == 0
    done = run(tmp_path / "killed", form, 5, *deaths)
    assert done.returncode == 0, (deaths, done.stdout[-4000:])
    assert lives(tmp_path / "killed") == 4
    assert results(tmp_path / "killed", NUM_STEPS) == results(tmp_path / "whole", NUM_STEPS)


def await_listener(port: int) -> None:
    """Return when somebody listens at a port of the loopback interface."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail("the first launcher doesn't open its store")


@pytest.mark.slow
@pytest.mark.parametrize("rdzv", ["static", "c10d"])
@pytest.mark.parametrize("form", ["ddp2", "fsdp2"])
def test_two_launchers_restart_together(
    tmp_path: Path, hosts: tuple[str, list[list[str]], dict[str, str]], form: str, rdzv: str
) -> None:
    """Two machines. The first loses its rank, then the second one; then a rank hangs, then one fails before it has met
    the other, so that only one launcher counts a restart. Both come to the end of the run, which is bitwise equal.
    """

    def run_on_both(workspace: Path, deaths: Sequence[str]) -> None:
        logs = tmp_path / f"logs{len(list(tmp_path.iterdir()))}"
        logs.mkdir()
        running, port = Running(logs), str(free_port())
        # By c10d, torch gives the others the host's name for an address, which the namespaces share.
        master, prefixes, env = hosts if rdzv == "static" else ("127.0.0.1", [[], []], {})
        launchers = []
        for machine, prefix in enumerate(prefixes):
            where = ["--machine_rank", str(machine), "--main_process_ip", master, "--main_process_port", port]
            options = ["--num_machines", "2", "--max_restarts", "6", "--rdzv_backend", rdzv, *where]
            script = ["--mixed_precision", "no", "--dynamo_backend", "no", str(WORKER), str(workspace), str(NUM_STEPS)]
            command = [*prefix, *LAUNCH, *FORMS[form], *options, *script, *deaths]
            launchers.append(running.start(command, **env, TIMEOUT="20"))
            if rdzv == "c10d" and machine == 0:  # else the second one may open the store, and the first finds no port
                await_listener(int(port))
        try:
            assert running.wait(*launchers, timeout=400) == [0, 0], running.outputs()
        finally:
            for launcher in launchers:
                kill(launcher)

    run_on_both(tmp_path / "whole", [])
    deaths = ["0:0:7:kill", "1:1:12:kill", "2:1:13:hang", "3:1:0:raise", "4:1:17:raise"]
    run_on_both(tmp_path / "killed", deaths)
    assert lives(tmp_path / "killed", 1) >= 6
    assert results(tmp_path / "killed", NUM_STEPS) == results(tmp_path / "whole", NUM_STEPS)
