"""The table of faults. Each does harm to a stack, holds it for a while, and ends it again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import psutil

from chaos.load import Ask, Clients, Ended, Known
from chaos.releases import Pair, poisoned
from chaos.stack import Stack, send
from contract import STEPS
from export.exam import Verdict
from export.repository import Repository
from export.steps import VERDICT
from harness import ROOT
from harness.waiting import wait_for
from triton_runtime.child import Child

Spared = Literal["late", "untyped"]
_CLIENTS = 48


@dataclass(frozen=True)
class Fault:
    """A row. `act` gets the stack, what may be asked, and for how many seconds to hold the harm.

    `is_hidden`: no ordinary request may fail. `spared`: what cannot be judged, since the gateway itself is gone.
    `routing` makes it a fault on two releases, `{sound}` and `{other}`, with this routing. `act` returns what extra
    clients saw, if it had any.
    """

    name: str
    act: Callable[[Stack, Known, float], list[Ended] | None]
    replicas: int = 1
    needs_proxy: bool = False
    is_hidden: bool = False
    spared: frozenset[Spared] = frozenset()
    routing: str = ""

    def silent(self, pair: Pair | None) -> str:
        """The release that may not answer: the shadow."""
        return pair.other if pair and self.routing == OTHER_WATCHES else ""


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
    stack.tritons[0].stub(step).kill()
    time.sleep(hold)


def _hang_stub(stack: Stack, _: Known, hold: float, step: str) -> None:
    stub = stack.tritons[0].stub(step)
    send(stub, signal.SIGSTOP)
    time.sleep(hold)
    send(stub, signal.SIGCONT)


def _kill_stubs_in_turn(stack: Stack, known: Known, hold: float) -> None:
    """Kill the processes of all steps, each when the one before it was replaced."""
    triton = stack.tritons[0]
    for step in STEPS:
        for number in range(len(triton.stubs(step))):
            newest = triton.stubs(step)[-1]  # older ones may be left over from a step that was loaded again
            killed = time.monotonic()
            newest.kill()
            if not _holds(partial(_is_whole, stack, known, step, newest.pid), 60):
                stack.problems.append(f"nothing took the place of {step} {number}")
                return
            stack.notes.append(f"{step} {number}: back after {time.monotonic() - killed:.1f} s")
            time.sleep(hold)


def _is_whole(stack: Stack, known: Known, step: str, last: int) -> bool:
    """Whether a step has a process that is newer than `last`, and the service answers."""
    return stack.tritons[0].stubs(step)[-1].pid > last and bool(stack.gateway.predict(known.good[0].body))


def _holds(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes to hold; what it looks for may go this moment."""
    try:
        wait_for(condition, seconds, meanwhile=(OSError, psutil.Error, IndexError))
    except TimeoutError:
        return False
    return True


# ---- releases ----

SOUND_ANSWERS = 'stable = "{sound}"\n'
OTHER_ANSWERS = 'stable = "{other}"\n'
OTHER_WATCHES = SOUND_ANSWERS + '[shadow]\nrelease = "{other}"\n'
OTHERS_VERSION = 2


def _kill_release(stack: Stack, known: Known, hold: float) -> list[Ended]:
    """Kill the processes of a step of the other release again and again, while it is asked as well."""
    with Clients(known, stack.gateway, clients=6, pin=stack.pair.other) as pinned:
        until, kills = time.monotonic() + 3 * hold, 0
        while time.monotonic() < until:
            for triton in stack.tritons:
                with contextlib.suppress(psutil.Error):  # it may be gone this moment
                    for stub in triton.stubs("preprocess", OTHERS_VERSION):
                        if time.time() - stub.create_time() > 1:  # it serves: one that is loading is another fault
                            stub.kill()
                            kills += 1
            time.sleep(0.4)
        ended = time.monotonic()
        if _holds(lambda: time.monotonic() - ended > 1 and pinned.is_clean(1.0), 120):
            stack.notes.append(
                f"{kills} processes killed; that release back after {time.monotonic() - ended - 1:.1f} s"
            )
        else:
            stack.problems.append(f"{stack.pair.other} did not come back")
    return _extra(pinned.seen)


def _hang_release(stack: Stack, known: Known, hold: float) -> list[Ended]:
    """Have the processes of a step of the other release hang, while a crowd asks for it, and then die."""
    stopped = [stub for triton in stack.tritons for stub in triton.stubs("preprocess", OTHERS_VERSION)]
    for stub in stopped:
        send(stub, signal.SIGSTOP)
    # So many that their requests would fill all the room that the gateway has by default.
    with Clients(known, stack.gateway, clients=400, pause_s=2.0, pin=stack.pair.other) as crowd:
        time.sleep(2 * hold)
    for stub in stopped:
        send(stub, signal.SIGKILL)  # to go on would be another fault: what was abandoned makes Triton 24.10 crash then
    return _extra(crowd.seen)


def _send_poison(stack: Stack, known: Known, hold: float) -> list[Ended]:
    """Send one picture that ends processes, again and again."""
    poison = Ask(poisoned(known.good[0].body), "image/jpeg", frozenset({"image_crashes_server"}))
    before, seen = stack.pair.deaths(), []
    for _ in range(3):
        with Clients(known, stack.gateway, clients=1, most=4, only=[poison]) as attack:
            attack.wait()
        seen += attack.seen
        time.sleep(hold)
    deaths = stack.pair.deaths() - before
    stack.notes.append(f"one picture, sent {len(seen)} times, ended {deaths} processes")
    if not 0 < deaths <= 2:
        stack.problems.append(f"one picture ended {deaths} processes")
    return _extra(seen)


