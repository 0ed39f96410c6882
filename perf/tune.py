"""`python -m perf.tune`: which instances, threads, batches and delays serve a release best within a latency budget.

Coarse to fine: every setting is changed alone; what helped is combined, and its neighbours are tried for longer; the
best meet the present settings in a final. All of it is measured in turns with the present settings, by perf_analyzer
on an embedded Triton, and kept in perf/results/, so that a run that was interrupted goes on where it was. Settings that
are not faster in every round of the final change nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import contract
from export.config import Serving
from export.printing import wide_console
from export.repository import Repository, RepositoryError
from export.steps import digest_of
from harness import ROOT
from harness.commands import command, parser
from perf.analyzer import PerfError
from perf.steps import pictures_in
from perf.tuning import report, serving_file, space
from perf.tuning.choice import LatencyBudget, Trial, decide, ranked
from perf.tuning.journal import Journal, machine
from perf.tuning.rig import Calls, Rig
from triton_runtime.signals import Stopped

_FINALISTS = 2

_EPILOG = """examples:
  python -m perf.tune --p99-ms 250                      show what would change
  python -m perf.tune --p99-ms 250 --write              and write it into export/serving.toml
  python -m perf.tune --group 4                         four pictures a call, as the gateway sends them under load
  python -m perf.tune --vary classifier.instances=1,2,4 --vary classifier.threads=1,2
                                                        these settings only, starting from these values

