"""`python -m perf.bench`: the whole stack beside the limit of the machine and what one would write instead.

Everything runs at once and is measured in turns, round after round, with the same pictures: what a busy machine does to
one it does to all, so the ratios hold where absolute figures do not. A target counts as met or missed only where
every round says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from contract import Manifest
from export.config import Serving
from export.exam import Rules
from export.printing import wide_console
from export.publish import Examiner
from export.repository import Repository, RepositoryError
from export.steps import Step
from harness import ROOT
from harness.commands import command, parser
from perf import analyzer, plots
from perf.analyzer import PerfError
from perf.bench import pictures, targets
from perf.bench.contenders import limit
from perf.bench.services import BASE, BENTOML, LITSERVE, MOSEC, PLAIN, STACK, TUNED, listening, require
from perf.bench.targets import BARE, INT8, LIMIT, REDUCED_DECODE, TARGETS, TRITON, Target
from perf.bench.wrk import Bodies, ContenderRun, WrkLoad, wrk

CONTENDERS = {
    "limit": LIMIT,
    "bare": BARE,
    "stack": STACK,
    "triton": TRITON,
    "tuned": TUNED,
    "plain": PLAIN,
    "litserve": LITSERVE,
    "bentoml": BENTOML,
    "mosec": MOSEC,
}
"""By the name on the command line."""
ALL = "all"
OURS = [name for name in CONTENDERS if name not in ("litserve", "bentoml", "mosec")]

_EPILOG = """contenders:
  limit      a process a core that prepares pictures and runs the model, and nothing else, at the best batch size
  bare       one such process, one picture after the other: what a request costs (at one connection)
  stack      gateway and Triton, as make serve starts them, over HTTP (wrk)
  triton     the release alone, over gRPC (perf_analyzer)
  tuned      FastAPI with ONNX Runtime in its process: our preprocessing, a thread a core, no spinning
  plain      the same as one writes it first: default session, full decode
  litserve, bentoml, mosec
             the same work in each of them (make contenders)

comparisons within the stack, in turns like everything else:
  --pictures-of 12mp   beside the same release decoding at full size
  --base RELEASE       beside another release; the target is int8's

