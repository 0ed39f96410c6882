"""`python -m perf.bench`: the whole stack beside the limit of the machine and what one would write instead.

Everything runs at once and is measured in turns, round after round, with the same pictures: what a busy machine does to
one it does to all, so the ratios hold where absolute figures do not. A target counts as met or missed only where
every round says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from export.repository import Repository
from perf import analyzer
from perf.analyzer import PerfError
from perf.contenders import limit
from triton_runtime.installation import Missing
from triton_runtime.server import Endpoint, TritonFailed, TritonServer
from triton_runtime.signals import Stopped, unwind_on_signals
from triton_runtime.stack import ROOT, SAMPLE, Child, Gateway, free_endpoint, free_port

LIMIT, STACK, TRITON, TUNED, PLAIN = "limit", "stack", "triton", "app, tuned", "app, plain"
TARGETS = (
    (STACK, LIMIT, (16, 64), 0.90),
    (STACK, TUNED, (16, 64), 0.92),
    (STACK, PLAIN, (16, 64), 1.0),
    (STACK, TRITON, (16,), 0.95),
)
"""Contender, what it is held against, at these connections, and the least share of its throughput."""

_EPILOG = """contenders:
  limit        a process a core that prepares pictures and runs the model, and nothing else, at the best batch size
  stack        gateway and Triton, as make serve starts them, over HTTP (wrk)
  triton       the release alone, over gRPC (perf_analyzer)
  app, tuned   FastAPI with ONNX Runtime in its process: our preprocessing, a thread a core, no spinning
  app, plain   the same as one writes it first: default session, full decode

Needs wrk (Debian: apt-get install wrk) and perf_analyzer (make perf-tools).
"""


@dataclass(frozen=True)
class Run:
    """One contender in one round: requests a second, milliseconds, and processor milliseconds a request by process."""

    contender: str
    connections: int
    round: int
    throughput: float
    p50: float = float("nan")
    p99: float = float("nan")
    failed: int = 0
    cpu_ms: dict[str, float] | None = None
    memory_mib: float = float("nan")


class Service:
    """A contender that listens: its address, and the processes that are its."""

    def __init__(self, url: str, processes: dict[str, psutil.Process]) -> None:
        self.url = url
        self._processes = processes

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time until now, by part."""
        spent: dict[str, float] = defaultdict(float)
        for part, process in self._parts():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent[part] += times.user + times.system
        return spent

    def memory_mib(self) -> float:
        """Memory that would be free again without it: what is shared with others is not counted."""
        total = 0
        for _, process in self._parts():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().uss
        return total / 2**20

    def _parts(self) -> Iterator[tuple[str, psutil.Process]]:
        for part, process in self._processes.items():
            yield part, process
            for child in process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    line = " ".join(child.cmdline())
                    steps = [step for step in ("preprocess", "classifier", "postprocess") if f"_{step}/" in line]
                    yield (steps or [part])[0], child


def wrk(service: Service, contender: str, connections: int, number: int, pictures: list[Path], options: Options) -> Run:
    """Load a service with wrk.

    Raises:
        PerfError: wrk did not finish.
    """
    environment = {**os.environ, "BENCH_PICTURES": ":".join(map(str, pictures)), "BENCH_FORM": options.form}
    command = ["wrk", "-t1", f"-c{connections}", f"-d{options.seconds:g}s", "--timeout", "30s"]
    command += ["-s", str(ROOT / "perf/wrk.lua"), f"{service.url}/v1/predict"]
    before = service.cpu_seconds()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = service.cpu_seconds()
    if run.returncode:
        raise PerfError(f"wrk failed on {contender}: {(run.stdout + run.stderr).strip().splitlines()[-1:]}")
    figures = json.loads(run.stdout.strip().splitlines()[-1])
    requests = max(1, figures["requests"])
    return Run(
        contender,
        connections,
        number,
        throughput=figures["requests"] / figures["seconds"],
        p50=figures["p50"],
        p99=figures["p99"],
        failed=figures["failed"],
        cpu_ms={part: 1e3 * (after[part] - before[part]) / requests for part in after},
        memory_mib=service.memory_mib(),
    )


@dataclass(frozen=True)
class Options:
    """What is measured, and for how long."""

    seconds: float
    rounds: int
    connections: list[int]
    form: str


@contextlib.contextmanager
def services(repository: Path, steps: dict[str, Path]) -> Iterator[tuple[dict[str, Service], Endpoint]]:
    """Everything that listens, for the length of this block."""
    endpoint = free_endpoint()
    files = [str(steps["preprocess"] / "preprocessing.py"), str(steps["classifier"] / "model.onnx")]
    with contextlib.ExitStack() as running:
        triton = running.enter_context(TritonServer(repository, endpoint))
        triton.wait_until_ready()
        gateway = running.enter_context(Gateway(endpoint, "127.0.0.1", free_port(), log_level="error"))
        gateway.predict(SAMPLE, timeout=60)
        parts = {"gateway": psutil.Process(gateway.process.pid), "triton": psutil.Process(triton.process.pid)}
        found = {STACK: Service(gateway.url, parts)}
        for name, kind in ((TUNED, "tuned"), (PLAIN, "plain")):
            port = free_port()
            child = running.enter_context(Child("perf.contenders.inprocess", kind, *files, str(port)))
            found[name] = Service(f"http://127.0.0.1:{port}", {"app": psutil.Process(child.process.pid)})
            _wait_for(found[name].url)
        yield found, endpoint


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/openapi.json", timeout=1)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise PerfError(f"{url} does not answer") from None
            time.sleep(0.1)


