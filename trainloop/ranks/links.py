"""Connections to a few other ranks, over which all ranks exchange a few host numbers, at least once a step.

    round 0: send to rank + 1, hear from rank - 1
    round 1: send to rank + 2, hear from rank - 2
    round k: send to rank + 2^k, hear from rank - 2^k

To find a maximum, a rank sends the maximum of everything that it has heard so far. After round k it knows the maximum
of 2^(k+1) ranks, so N ranks need log2 N rounds, rounded up (the dissemination barrier of Hensgen, Finkel and Manber,
1988).

The main thread itself sends and receives. gloo hands a collective to another thread, which takes 40 times the CPU time,
and its rings take N-1 rounds.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

from .sockets import close_in_children

T = TypeVar("T", int, float)

_LOOK_UP = 1.0  # seconds of waiting between two questions whether a rank is known to be gone
_CONNECT_SECONDS = 5.0
_PIECE = 1024  # numbers in a message: it fits into the system's buffers, so two ranks may send at the same time
_HEAD = struct.Struct("<QQ")  # the number of the exchange, and of its integers


class LostContactError(RuntimeError):
    """The wait for other ranks was given up: one has closed its connection, has not answered in time, or is known to be
    gone.
    """


class Links:
    """The connections of one rank. All ranks must do the same exchanges in the same order.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        outward: The sockets to the ranks `rank + 2^k`, by k.
        inward: The sockets from the ranks `rank - 2^k`, by k.
        timeout: Returns how long to wait for a rank.
        is_lost: Returns whether a rank is known to be gone, which ends the wait.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        outward: Sequence[socket.socket],
        inward: Sequence[socket.socket],
        timeout: Callable[[], timedelta | None],
        is_lost: Callable[[], bool],
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._outward, self._inward = outward, inward
        self._timeout, self._is_lost = timeout, is_lost
        self._number = 0
        self._running: list[int] = []
        for sock in (*outward, *inward):
            sock.settimeout(_LOOK_UP)

    def start(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Start an exchange. Call on every rank, with equally many integers of 64 bits. Doesn't wait.

        Returns:
            A function that waits for the other ranks and returns the maxima. It raises `LostContactError` if a rank is
            gone or doesn't answer in time, and RuntimeError if another rank does a different exchange.
        """
        self._complete()  # the previous exchange, if the caller has not finished it
        self._number, known = self._number + 1, list(values)
        self._running = known
        self._send(0, known, "q")
        return partial(self._finish, known)

    def _finish(self, known: list[int]) -> list[int]:
        if known is self._running:
            self._complete()
        return known

    def _complete(self) -> None:
        known, self._running = self._running, []
        for i in range(len(self._inward) if known else 0):
            if i:
                self._send(i, known, "q")
            known[:] = map(max, known, self._receive(i, len(known), "q"))

    def gather(self, values: Sequence[T], kind: Literal["q", "d"]) -> list[list[T]]:
        """Return the values of all ranks, by rank. Call on every rank, with equally many values.

        Takes as many messages as `start`. In round k, a rank sends the values of 2^k ranks (Bruck et al., 1997).

        Args:
            values: Numbers of this rank.
            kind: "q": integers of 64 bits; "d": floats.
        """
        self._complete()
        self._number += 1
        length, known = len(values), list(values)  # of this rank, then of the ranks before it
        for i in range(len(self._inward)):
            count = min(2**i, self._world_size - 2**i) * length
            for start in range(0, count, _PIECE):
                piece = known[start : min(start + _PIECE, count)]
                self._send(i, piece, kind)
                known += self._receive(i, len(piece), kind)
        places = [(self._rank - rank) % self._world_size * length for rank in range(self._world_size)]
        return [known[place : place + length] for place in places]

    def close(self) -> None:
        """Close all connections. The other ranks see it."""
        for sock in (*self._outward, *self._inward):
            sock.close()

    def _send(self, i: int, values: Sequence[Any], kind: str) -> None:
        message = struct.pack(f"<QQ{len(values)}{kind}", self._number, len(values), *values)
        try:
            self._outward[i].sendall(message)  # doesn't wait: at most two messages are under way
        except OSError as ex:
            raise LostContactError(f"lost the connection to {self._name(2**i)}: {ex}") from ex

    def _receive(self, i: int, count: int, kind: str) -> tuple[Any, ...]:
        size, message, start = _HEAD.size + 8 * count, b"", 0.0
        while len(message) < size:
            try:
                received = self._inward[i].recv(size - len(message))
            except TimeoutError:
                start = start or time.monotonic() - _LOOK_UP
                self._check_wait(-(2**i), start)
                continue
            except OSError as ex:
                raise LostContactError(f"lost the connection to {self._name(-(2**i))}: {ex}") from ex
            if not received:
                raise LostContactError(f"{self._name(-(2**i))} has closed the connection")
            message += received
            if len(message) >= _HEAD.size and (head := _HEAD.unpack_from(message)) != (self._number, count):
                raise RuntimeError(
                    f"Rank {self._rank} and {self._name(-(2**i))} do different things: the one exchanges its"
                    f" {count} numbers for the {self._number}th time, the other {head[1]} numbers for the"
                    f" {head[0]}th time. Look for a hook, an interval or a number of steps that differs between ranks."
                )
        return struct.unpack_from(f"<{count}{kind}", message, _HEAD.size)

    def _check_wait(self, offset: int, start: float) -> None:
        if self._is_lost():
            raise LostContactError("another rank is gone")
        limit = self._timeout()
        if limit is not None and time.monotonic() - start >= limit.total_seconds():
            raise LostContactError(f"Timed out waiting for {self._name(offset)}")

    def _name(self, offset: int) -> str:
        return f"rank {(self._rank + offset) % self._world_size}"


def connect(
    server: socket.socket | None,
    addresses: Sequence[tuple[str, int]],
    rank: int,
    token: str,
    timeout: Callable[[], timedelta | None],
    is_lost: Callable[[], bool],
) -> Links | None:
    """Connect this rank. Call on every rank, as soon as all listen.

    Args:
        server: The socket on which this rank listens. It is closed.
        addresses: The address of each rank's socket, by rank.
        rank: This rank.
        token: A secret of the run, the same on every rank.
        timeout: See `Links`.
        is_lost: See `Links`.

    Returns:
        The links. None: a connection could not be made.
    """
    world_size = len(addresses)
    outward: list[socket.socket] = []
    inward: dict[int, socket.socket] = {}
    try:
        if server is None:
            return None
        num_rounds = (world_size - 1).bit_length()
        for i in range(num_rounds):  # the other end accepts later
            sock = socket.create_connection(addresses[(rank + 2**i) % world_size], _CONNECT_SECONDS)
            outward.append(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(_greeting(token, i))
        server.settimeout(_CONNECT_SECONDS)
        greetings = {_greeting(token, i): i for i in range(num_rounds)}
        while len(inward) < num_rounds:
            sock, _ = server.accept()
            sock.settimeout(_CONNECT_SECONDS)
            i = greetings.get(_read_greeting(sock, len(_greeting(token, 0))), -1)
            if i >= 0:
                inward[i] = sock
            else:
                sock.close()  # a stranger
    except OSError:
        for sock in (*outward, *inward.values()):
            sock.close()
        return None
    finally:
        if server is not None:
            server.close()
    for sock in (*outward, *inward.values()):
        close_in_children(sock)
    return Links(rank, world_size, outward, [inward[i] for i in range(num_rounds)], timeout, is_lost)


def _greeting(token: str, i: int) -> bytes:
    return f"{token}{i:03d}".encode()


def _read_greeting(sock: socket.socket, size: int) -> bytes:
    greeting = b""
    with suppress(OSError):
        while len(greeting) < size and (received := sock.recv(size - len(greeting))):
            greeting += received
    return greeting
