"""Ports for servers that are started for a while: by tests, measurements and the chaos run, several at a time."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from functools import cache
from itertools import cycle

from triton_runtime.server import Endpoint

_PORTS = range(20_000, 32_000)
"""Below those that the system gives to outgoing connections, which could take one before its server does."""
_BLOCK = 200


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now, and that no other process gets from here."""
    ports, _ = _ours()
    return next(port for port in ports if _is_free(port))


def free_endpoint() -> Endpoint:
    """Ports of the loopback interface for another Triton."""
    return Endpoint(http=free_port(), grpc=free_port(), metrics=free_port())


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@cache
def _ours() -> tuple[Iterator[int], socket.socket]:
    """The ports of a block that is this process's own, in turn: what was given lately may not be listened on yet.

    The lock is a socket with a name that no file has, so it goes with the process, however that ends.
    """
    blocks = [_PORTS[first : first + _BLOCK] for first in range(0, len(_PORTS), _BLOCK)]
    for block in random.SystemRandom().sample(blocks, len(blocks)):
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0parcel-defect-ports-{block.start}")
        except OSError:
            lock.close()
            continue
        return cycle(block), lock
    raise OSError("every block of ports is taken by another process: end some of those that run")