def bench(repository: Path, pictures: list[Path], options: Options, say: Callable[[str], None]) -> list[Run]:
    """Every contender, in turns.

    Raises:
        PerfError, TritonFailed, Missing: a part is missing or failed; the message says which.
    """
    if not shutil.which("wrk"):
        raise PerfError("wrk is missing: apt-get install wrk")
    release = Repository(repository).releases("defect")[-1]
    steps = {s: Repository(repository).step_folder("defect", s, pin.version) for s, pin in release.steps.items()}
    files = (steps["preprocess"] / "preprocessing.py", steps["classifier"] / "model.onnx")
    runs: list[Run] = []
    with services(repository, steps) as (found, endpoint):
        rates = {}
        for batch in (1, 2, 4, 8):
            say(f"the limit: batch {batch}")
            rates[batch] = limit.measure(*files, pictures, batch=batch, seconds=options.seconds)
        best = max(rates, key=rates.__getitem__)
        for number in range(options.rounds):
            for connections in options.connections:
                say(f"round {number + 1} of {options.rounds}, {connections} connections")
                rate = limit.measure(*files, pictures, batch=best, seconds=options.seconds)
                runs.append(Run(LIMIT, connections, number, rate))
                for name, service in found.items():
                    runs.append(wrk(service, name, connections, number, pictures, options))
                (measured,) = analyzer.measure(
                    release.name, endpoint.grpc_url, pictures, [connections], interval_ms=int(options.seconds * 333)
                )
                figures = (measured.throughput, measured.p50, measured.p99)
                runs.append(Run(TRITON, connections, number, *figures))
    return runs


def ratios(runs: list[Run], contender: str, against: str, connections: int) -> list[float]:
    """Throughput as a share of another's, round by round."""
    rate = {(r.contender, r.round): r.throughput for r in runs if r.connections == connections}
    return [rate[contender, r.round] / rate[against, r.round] for r in runs
            if r.contender == contender and r.connections == connections]  # fmt: skip


def verdict(values: list[float], least: float) -> str:
    """Met or missed where every round says so, else inconclusive."""
    if min(values) >= least:
        return "met"
    return "missed" if max(values) < least else "inconclusive"


def tables(runs: list[Run]) -> Iterator[Table]:
    """Medians over the rounds, one table a number of connections; then the targets."""
    for connections in sorted({run.connections for run in runs}):
        here = [run for run in runs if run.connections == connections]
        table = Table(title=f"{connections} connections", title_justify="left")
        for header in ("", "req/s", "range", "limit", "p50 ms", "p99 ms", "failed", "MiB"):
            table.add_column(header, justify="left" if not header else "right", no_wrap=True)
        for contender in dict.fromkeys(run.contender for run in here):
            mine = [run for run in here if run.contender == contender]
            rates = [run.throughput for run in mine]
            share = statistics.median(ratios(runs, contender, LIMIT, connections))
            table.add_row(
                contender,
                f"{statistics.median(rates):.1f}",
                f"{min(rates):.0f}-{max(rates):.0f}",
                f"{share:.2f}",
                *(_median(mine, name, 1) for name in ("p50", "p99")),
                str(sum(run.failed for run in mine)),
                _median(mine, "memory_mib", 0),
            )
        yield table
        stack = [run.cpu_ms for run in here if run.contender == STACK and run.cpu_ms]
        cpu = Table(title=f"processor milliseconds a request, stack, {connections} connections", title_justify="left")
        for part in stack[0]:
            cpu.add_column(part, justify="right")
        cpu.add_row(*(f"{statistics.median(each[part] for each in stack):.2f}" for part in stack[0]))
        yield cpu
    targets = Table(title="targets", title_justify="left")
    for header in ("", "connections", "at least", "median", "range", ""):
        targets.add_column(header)
    present = {run.connections for run in runs}
    for contender, against, levels, least in TARGETS:
        for connections in sorted(present & set(levels)):
            values = ratios(runs, contender, against, connections)
            targets.add_row(
                f"{contender} / {against}",
                str(connections),
                f"{least:.2f}",
                f"{statistics.median(values):.2f}",
                f"{min(values):.2f}-{max(values):.2f}",
                verdict(values, least),
            )
    yield targets


def _median(runs: list[Run], name: str, digits: int) -> str:
    value = statistics.median(getattr(run, name) for run in runs)
    return "" if value != value else f"{value:.{digits}f}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the figures; 1 where it could not be measured."""
    parse = argparse.ArgumentParser(
        prog="python -m perf.bench",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="default: model_repository")
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", help="folder of JPEGs (default: examples)")
    parse.add_argument("--seconds", type=float, default=5.0, help="of one measurement (default: 5)")
    parse.add_argument("--rounds", type=int, default=3, help="default: 3")
    parse.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16, 64], help="default: 1 4 16 64")
    parse.add_argument("--form", choices=["raw", "json"], default="raw", help="how pictures are sent (default: raw)")
    parse.add_argument("--json", type=Path, default=ROOT / "perf/results/bench.json", help="default: perf/results/")
    options = parse.parse_args(arguments)
    unwind_on_signals()
    console = Console()
    pictures = sorted(options.pictures.rglob("*.jpg"))[:64]
    try:
        if not pictures:
            raise PerfError(f"{options.pictures} holds no JPEGs")
        plan = Options(options.seconds, options.rounds, options.connections, options.form)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("starting", total=None)
            runs = bench(options.repository, pictures, plan, lambda what: progress.update(task, description=what))
    except (PerfError, Missing, TritonFailed, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except Stopped:
        return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    for table in tables(runs):
        console.print(table)
    console.print(f"figures: {options.json}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
