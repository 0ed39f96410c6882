"""`python -m perf`: latency budgets, checked on the running thing, and a report of where the time goes.

Measures a release with real pictures: the API over HTTP, the ensemble and each of its steps over gRPC (perf_analyzer).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import contract
from contract import Manifest
from export.printing import wide_console
from export.repository import Repository, RepositoryError
from harness import ROOT
from harness.commands import command, parser
from perf import machine, steps, tables, verdict
from perf.analyzer import PerfError, inputs_file
from perf.budgets import BUDGETS, Budget, Budgets, Comparison
from perf.load import Load
from perf.report import Report
from perf.rounds import Case, Plan, Rounds
from perf.serving import serving

_EPILOG = """what it does
  Everything is measured once a round, in turns, with two releases directly after each other. A figure's 95 % interval
  comes from how much it differs between the rounds. A bound of perf/budgets.toml passes or fails where the whole
  interval is on one side of it. Otherwise it is inconclusive: more --rounds or a quieter machine narrow the interval.
  So is what could not be measured in a round, since no request was answered within 16 times the time for it.

  The gateway gets its load from a small client in this process, the rest from perf_analyzer. A request rate means
  requests that do not wait for each other: at random times over HTTP, at even intervals over gRPC. Less than 90 % of
  the rate answered is a fail. The load generator shares the machine with the server.

  Uses the Triton that listens on TRITON_GRPC_PORT (default 8001), or starts the embedded one, and always starts a
  gateway of its own, with the defaults and whatever GATEWAY_ variables are set.

exit status
  0  no bound failed (inconclusive ones are listed; with --strict they count as failed)
  1  a bound failed
  2  it could not be measured; the message says why

examples
  make perf
  make perf RELEASE=defect-v2 BASE=defect-v1     is the new one slower than [[compare]] allows?
  python -m perf --rounds 8 --seconds 6          narrower intervals
  python -m perf --input-only                    only what perf_analyzer is fed with, for runs of your own
  python -m perf.analyzer -m defect-v1 --input-data perf/results/defect-v1-input.json -i grpc -u 127.0.0.1:8001
                                                 one of them, against a stack that runs
"""


@command("perf", 2, PerfError, RepositoryError, ValueError)
def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the report; the exit status is in `_EPILOG`."""
    parse = parser("perf", __doc__, _EPILOG)
    parse.add_argument("--release", help="default: the newest in the repository")
    parse.add_argument("--base", help="another release of the pipeline to compare it with")
    parse.add_argument("--budgets", type=Path, default=BUDGETS, help="default: perf/budgets.toml")
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", help="folder (default: examples)")
    parse.add_argument(
        "--concurrency",
        type=int,
        nargs="*",
        default=[1, 4, 16],
        metavar="N",
        help="levels of the latency-throughput curve (default: 1 4 16)",
    )
    parse.add_argument("--seconds", type=float, default=3.0, help="of one measurement (default: 3)")
    parse.add_argument("--rounds", type=int, default=5, help="at least 2 (default: 5)")
    parse.add_argument("--strict", action="store_true", help="inconclusive counts as failed")
    parse.add_argument(
        "--input-only", action="store_true", help="write the release's input for perf_analyzer, and stop"
    )
    parse.add_argument("--out", type=Path, default=ROOT / "perf/results", help="folder (default: perf/results)")
    options = parse.parse_args(arguments)
    if options.rounds < 2 or options.seconds <= 0 or min(options.concurrency, default=1) < 1:
        parse.error("needs at least 2 rounds, which an interval is made of, and positive --seconds and --concurrency")
    inputs = _write_inputs(options)
    if options.input_only:
        print(inputs)
        return 0
    report = _measure(options, shlex.join(["python", "-m", "perf", *(arguments or sys.argv[1:])]))
    name = f"{report.title.replace(' ', '-')}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    page, data = report.write(options.out, name)
    console = wide_console()
    results = report.results
    for table in (tables.latencies(results), tables.parts(results), tables.verdicts(report.verdicts)):
        console.print(table)
    for case in results.cases:
        if why := results.unmeasured(case):
            console.print(f"{case.release}, {case.endpoint}, {case.load}: {why}")
    console.print(f"{report.title}: {report.summary()}")
    console.print(f"report:  {page}\nfigures: {data}\ninput:   {inputs}", markup=False, highlight=False, soft_wrap=True)
    bad = {"fail", "inconclusive"} if options.strict else {"fail"}
    return int(any(each.outcome in bad for each in report.verdicts))


