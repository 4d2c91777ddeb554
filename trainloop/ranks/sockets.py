"""Sockets on which the ranks listen to each other. Forked children close them."""

from __future__ import annotations

import os
import socket
import weakref

_own: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def listen() -> socket.socket | None:
    """Listen at a free port, on the interface that leads to the master. None: that is not possible."""
    try:
        master = (os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500")))
        family, kind, protocol, _, remote = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as outward:
            outward.connect(remote)  # on a datagram socket: sends nothing, only chooses the interface
            ip = outward.getsockname()[0]
        server = socket.create_server((ip, 0), family=family)
    except (OSError, ValueError):
        return None
    close_in_children(server)
    return server


def address_of(server: socket.socket | None) -> tuple[str, int]:
    """The address of `server`. Without a server, an empty string and 0."""
    return server.getsockname()[:2] if server is not None else ("", 0)


def close_in_children(sock: socket.socket) -> None:
    """Close the socket in each forked child. A data loader worker may outlive its rank and must not be taken for it."""
    _own.add(sock)


def _close_in_child() -> None:
    for sock in list(_own):
        sock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