def _lose_stable(stack: Stack, _: Known, hold: float) -> None:
    """Take the stable release away, so that only the shadow is left."""
    folder = stack.pair.root / stack.pair.sound
    away = folder.rename(stack.pair.root.parent / stack.pair.sound)
    time.sleep(2 * hold + 2)  # Triton and the gateway have to notice
    away.rename(folder)


def _drop(stack: Stack, _: Known, hold: float) -> None:
    """Drop versions as people do: sound but closed to others, one that hangs and leaves a process behind, and nothing.

    The watcher is killed while it examines the first, and started again, as `make serve` does. Then the servers start
    again, one after the other, with what was published.
    """
    root = stack.pair.root
    closed = stack.pair.drop(3, "# dropped", 0o600)
    hangs = stack.pair.drop(4, "import os, time\nos.fork() or os.setsid()\ntime.sleep(1e6)", 0o644)
    nothing = stack.pair.drop(5, "this is no Python", 0o644)
    rules = root.parent / "exam.toml"
    rules.write_text(re.sub(r"timeout_s = \d+", "timeout_s = 20", (ROOT / "export" / "exam.toml").read_text()))
    arguments = ("export", "watch", "--repository", str(root), "--rules", str(rules), "--settle-s", "1")
    with Child(*arguments, stdout=subprocess.DEVNULL) as watcher:
        if not _holds((closed / VERDICT).exists, 60):
            stack.problems.append("no exam began")
        watcher.process.kill()
    with Child(*arguments, stdout=subprocess.DEVNULL):
        if not _holds(lambda: bool(_published(root)) and all(map(_is_refused, (hangs, nothing))), 240):
            stack.problems.append("the drops were not examined")
    for triton in stack.tritons:
        triton.stop()
        triton.start()
        time.sleep(hold)
    if shut := [path for path in root.rglob("*") if not path.stat().st_mode & 0o004]:
        stack.problems.append(f"{shut[0].relative_to(root)} cannot be read by others")
    stack.notes.append(f"published {', '.join(_published(root)) or 'nothing'}")


def _published(root: Path) -> list[str]:
    """The releases with the first drop."""
    repository = Repository(root)
    releases = [release for pipeline in repository.pipelines() for release in repository.releases(pipeline)]
    return [release.name for release in releases if release.steps["preprocess"].version == 3]


def _is_refused(drop: Path) -> bool:
    verdict = drop / VERDICT
    return verdict.exists() and Verdict.model_validate_json(verdict.read_text()).deaths == 0


def _extra(seen: list[Ended]) -> list[Ended]:
    """What is judged for what it is, but nobody promised that it is answered."""
    return [replace(each, is_ordinary=False) for each in seen]


def _kill_in_a_crowd(stack: Stack, known: Known, hold: float) -> list[Ended]:
    """Kill a server that has much in work."""
    with Clients(known, stack.gateway, clients=64, pause_s=0.0) as crowd:
        time.sleep(hold)
        stack.tritons[0].kill()
        time.sleep(hold)
    stack.tritons[0].start()
    return crowd.seen


def _be_late(stack: Stack, _: Known, hold: float) -> None:
    """Leave a question unanswered for somewhat longer than it may take, again and again."""
    until = time.monotonic() + 3 * hold
    while time.monotonic() < until:
        send(stack.tritons[0].process, signal.SIGSTOP)
        time.sleep(1.2)
        send(stack.tritons[0].process, signal.SIGCONT)
        time.sleep(2.0)


def _swallow(stack: Stack, _: Known, hold: float) -> None:
    assert stack.proxy is not None
    stack.proxy.swallow()
    time.sleep(hold)
    stack.proxy.open()


def _kill_gateway(stack: Stack, _: Known, hold: float) -> None:
    stack.gateway.restart()
    stack.gateway.wait_until_ready(30)


def _hang_gateway(stack: Stack, _: Known, hold: float) -> None:
    stack.gateway.process.send_signal(signal.SIGSTOP)
    time.sleep(hold)
    stack.gateway.process.send_signal(signal.SIGCONT)


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


def _flood(stack: Stack, known: Known, hold: float) -> list[Ended]:
    with Clients(known, stack.gateway, clients=64, pause_s=0.0, most=round(1000 * hold)) as flood:
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
        Fault("replica-kill-in-a-crowd", _kill_in_a_crowd, replicas=2, is_hidden=True),
        Fault("replica-late", _be_late, replicas=2, is_hidden=True),
        Fault("stubs-kill", _kill_stubs_in_turn),
        Fault("release-kill", _kill_release, replicas=2, is_hidden=True, routing=SOUND_ANSWERS),
        Fault("release-hang", _hang_release, is_hidden=True, routing=SOUND_ANSWERS),
        Fault("poison", _send_poison, replicas=2, is_hidden=True, routing=OTHER_ANSWERS),
        Fault("shadow-alone", _lose_stable, routing=OTHER_WATCHES),
        Fault("drops", _drop, replicas=2, is_hidden=True, routing=SOUND_ANSWERS),
        Fault("gateway-kill", _kill_gateway, spared=frozenset({"untyped"})),
        Fault("gateway-hang", _hang_gateway, spared=frozenset({"late"})),
        Fault("clients-vanish", partial(_misbehave, client=_vanish), is_hidden=True),
        Fault("clients-trickle", partial(_misbehave, client=_trickle), is_hidden=True),
        Fault("clients-babble", partial(_misbehave, client=_babble), is_hidden=True),
        Fault("flood", _flood),
    ]
    return rows


FAULTS = {fault.name: fault for fault in _table()}