After --write, 'python -m export' renders the file into the steps' config.pbtxt, and a running Triton follows.
"""


@dataclass(frozen=True)
class Stage:
    """How thoroughly a part of the search measures: rounds in turns, and seconds of each measurement."""

    name: str
    rounds: int
    seconds: float


@dataclass
class Search:
    """The search: what was tried so far, by settings (the most thorough trial of each), and in which stage."""

    rig: Rig
    journal: Journal
    present: Serving
    budget: LatencyBudget
    grid: space.Grid
    progress: Progress
    trials: dict[Serving, Trial] = field(default_factory=dict)
    stages: dict[Serving, str] = field(default_factory=dict)
    measured: int = 0
    """Trials of this run; the rest was in the journal."""

    def run(self, coarse: Stage, fine: Stage, final: Stage) -> tuple[Serving | None, str]:
        """Everything, from coarse to fine; the settings that won, if any did, and why."""
        self._try(space.coarse(self.present, self.grid), coarse)
        self._try(space.refined(self.present, self._best(), self.trials), fine)
        return decide(self._try(self._best()[:_FINALISTS], final), self.budget)

    def _best(self) -> list[Serving]:
        return [trial.serving for trial in ranked(self.trials.values(), self.budget)]

    def _try(self, settings: Sequence[Serving], stage: Stage) -> list[Trial]:
        effort = {"rounds": stage.rounds, "seconds": stage.seconds}
        task = self.progress.add_task(stage.name, total=len(settings), what="")
        for serving in settings:
            self.progress.update(task, what=report.describe(serving, self.present))
            trial = self.journal.get(serving, **effort)
            if trial is None:
                trial = self.rig.compare(serving, rounds=stage.rounds, seconds=stage.seconds)
                self.journal.add(trial, **effort)
                self.measured += 1
            self.trials[serving], self.stages[serving] = trial, stage.name
            self.progress.advance(task)
        return [self.trials[serving] for serving in settings]


@command("tune", 1, PerfError, RepositoryError, ValueError)
def main(arguments: list[str] | None = None) -> int:
    """Search, print what was found, and write it where asked; 1 where it could not be measured or was stopped."""
    options = _parser().parse_args(arguments)
    console = wide_console()
    present = Serving.read(options.serving)
    repository = Repository(options.repository)
    release = _release(repository, options)
    load = Calls(pictures_in(options.pictures), options.concurrency, options.group)
    grid = _grid(options, present, smallest_batch=repository.max_batch_size(release.name))
    conditions = {
        "release": {step: pin.digest for step, pin in release.steps.items()},
        "present": present.model_dump(),
        "machine": machine(),
        "load": [load.concurrency, load.group, digest_of((p.name, p.read_bytes()) for p in load.pictures)],
    }
    journal = Journal(options.results / "tune.jsonl", conditions, fresh=options.fresh)
    columns = [TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()]
    with (
        Rig(repository, release, present, load, options.results / "tune-triton.log") as rig,
        Progress(*columns, TextColumn("{task.fields[what]}"), console=Console(stderr=True)) as progress,
    ):
        search = Search(rig, journal, present, _budget(options), grid, progress)
        try:
            winner, why = search.run(
                Stage("coarse", min(2, options.rounds), options.seconds),
                Stage("fine", min(3, options.rounds), 2 * options.seconds),
                Stage("final", options.rounds, 2 * options.seconds),
            )
        except Stopped:
            winner, why = None, None
    _show(search, winner, options.results / "tune.svg", console)
    if why is None:
        console.print("stopped: what was measured is kept; run it again to go on")
        return 1
    console.print(why, soft_wrap=True)
    if winner:
        _apply(options, space.difference(winner, present), console)
    return 0


def _show(search: Search, winner: Serving | None, plot: Path, console: Console) -> None:
    trials = list(search.trials.values())
    shown = ranked(trials, search.budget) + [trial for trial in trials if not trial.rounds]
    console.print(report.table(shown, search.present, search.budget, search.stages))
    report.plot(shown, search.present, search.budget, winner, plot)
    console.print(f"{search.measured} trials made in this run; plot, and Triton's log: {plot.parent}", soft_wrap=True)


def _apply(options: argparse.Namespace, values: dict[str, int], console: Console) -> None:
    """Show what changes in the settings file, and change it where asked."""
    text = serving_file.edited(options.serving.read_text(), values)
    console.print(serving_file.diff(options.serving, text), markup=False, highlight=False, soft_wrap=True)
    if options.write:
        options.serving.write_text(text)
        console.print("written; 'python -m export' has Triton serve with it")
    else:
        console.print("not written: --write does")


def _budget(options: argparse.Namespace) -> LatencyBudget:
    if options.p95_ms:
        return LatencyBudget("p95", options.p95_ms)
    return LatencyBudget("p99", options.p99_ms)


def _release(repository: Repository, options: argparse.Namespace) -> contract.Manifest:
    if options.release:
        return repository.release(options.release)
    releases = repository.releases("defect")
    if not releases:
        raise ValueError(f"{options.repository} holds no release of defect: name another one with --release")
    return releases[-1]


def _grid(options: argparse.Namespace, present: Serving, smallest_batch: int) -> space.Grid:
    """The values to try: those given, or else a few of every setting.

    Raises:
        ValueError: no such setting, no such value, or a batch that published releases do not fit into.
    """
    if options.group > smallest_batch:
        raise ValueError(f"--group {options.group}: the release takes {smallest_batch} pictures a call")
    grid = {}
    for text in options.vary:
        name, _, values = text.partition("=")
        if name not in space.NAMES:
            raise ValueError(f"--vary {text}: there is {', '.join(space.NAMES)}")
        grid[name] = [int(value) for value in values.split(",")]
        for value in grid[name]:
            space.changed(present, {name: value})
    if min(grid.get("max_batch_size", [smallest_batch])) < smallest_batch:
        raise ValueError(f"max_batch_size cannot go below {smallest_batch}, which the release was published with")
    return grid or space.default_grid(present, len(os.sched_getaffinity(0)))


def _parser() -> argparse.ArgumentParser:
    parse = parser("perf.tune", __doc__, _EPILOG)
    limit = parse.add_mutually_exclusive_group()
    limit.add_argument("--p99-ms", type=float, metavar="MS", help="latency budget (default: p99 no worse than now)")
    limit.add_argument("--p95-ms", type=float, metavar="MS", help="the same for the 95th percentile")
    parse.add_argument("--concurrency", type=int, default=16, metavar="N", help="pictures in flight (default: 16)")
    parse.add_argument("--group", type=int, default=1, metavar="N", help="pictures that share a call (default: 1)")
    parse.add_argument("--vary", action="append", default=[], metavar="NAME=1,2", help="try these values only")
    parse.add_argument("--seconds", type=float, default=3.0, help="of a coarse measurement; finer ones: twice (3)")
    parse.add_argument("--rounds", type=int, default=6, metavar="N", help="of the final (default: 6)")
    parse.add_argument("--write", action="store_true", help="write what won into the settings file")
    parse.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parse.add_argument("--release", metavar="NAME", help="default: the newest of defect")
    parse.add_argument("--serving", type=Path, default=ROOT / "export/serving.toml", metavar="FILE", help="settings")
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", metavar="DIR", help="default: examples")
    parse.add_argument(
        "--results", type=Path, default=ROOT / "perf/results", metavar="DIR", help="default: perf/results"
    )
    return parse


if __name__ == "__main__":
    sys.exit(main())
