"""One fault on one stack under load, from warm-up to a verdict."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chaos.faults import Fault
from chaos.load import Clients, Ended, Known, refusals
from chaos.proxy import Proxy
from chaos.releases import Pair
from chaos.stack import DEADLINE_S, Stack, Triton, shared_memory
from harness.gateway import AT_REST, GatewayProcess
from harness.ports import free_port
from harness.waiting import wait_for

_WARM_UP_S = 2.0
_CLEAN_S = 1.5
_RECOVERY_S = 30.0
_MOST_TRIES = 3
_MEMORY_MB = 48
"""How much a gateway may grow: buffers of as many requests as were in it at once."""


@dataclass(frozen=True)
class FaultReport:
    """What the clients saw of a fault, and what it left behind. Times in seconds, memory in MB."""

    fault: str
    sent: int
    answered: int
    refused: dict[str, int]
    wrong: int
    late: int
    untyped: int
    failed: int
    """Of those with the default deadline and a good picture."""
    recovery_s: float | None
    """From the end of the fault to the last failed request; None: it did not recover."""
    longest_s: float
    memory_mb: float
    shared_memory_mb: float
    crashes: int
    """Of Triton, by itself."""
    problems: list[str]
    notes: list[str]

    @property
    def has_passed(self) -> bool:
        """Whether all that is promised was kept."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


@contextlib.contextmanager
def servers(repository: Path, faults: Sequence[Fault]) -> Iterator[list[Triton]]:
    """As many Tritons on a repository as one of the faults wants; `stack_for` starts them."""
    tritons = [Triton(repository) for _ in range(max(fault.replicas for fault in faults))]
    try:
        yield tritons
    finally:
        for triton in tritons:
            triton.stop()


@contextlib.contextmanager
def stack_for(
    fault: Fault, tritons: list[Triton], pipeline: str, log: Path | None, pair: Pair | None = None
) -> Iterator[Stack]:
    """A gateway in front of as many of the Tritons as the fault wants; those that do not run yet are started."""
    with contextlib.ExitStack() as context:
        used = tritons[: fault.replicas]
        ports = [triton.endpoint.grpc for triton in used]
        proxy = context.enter_context(Proxy(free_port(), ports[0])) if fault.needs_proxy else None
        if proxy is not None:
            ports[0] = proxy.port
        routing = Path(context.enter_context(TemporaryDirectory(prefix="chaos-")), "routing.toml")
        routing.write_text(fault.routing.format(**({"sound": pair.sound, "other": pair.other} if pair else {})))
        for triton in used:
            if not triton.is_running:
                triton.start()
        gateway = GatewayProcess(
            ",".join(f"127.0.0.1:{port}" for port in ports),
            log,
            pipeline=pipeline,
            routing=routing,
            deadline_s=DEADLINE_S,
        )
        context.callback(gateway.stop)
        stack = context.enter_context(Stack(used, gateway, proxy, pair))
        gateway.wait_until_ready(30)
        yield stack


def try_out(fault: Fault, stack: Stack, known: Known, hold_s: float, allowance_s: float) -> FaultReport:
    """Run the fault under load, and judge.

    Triton 24.10 crashes now and then where a request is cancelled in the moment in which it ends (its issues 7368 and
    8034), or while it loads a step. That is another fault than the one that is tried, so this is tried again then.

    `allowance_s` is what the way to the client and back may cost beyond a deadline.
    """
    for _ in range(_MOST_TRIES):
        report = _try_once(fault, stack, known, hold_s, allowance_s)
        if report.has_passed or not report.crashes:
            break
        stack.notes.append(f"not judged for that: {'; '.join(report.problems)}")
        stack.problems.clear()
    return report


def _try_once(fault: Fault, stack: Stack, known: Known, hold_s: float, allowance_s: float) -> FaultReport:
    with Clients(known, stack.gateway) as load:
        time.sleep(_WARM_UP_S)
        crashes = sum(triton.crashes for triton in stack.tritons)
        memory, shared = stack.memory(), sum(shared_memory().values())
        extra = fault.act(stack, known, hold_s) or []
        ended = time.monotonic()
        while time.monotonic() - ended < _RECOVERY_S and not (
            time.monotonic() - ended > _CLEAN_S and load.is_clean(_CLEAN_S)
        ):
            time.sleep(0.1)
        has_recovered = load.is_clean(_CLEAN_S)
    seen = load.seen + extra
    unjudged = fault.spared
    failures = [each for each in seen if each.has_failed]
    late = [each for each in seen if each.end != "left" and each.late_s > allowance_s]
    wrong = [each for each in seen if each.end == "wrong"]
    untyped = [each for each in seen if each.end == "untyped"]
    grown = (stack.memory() - memory) / 2**20
    problems = [f"wrong: {text}" for text in sorted({each.detail for each in wrong})[:3]]
    if late and "late" not in unjudged:
        problems.append(f"late by {max(each.late_s for each in late):.2f} s")
    if untyped and "untyped" not in unjudged:
        problems += [f"untyped: {text}" for text in sorted({each.detail for each in untyped})[:3]]
    if failures and fault.is_hidden:
        problems += [f"failed: {text}" for text in sorted({each.detail for each in failures})[:3]]
    if not has_recovered:
        problems.append("it did not recover")
    if grown > _MEMORY_MB:
        problems.append(f"the gateway grew by {grown:.0f} MB")
    problems += _left_in_gauges(stack.gateway) + stack.problems
    if crashes := sum(triton.crashes for triton in stack.tritons) - crashes:
        stack.notes.append(f"a Triton crashed by itself, {crashes} times, and was started again")
    return FaultReport(
        fault=fault.name,
        sent=len(seen),
        answered=sum(each.end == "answered" for each in seen),
        refused=dict(refusals(seen)),
        wrong=len(wrong),
        late=len(late),
        untyped=len(untyped),
        failed=len(failures),
        recovery_s=_recovery(failures, ended) if has_recovered else None,
        longest_s=max(each.ended - each.sent for each in seen),
        memory_mb=round(grown, 1),
        crashes=crashes,
        shared_memory_mb=round((sum(shared_memory().values()) - shared) / 2**20, 1),
        problems=problems,
        notes=list(stack.notes),
    )


def _recovery(failures: list[Ended], ended: float) -> float:
    return max([0.0, *(each.ended - ended for each in failures)])


def _left_in_gauges(gateway: GatewayProcess) -> list[str]:
    with contextlib.suppress(TimeoutError):
        wait_for(gateway.is_at_rest, 8)
        return []
    gauges = gateway.gauges()
    return [f"{name} stays at {gauges[name]:g}" for name in AT_REST if gauges[name]]
