"""What the ranks tell one another in each step: right at any number of ranks, and cheap at any."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainloop.ranks import collectives
from trainloop.ranks.links import Links, LostContactError, connect
from trainloop.ranks.peers import Peers
from trainloop.ranks.sockets import address_of, listen

from .launching import on_ranks

needs_proc = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's counts of a process")


def num_writes() -> int:
    """System calls by which gloo has sent something."""
    return int(Path("/proc/self/io").read_text().split("syscw:")[1].split()[0])


class Counted:
    """A socket whose messages are counted."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.num_sent = sock, 0

    def sendall(self, message: bytes) -> None:
        self.num_sent += 1
        self.sock.sendall(message)

    def close(self) -> None:
        self.sock.close()


@needs_proc
@pytest.mark.parametrize(
    ("num_ranks", "num_messages"), [(2, 1), (3, 2), (7, 3), (8, 3), pytest.param(16, 4, marks=pytest.mark.slow)]
)
def test_the_message_of_a_step_takes_log2_of_the_ranks(tmp_path: Path, num_ranks: int, num_messages: int) -> None:
    """Each rank sends so many messages, and gloo none. So it is for sums and for the numbers of all ranks. Every rank
    gets the same.
    """

    def work(rank: int) -> None:
        peers = Peers()
        peers.open()
        links: Any = collectives._links
        links._outward = [Counted(sock) for sock in links._outward]
        before = num_writes()
        for i in range(10):
            finish = collectives.start_max([i + rank, i - rank, 7])
            assert finish() == [i + num_ranks - 1, i, 7]
            assert collectives.gather_ints([rank, i]) == [[other, i] for other in range(num_ranks)]
            assert collectives.sum_over_ranks([0.1, rank]) == [sum([0.1] * num_ranks), sum(range(num_ranks))]
        assert num_writes() == before
        assert sum(counted.num_sent for counted in links._outward) == 30 * num_messages
        assert collectives.is_same_on_ranks(5)
        assert not collectives.is_same_on_ranks(rank // (num_ranks - 1))
        first = collectives.start_max([rank])
        second = collectives.start_max([-rank])  # before the first is finished
        assert (second(), first()) == ([0], [num_ranks - 1])
        collectives.use_links(None)
        peers.close()

    assert on_ranks(num_ranks, tmp_path, work) == [0] * num_ranks


@needs_proc
@pytest.mark.parametrize(("num_ranks", "limit"), [(8, 9), pytest.param(32, 11, marks=pytest.mark.slow)])
def test_a_group_of_ours_connects_log2_of_the_ranks(tmp_path: Path, num_ranks: int, limit: int) -> None:
    """Two in its ring, one for each level of its tree, and four descriptors of its own. Nothing connects later."""

    def work(rank: int) -> None:
        before = len(os.listdir("/proc/self/fd"))
        collectives.host_group()
        made = len(os.listdir("/proc/self/fd")) - before
        assert made <= limit, made
        assert collectives.gather_objects(rank) == list(range(num_ranks))
        assert collectives.gather_on_first(rank) == (list(range(num_ranks)) if rank == 0 else None)
        assert collectives.broadcast_object(rank) == 0
        assert collectives.sum_over_ranks([1.0]) == [num_ranks]
        assert collectives.gather_ints([rank]) == [[other] for other in range(num_ranks)]
        assert collectives.merge_over_ranks([rank], list.__add__) == list(range(num_ranks))
        assert collectives.start_max([rank])() == [num_ranks - 1]  # by gloo: no links are open
        assert len(os.listdir("/proc/self/fd")) - before <= made
        assert "TORCH_GLOO_LAZY_INIT" not in os.environ

    assert on_ranks(num_ranks, tmp_path, work) == [0] * num_ranks


def test_ranks_that_cannot_connect_go_on_over_gloo(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of them knows no way to the master: all of them do without links, and rank 0 says so."""

    def work(rank: int) -> None:
        os.environ["MASTER_ADDR"] = "127.0.0.1" if rank != 1 else "nowhere.invalid"
        with caplog.at_level("WARNING", "trainloop"):
            Peers().open()
        assert collectives._links is None
        assert collectives.start_max([rank])() == [2]
        assert [text[:32] for text in caplog.messages] == (["The ranks cannot connect to each"] if rank == 0 else [])

    assert on_ranks(3, tmp_path, work) == [0] * 3


def linked(work: Callable[[Links, int], None], num_ranks: int = 2, is_lost: Callable[[], bool] = lambda: False) -> None:
    """Run `work` with links in as many threads."""
    servers = [listen() for _ in range(num_ranks)]
    addresses = [address_of(server) for server in servers]
    for address in addresses:
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n" + b"x" * 100)
    errors: list[BaseException] = []
    all_links: list[Links] = []

    def run(rank: int) -> None:
        try:
            links = connect(servers[rank], addresses, rank, "secret", lambda: None, is_lost)
            assert links is not None
            all_links.append(links)
            work(links, rank)
        except BaseException as ex:
            errors.append(ex)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for links in all_links:
        links.close()
    if errors:
        raise errors[0]


def test_ranks_that_do_different_things_are_told() -> None:
    """One checks whether to exit, the other ends a step: neither takes the other's numbers for its own."""

    def work(links: Links, rank: int) -> None:
        finish = links.start([0] * (rank + 1))
        text = f"Rank {rank} and rank {1 - rank} do different things: the one exchanges its {rank + 1} numbers for the"
        with pytest.raises(RuntimeError, match=text):
            finish()

    linked(work)


def test_a_wait_ends_when_another_rank_is_gone() -> None:
    """The neighbour sees the connection end. The others, who wait for the neighbour, are told."""
    is_told = threading.Event()

    def work(links: Links, rank: int) -> None:
        if rank == 3:
            links.close()
            return
        with pytest.raises(LostContactError, match=r"rank 3|another rank is gone") as caught:
            links.start([rank])()
        if rank == 2:  # it hears from ranks 1 and 0
            assert str(caught.value) != "rank 3 has closed the connection"
        if rank == 0:
            is_told.set()

    linked(work, 4, is_told.is_set)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a forked child")
def test_a_child_that_outlives_its_rank_does_not_seem_to_be_it(tmp_path: Path) -> None:
    """As a worker of a data loader does, which holds copies of all descriptors."""

    def work(rank: int) -> None:
        Peers().open()
        if rank == 1:
            child = os.fork()
            if child == 0:
                time.sleep(120)
                os._exit(0)
            (tmp_path / "child").write_text(str(child))
            os._exit(3)
        start = time.monotonic()
        with pytest.raises(LostContactError, match=re.escape("rank 1 has closed the connection")):
            collectives.start_max([0])()
        assert time.monotonic() - start < 60
        os.kill(int((tmp_path / "child").read_text()), 9)
        os._exit(0)

    assert on_ranks(2, tmp_path, work) == [0, 3]


def test_many_numbers_are_sent_in_pieces() -> None:
    """With thousands of ranks there are many in the last rounds. Two ranks that send more than the system buffers would
    wait for each other forever.
    """

    def work(links: Links, rank: int) -> None:
        by_rank = links.gather(range(rank, 10**6 + rank), "q")
        assert by_rank == [list(range(10**6)), list(range(1, 10**6 + 1))]

    linked(work)