Needs wrk (Debian: apt-get install wrk) and perf_analyzer (make perf-tools).
"""


@dataclass(frozen=True)
class BenchPlan:
    """What is measured, and for how long.

    Args:
        repository: what the stack serves.
        release: whose files the other contenders use.
        pins: the releases that the stack is asked for, by contender; empty: whichever the routing says.
        contenders: the names of those that take part.
        loads: in the order in which each round goes through them.
        pictures: JPEG files.
        seconds: of one measurement.
        rounds: how often everything is measured.
    """

    repository: Path
    release: Manifest
    pins: dict[str, str]
    contenders: list[str]
    loads: list[WrkLoad]
    pictures: list[Path]
    seconds: int
    rounds: int


def bench(plan: BenchPlan, say: Callable[[str], None]) -> list[ContenderRun]:
    """Every contender, in turns.

    Raises:
        PerfError, TritonFailed, Missing: a part is missing or failed; the message says which.
    """
    folders = {
        step: Repository(plan.repository).step_folder(plan.release.pipeline, step, pin.version)
        for step, pin in plan.release.steps.items()
    }
    files = (folders["preprocess"] / "preprocessing.py", folders["classifier"] / "model.onnx")
    runs: list[ContenderRun] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as scratch,
        listening(plan.contenders, plan.repository, *files, plan.pins) as (services, triton),
    ):
        bodies = {form: Bodies.of(form, plan.pictures, Path(scratch)) for form in {load.form for load in plan.loads}}
        batch = _best_batch(plan, files, say) if LIMIT in plan.contenders else 0
        for number in range(plan.rounds):
            for load in plan.loads:
                say(f"round {number + 1} of {plan.rounds}, {load}")
                if LIMIT in plan.contenders:
                    rate = limit.measure(*files, plan.pictures, batch=batch, seconds=plan.seconds)
                    runs.append(ContenderRun(LIMIT, load, number, rate))
                if BARE in plan.contenders and load.connections == 1:
                    cost = limit.bare(*files, plan.pictures, seconds=plan.seconds)
                    runs.append(ContenderRun(BARE, load, number, 1e3 / cost, p50=cost))
                for name, service in services.items():
                    runs.append(wrk(service, name, load, number, bodies[load.form], plan.seconds))
                if TRITON in plan.contenders:
                    runs.append(_triton(plan, triton.grpc_url, load, number))
    return runs


def _best_batch(plan: BenchPlan, files: tuple[Path, Path], say: Callable[[str], None]) -> int:
    rates = {}
    for batch in (1, 2, 4, 8):
        say(f"the limit: batch {batch}")
        rates[batch] = limit.measure(*files, plan.pictures, batch=batch, seconds=plan.seconds)
    return max(rates, key=rates.__getitem__)


def _triton(plan: BenchPlan, url: str, load: WrkLoad, number: int) -> ContenderRun:
    interval = int(plan.seconds * 333)
    measured = analyzer.measure(plan.release.name, url, plan.pictures, load.connections, interval_ms=interval)
    return ContenderRun(TRITON, load, number, measured.throughput, measured.p50, measured.p99)


def publish_full_decode(repository: Repository, release: Manifest, say: Callable[[str], None]) -> str:
    """Publish the release once more with JPEGs decoded at full size; returns the new one's name.

    Raises:
        PerfError: its preprocessing does not decode at a reduced size.
    """
    reduced = b"picture.draft(None, (size, size))"
    step = Step.read(repository.step_folder(release.pipeline, "preprocess", release.steps["preprocess"].version))
    if step is None or step.files["preprocessing.py"].count(reduced) != 1:
        raise PerfError(f"the preprocessing of {release.name} has no line {reduced.decode()!r} to take out")
    number = 1 + repository.versions(release.pipeline, "preprocess")[-1]
    folder = repository.step_folder(release.pipeline, "preprocess", number)
    folder.mkdir()
    for name, content in step.files.items():
        (folder / name).write_bytes(content.replace(reduced, b"pass"))
    rules = Rules.read(ROOT / "export" / "exam.toml")
    serving = Serving.read(ROOT / "export" / "serving.toml")
    examiner = Examiner(repository, serving, rules, force=True)  # it costs more, which is the point
    return examiner.publish_drop(release.pipeline, {"preprocess": number}, say).manifest.name


def tables(runs: list[ContenderRun]) -> Iterator[Table]:
    """Medians over the rounds, a table a load."""
    for load in dict.fromkeys(run.load for run in runs):
        here = [run for run in runs if run.load == load]
        table = Table(title=str(load), title_justify="left")
        for header in ("", "req/s", "range", "limit", "p50 ms", "p99 ms", "failed", "MiB"):
            table.add_column(header, justify="left" if not header else "right", no_wrap=True)
        for contender in dict.fromkeys(run.contender for run in here):
            mine = [run for run in here if run.contender == contender]
            rates = [run.throughput for run in mine]
            shares = Target(contender, LIMIT, (), 0).values(runs, load)
            table.add_row(
                contender,
                f"{statistics.median(rates):.1f}",
                f"{min(rates):.0f}-{max(rates):.0f}",
                f"{statistics.median(shares):.2f}" if shares else "",
                *(_median(mine, name, 1) for name in ("p50", "p99")),
                str(sum(run.failed for run in mine)),
                _median(mine, "memory_mib", 0),
            )
        yield table
        if stack := [run.cpu_ms for run in here if run.contender == STACK and run.cpu_ms]:
            cpu = Table(title=f"processor milliseconds a request, stack, {load}", title_justify="left")
            for part in stack[0]:
                cpu.add_column(part, justify="right")
            cpu.add_row(*(f"{statistics.median(each[part] for each in stack):.2f}" for part in stack[0]))
            yield cpu


def _median(runs: list[ContenderRun], name: str, digits: int) -> str:
    value = statistics.median(getattr(run, name) for run in runs)
    return "" if value != value else f"{value:.{digits}f}"


def charts(runs: list[ContenderRun]) -> list[plots.Chart]:
    """Throughput and the 99th percentile over the connections, for each form of the bodies."""
    result = []
    for form in dict.fromkeys(run.load.form for run in runs):
        for figure, title in (("throughput", "requests a second"), ("p99", "99th percentile, ms")):
            lines: dict[str, list[tuple[float, float]]] = {}
            steps = sorted({run.load.connections for run in runs})
            for contender in dict.fromkeys(run.contender for run in runs):
                for connections in steps:
                    values = [getattr(run, figure) for run in runs
                              if run.contender == contender and run.load == WrkLoad(connections, form)]  # fmt: skip
                    if values and (value := statistics.median(values)) == value:
                        lines.setdefault(contender, []).append((connections, value))
            result.append(plots.Chart(f"{title}, {form}", "connections", lines, steps))
    return result


@command("bench", 1, PerfError, RepositoryError)
def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the figures; 1 where it could not be measured."""
    parse = parser("perf.bench", __doc__, _EPILOG)
    parse.add_argument("--contenders", nargs="+", choices=[*CONTENDERS, ALL], default=OURS, help="default: our own")
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", help="folder of JPEGs (default: examples)")
    parse.add_argument("--pictures-of", choices=pictures.KINDS, default="given", help="sizes (default: as given)")
    parse.add_argument("--form", choices=["raw", "json"], nargs="+", default=["raw"], help="of bodies (default: raw)")
    parse.add_argument("--release", help="default: the newest")
    parse.add_argument("--base", metavar="RELEASE", help="another release, for comparison")
    parse.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16, 64], help="default: 1 4 16 64")
    parse.add_argument("--seconds", type=int, default=5, help="of one measurement (default: 5)")
    parse.add_argument("--rounds", type=int, default=3, help="default: 3")
    parse.add_argument("--results", type=Path, default=ROOT / "perf/results/bench", help="default: perf/results/bench")
    options = parse.parse_args(arguments)
    if options.base and options.pictures_of == "12mp":
        parse.error("--pictures-of 12mp has a base of its own")
    console = wide_console()
    with Progress(console=Console(stderr=True), transient=True) as progress, tempfile.TemporaryDirectory() as name:
        task = progress.add_task("starting", total=None)
        held_against, runs = _measure(options, Path(name), lambda what: progress.update(task, description=what))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    figures, drawn = (options.results.with_suffix(suffix) for suffix in (".json", ".svg"))
    figures.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    plots.write(drawn, plots.charts(charts(runs)))
    for table in tables(runs):
        console.print(table)
    console.print(targets.table(runs, held_against))
    console.print(f"figures: {figures}, {drawn}", markup=False, soft_wrap=True)
    return 0