def _write_inputs(options: argparse.Namespace) -> Path:
    """Write what the release is measured with, for runs of perf_analyzer by hand."""
    repository = Repository(options.repository)
    release = _releases(repository, options.release, None)[0]
    rows = steps.inputs(repository, release, steps.pictures_in(options.pictures))["ensemble"]
    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / f"{release.name}-input.json"
    path.write_text(inputs_file(rows))
    return path


def _measure(options: argparse.Namespace, command: str) -> Report:
    budgets = Budgets.read(options.budgets)
    repository = Repository(options.repository)
    releases = _releases(repository, options.release, options.base)
    release, *others = releases
    is_latest = release == repository.releases(release.pipeline)[-1]
    due = [budget for budget in budgets.budget if budget.is_for(release.name, is_latest=is_latest)]
    compared = budgets.compare if others else ()
    if not due and not compared:
        raise PerfError(f'{options.budgets} says nothing of {release.name}: add a [[budget]] with release = "*"')
    plan = Plan(
        cases=_cases(releases, [*due, *compared], options.concurrency),
        rounds=options.rounds,
        seconds=options.seconds,
        with_limit=any(budget.of_limit for budget in due),
    )
    pictures = steps.pictures_in(options.pictures)
    facts = {
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
        **{each.name: _description(each) for each in releases},
        **machine.facts(),
        "measured": f"{options.rounds} rounds of {options.seconds:g} s, {len(pictures)} pictures",
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1 + plan.measurements)

        def say(what: str) -> None:
            progress.update(task, description=what, advance=1)

        with serving(options.repository, releases) as running:
            results = Rounds(running, repository, releases, pictures, say).measure(plan)
    verdicts = [each for budget in due for each in verdict.of_budget(budget, release.name, results)]
    for base in others:
        verdicts += [v for each in compared for v in verdict.of_comparison(each, release.name, base.name, results)]
    return Report(" against ".join(each.name for each in releases), command, facts, results, verdicts)


def _releases(repository: Repository, name: str | None, base: str | None) -> list[Manifest]:
    """The release to measure and, where there is one, its base."""
    if name is None:
        pipelines = repository.pipelines()
        if not pipelines:
            raise PerfError(f"{repository.root} holds no release: run 'make export'")
        release = repository.releases(pipelines[-1])[-1]
    else:
        release = repository.release(name)
    if base is None:
        return [release]
    other = repository.release(base)
    if other.pipeline != release.pipeline or other == release:
        raise PerfError(f"{base} cannot be the base of {release.name}: give another release of {release.pipeline}")
    return [release, other]


def _cases(releases: Sequence[Manifest], bounds: Sequence[Budget | Comparison], levels: Sequence[int]) -> list[Case]:
    """The curves of gateway and ensemble, every step alone, and what the bounds ask for, each for all releases."""
    wanted = [(endpoint, Load(level)) for endpoint in ("gateway", "ensemble") for level in levels]
    wanted += [(step, Load(1)) for step in contract.STEPS]
    wanted += [(each.endpoint, each.load) for each in bounds]
    return [Case(release.name, endpoint, load) for endpoint, load in dict.fromkeys(wanted) for release in releases]


def _description(release: Manifest) -> str:
    steps = ", ".join(f"{step} {pin.version} ({pin.digest[:12]})" for step, pin in release.steps.items())
    return f"{steps}, built {release.built_at}"


if __name__ == "__main__":
    sys.exit(main())
