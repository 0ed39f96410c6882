"""The table of faults. Each does harm to a stack, holds it for a while, and ends it again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from chaos.load import Known, Load, Seen
from chaos.stack import Stack, send
from contract import STEPS

Spared = Literal["late", "untyped"]
_CLIENTS = 48


@dataclass(frozen=True)
class Fault:
    """A row. `act` gets the stack, what may be asked, and for how many seconds to hold the harm.

    `is_hidden`: no ordinary request may fail. `spared`: what cannot be judged, since the gateway itself is gone.
    `act` returns what extra clients saw, if it had any.
    """

    name: str
    act: Callable[[Stack, Known, float], list[Seen] | None]
    replicas: int = 1
    needs_proxy: bool = False
    is_hidden: bool = False
    spared: frozenset[Spared] = frozenset()


def _kill(stack: Stack, _: Known, hold: float) -> None:
    stack.tritons[0].kill()
    time.sleep(hold)
    stack.tritons[0].start()


def _restart(stack: Stack, _: Known, hold: float) -> None:
    stack.tritons[0].stop()
    time.sleep(hold)
    stack.tritons[0].start()


def _hang(stack: Stack, _: Known, hold: float) -> None:
    send(stack.tritons[0].process, signal.SIGSTOP)
    time.sleep(hold)
    send(stack.tritons[0].process, signal.SIGCONT)


def _kill_stub(stack: Stack, _: Known, hold: float, step: str) -> None:
    triton = stack.tritons[0]
    triton.stub(step).kill()
    time.sleep(hold)
    # Triton 24.10 starts no other process in its place: whoever runs Triton has to restart it.
    triton.kill()
    triton.start()


def _hang_stub(stack: Stack, _: Known, hold: float, step: str) -> None:
    triton = stack.tritons[0]
    stub = triton.stub(step)
    send(stub, signal.SIGSTOP)
    time.sleep(hold)
    send(stub, signal.SIGCONT)
    time.sleep(1.0)
    if triton.is_running:  # it may have ended by itself, when a process that it had given up went on
        triton.kill()
    triton.start()


def _swallow(stack: Stack, _: Known, hold: float) -> None:
    assert stack.proxy is not None
    stack.proxy.swallow()
    time.sleep(hold)
    stack.proxy.open()


def _kill_gateway(stack: Stack, _: Known, hold: float) -> None:
    stack.gateway.kill()
    stack.gateway.start()


def _hang_gateway(stack: Stack, _: Known, hold: float) -> None:
    send(stack.gateway.process, signal.SIGSTOP)
    time.sleep(hold)
    send(stack.gateway.process, signal.SIGCONT)


# ---- clients ----


def _misbehave(
    stack: Stack,
    known: Known,
    hold: float,
    client: Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes, random.Random], Awaitable[None]],
) -> None:
    """Many clients, each doing the same again and again."""
    until = time.monotonic() + hold

    async def repeat(chance: random.Random) -> None:
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await asyncio.open_connection("127.0.0.1", stack.gateway.port)
                try:
                    async with asyncio.timeout(left):
                        await client(reader, writer, known.good[0].body, chance)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.1)

    async def everyone() -> None:
        await asyncio.gather(*(repeat(random.Random(number)) for number in range(_CLIENTS)))  # noqa: S311 - no secret

    asyncio.run(everyone())


def _head(length: int) -> bytes:
    lines = ("POST /v1/predict HTTP/1.1", "Host: x", "Content-Type: image/jpeg", f"Content-Length: {length}", "", "")
    return "\r\n".join(lines).encode()


async def _vanish(_: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, chance: random.Random) -> None:
    """Leave in the middle of the body, or while the answer is on its way."""
    writer.write(_head(len(body)) + body[: chance.choice((10, len(body) // 2, len(body)))])
    await writer.drain()
    await asyncio.sleep(chance.random() * 0.03)


async def _trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, _: random.Random) -> None:
    """Send a byte now and then."""
    for byte in _head(len(body)) + body:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.02)


async def _babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: bytes, chance: random.Random) -> None:
    """Send what is no HTTP, or hardly."""
    writer.write(
        chance.choice(
            (
                chance.randbytes(2000),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500),  # as TLS begins
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
                b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
            )
        )
    )
    await writer.drain()
    await reader.read(4096)


def _flood(stack: Stack, known: Known, hold: float) -> list[Seen]:
    with Load(known, stack.gateway, clients=64, pause_s=0.0, most=round(1000 * hold)) as flood:
        flood.wait()
    return flood.seen


def _table() -> list[Fault]:
    rows = [Fault("triton-kill", _kill), Fault("triton-hang", _hang), Fault("triton-restart", _restart)]
    for step in STEPS:
        rows.append(Fault(f"{step}-kill", partial(_kill_stub, step=step)))
        rows.append(Fault(f"{step}-hang", partial(_hang_stub, step=step)))
    rows += [
        Fault("black-hole", _swallow, needs_proxy=True),
        Fault("replica-kill", _kill, replicas=2, is_hidden=True),
        Fault("replica-hang", _hang, replicas=2, is_hidden=True),
        Fault("replica-drain", _restart, replicas=2, is_hidden=True),
        Fault("replica-black-hole", _swallow, replicas=2, needs_proxy=True, is_hidden=True),
        Fault("replica-stub-kill", partial(_kill_stub, step="classifier"), replicas=2, is_hidden=True),
        Fault("replica-stub-hang", partial(_hang_stub, step="classifier"), replicas=2, is_hidden=True),
        Fault("gateway-kill", _kill_gateway, spared=frozenset({"untyped"})),
        Fault("gateway-hang", _hang_gateway, spared=frozenset({"late"})),
        Fault("clients-vanish", partial(_misbehave, client=_vanish), is_hidden=True),
        Fault("clients-trickle", partial(_misbehave, client=_trickle), is_hidden=True),
        Fault("clients-babble", partial(_misbehave, client=_babble), is_hidden=True),
        Fault("flood", _flood),
    ]
    return rows


FAULTS = {fault.name: fault for fault in _table()}