def _measure(
    options: argparse.Namespace, scratch: Path, say: Callable[[str], None]
) -> tuple[tuple[Target, ...], list[ContenderRun]]:
    """What the options ask for, and what it is held against."""
    contenders = [CONTENDERS[name] for name in (CONTENDERS if ALL in options.contenders else options.contenders)]
    require(contenders)
    found = sorted(options.pictures.rglob("*.jpg"))[:64]
    if not found:
        raise PerfError(f"{options.pictures} holds no JPEGs")
    root, held_against, base = options.repository, TARGETS, options.base
    release = Repository(root).release(options.release) if options.release else Repository(root).releases("defect")[-1]
    if options.pictures_of == "12mp":
        root = Path(shutil.copytree(root, scratch / "model_repository"))
        base = publish_full_decode(Repository(root), release, say)
        held_against = REDUCED_DECODE
    elif base:
        Repository(root).release(base)
        held_against = (*INT8, *TARGETS)
    pins = {STACK: release.name} if base or options.release else {}
    plan = BenchPlan(
        repository=root,
        release=release,
        pins=pins | ({BASE: base} if base else {}),
        contenders=contenders + ([BASE] if base else []),
        loads=[WrkLoad(connections, form) for form in options.form for connections in options.connections],
        pictures=pictures.KINDS[options.pictures_of](found, scratch),
        seconds=options.seconds,
        rounds=options.rounds,
    )
    return held_against, bench(plan, say)


if __name__ == "__main__":
    sys.exit(main())
