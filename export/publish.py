"""`python -m export release`: examine a pipeline as a whole, and publish it where it passes.

The one way into a repository: the export of a checkpoint or an ONNX file, a version that was dropped, and the watcher
all go through `Examiner.publish`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from rich.console import Console

import contract
from contract import Manifest
from export import config, exam, graph, rights
from export.atomic import Staging
from export.candidate import Candidate
from export.exam import GOLDEN, Report, Rules, Verdict
from export.exam_worker import Check
from export.repository import Overtaken, Published, Repository, RepositoryError
from export.steps import REPOSITORY, VERDICT, Step

ROOT = Path(__file__).resolve().parent
_ATTEMPTS = 5
"""Exams of one candidate where each time another release came or went meanwhile."""

_EPILOG = """examples:
  python -m export release --classifier 4                  the dropped defect_classifier/4, with the newest other steps
  python -m export release --classifier 4 --preprocess 2   two steps that belong together
  python -m export release --classifier 4 --data photos    and is it right on labelled pictures, a folder a label?

A candidate that fails stays where it is, with the verdict in its verdict.json; Triton never sees it. --force
overrules agreement, accuracy and cost, says so loudly, and is recorded in the release.
"""


class Withdrawn(RepositoryError):
    """What was dropped is gone, or is something else now, so nobody wants to know what is wrong with it."""


class Refused(ValueError):
    """The exam was not passed; `verdict` says what failed."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.cause)
        self.verdict = verdict

    @classmethod
    def at(cls, check: str, detail: str) -> Refused:
        """Refused by one check, before any other was made."""
        return cls(Verdict(passed=False, checks=[Check(name=check, passed=False, detail=detail)]))


@dataclass(frozen=True)
class Examiner:
    """How candidates are examined and published: the same for the command, the export and the watcher."""

    repository: Repository
    serving: config.Serving
    rules: Rules
    golden: Path = GOLDEN
    data: Path | None = None
    force: bool = False

    def publish(self, candidate: Candidate, report: Report) -> Published:
        """Examine a candidate and publish it; complete what is published already.

        Raises:
            Refused: it did not pass.
            Overtaken: while it was examined, the release that it was put together with was followed or retired.
            Withdrawn: while it was examined, what was dropped was removed or changed.
            RepositoryError: the repository is not what its releases say, or the candidate does not fit it.
        """
        if self.repository.published(candidate):
            return self.repository.publish(candidate, self.serving, new=False)
        self.repository.require_fit(candidate, self.serving)
        dropped = {folder: exam.state_of(folder) for folder in self._dropped(candidate)}
        rules = self.rules.for_half() if _is_half(candidate) else self.rules
        with tempfile.TemporaryDirectory(prefix="exam-") as scratch:
            folders = {}
            for step, content in candidate.steps.items():
                number = candidate.numbers.get(step, 0)
                folders[step] = Path(scratch, contract.step_model(candidate.pipeline, step), str(number))
                folders[step].mkdir(parents=True)
                for name, data in content.files.items():
                    (folders[step] / name).write_bytes(data)
                rights.open_up(folders[step])
            subject = exam.Subject(
                folders=folders,
                current=self._current(candidate.pipeline),
                configs=self.repository.rendered(candidate, self.serving),
                labels=candidate.labels,
                golden=self.golden,
                data=self.data,
                has_own_golden=self.golden.resolve() != GOLDEN or candidate.pipeline == "defect",
            )
            outcome = exam.examine(
                subject, rules, report, force=self.force, require_wanted=lambda: self._require_as_it_was(dropped)
            )
        if not outcome.verdict.passed:
            raise Refused(outcome.verdict)
        self._require_as_it_was(dropped)
        passed = replace(
            candidate,
            evaluation={**candidate.evaluation, **outcome.verdict.evaluation},
            exam=outcome.verdict.summary(),
            golden=outcome.golden,
            tolerance=rules.tolerance,
        )
        return self.repository.publish(passed, self.serving)

    def _dropped(self, candidate: Candidate) -> list[Path]:
        """The folders of the versions that are to become part of a release; others may be dated anew meanwhile."""
        newest = self.repository.newest(candidate.pipeline)
        return [
            self.repository.step_folder(candidate.pipeline, step, number)
            for step, number in candidate.numbers.items()
            if newest is None or newest.steps[step].version != number
        ]

    def _require_as_it_was(self, dropped: Mapping[Path, str]) -> None:
        for folder, state in dropped.items():
            if not folder.is_dir() or exam.state_of(folder) != state:
                how = "changed" if folder.is_dir() else "was removed"
                raise Withdrawn(f"{folder.relative_to(self.repository.root)} {how} while it was examined")

    def publish_drop(self, pipeline: str, numbers: Mapping[str, int], report: Report) -> Published:
        """Examine dropped versions, the steps not named being those of the newest release, and publish.

        Raises:
            Refused: they did not pass; the verdict was written into each.
            RepositoryError: as for `publish`.
        """
        folders = {step: self.repository.step_folder(pipeline, step, number) for step, number in numbers.items()}
        for folder in folders.values():
            with suppress(OSError):  # the exam says what cannot be read
                rights.open_up(folder)
        seen = {step: exam.state_of(folder) for step, folder in folders.items()}
        for step, folder in folders.items():
            write_verdict(self.repository, folder, Verdict.beforehand(seen[step], verdict_of(folder)))
        try:
            published = until_current(lambda: self._publish_drop(pipeline, numbers, report), report)
        except Refused as refusal:
            for step, folder in folders.items():
                write_verdict(self.repository, folder, refusal.verdict.model_copy(update={"seen": seen[step]}))
            raise
        except BaseException:  # no verdict on the drop
            _remove_verdicts(folders.values())
            raise
        _remove_verdicts(folders.values())
        return published

    def _publish_drop(self, pipeline: str, numbers: Mapping[str, int], report: Report) -> Published:
        candidate = self._drop(pipeline, numbers)
        if known := self.repository.published(candidate):
            self._refuse_duplicate(known, numbers)
        published = self.publish(candidate, report)
        self._refuse_duplicate(published.manifest, numbers)  # the same content, published meanwhile
        return published

    @staticmethod
    def _refuse_duplicate(known: Manifest, numbers: Mapping[str, int]) -> None:
        for step, number in numbers.items():
            if known.steps[step].version != number:
                model = contract.step_model(known.pipeline, step)
                detail = f"{model}/{number} is what {model}/{known.steps[step].version} holds: {known.name} serves it"
                raise Refused.at("new", detail)

    def _drop(self, pipeline: str, numbers: Mapping[str, int]) -> Candidate:
        newest = self.repository.newest(pipeline)
        if newest is None:
            raise RepositoryError(f"{pipeline} has no release to take the other steps from: export one first")
        steps = {}
        for step in contract.STEPS:
            folder = self.repository.step_folder(pipeline, step, numbers.get(step, newest.steps[step].version))
            if problem := exam.files_problem(step, folder):
                raise Refused.at("files", problem)
            content = Step.read(folder)
            assert content is not None
            steps[step] = content
        dropped = ", ".join(f"{contract.step_model(pipeline, step)}/{n}" for step, n in sorted(numbers.items()))
        return Candidate(
            pipeline=pipeline,
            labels=newest.labels,
            size=self.repository.size(pipeline),
            steps=steps,
            built_from=dropped,
            evaluation={},
            numbers={step: numbers.get(step, newest.steps[step].version) for step in contract.STEPS},
            base=newest.name,
        )

    def _current(self, pipeline: str) -> dict[str, Path] | None:
        newest = self.repository.newest(pipeline)
        if newest is None:
            return None
        return {step: self.repository.step_folder(pipeline, step, pin.version) for step, pin in newest.steps.items()}


def _is_half(candidate: Candidate) -> bool:
    """Whether the classifier computes in half precision, however it came here."""
    try:
        return graph.uses_half(onnx.load_from_string(candidate.steps["classifier"].files["model.onnx"]))
    except (KeyError, DecodeError):
        return False  # which the exam refuses


def until_current(attempt: Callable[[], Published], report: Report) -> Published:
    """Put together, examine and publish; again, where another release came or went meanwhile.

    Raises:
        Overtaken: that happened again and again.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return attempt()
        except Overtaken as overtaken:
            report(f"AGAIN: {overtaken}; it is put together and examined again")
    return attempt()


def write_verdict(repository: Repository, folder: Path, verdict: Verdict) -> None:
    """Put the verdict into the folder that it is on, where that can be written."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with suppress(OSError), Staging.beside(repository.root) as staging:
        staging.write_file(folder / VERDICT, (json.dumps(verdict.model_dump(), indent=2) + "\n").encode())


def _remove_verdicts(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            (folder / VERDICT).unlink(missing_ok=True)


def verdict_of(folder: Path) -> Verdict | None:
    """The verdict that lies in a version's folder; None where there is none that can be read."""
    try:
        if not (folder / VERDICT).is_file():  # a pipe would be waited for
            return None
        return Verdict.model_validate_json((folder / VERDICT).read_bytes())
    except (OSError, ValueError):
        return None


def add_options(parse: argparse.ArgumentParser) -> None:
    """The options of everything that examines."""
    parse.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help="default: model_repository")
    parse.add_argument("--serving", type=Path, default=ROOT / "serving.toml", metavar="FILE", help="how Triton serves")
    parse.add_argument("--rules", type=Path, default=ROOT / "exam.toml", metavar="FILE", help="what must be shown")
    parse.add_argument("--golden", type=Path, default=GOLDEN, metavar="DIR", help="pictures to examine with")
    parse.add_argument("--data", type=Path, metavar="DIR", help="labelled pictures, a folder a label")


def examiner_of(options: argparse.Namespace) -> Examiner:
    """The examiner that the options describe.

    Raises:
        ValueError, OSError: a settings file is wrong or cannot be read.
    """
    return Examiner(
        repository=Repository(options.repository),
        serving=config.Serving.read(options.serving),
        rules=Rules.read(options.rules),
        golden=options.golden,
        data=options.data,
        force=getattr(options, "force", False),
    )


def main(arguments: list[str] | None = None) -> int:
    """Examine and publish dropped versions; 0 when they are a release, 1 when they were refused."""
    parse = argparse.ArgumentParser(
        prog="python -m export release",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for step in contract.STEPS:
        parse.add_argument(f"--{step}", type=int, metavar="N", help=f"the number of the {step} step")
    parse.add_argument("--pipeline", default="defect", metavar="NAME", help="default: defect")
    parse.add_argument("--force", action="store_true", help="overrule agreement, accuracy and cost")
    add_options(parse)
    options = parse.parse_args(arguments)
    numbers = {step: number for step in contract.STEPS if (number := getattr(options, step)) is not None}
    if not numbers:
        parse.error("name at least one step: --classifier N, --preprocess N or --postprocess N")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        published = examiner_of(options).publish_drop(options.pipeline, numbers, reporter(console))
    except Refused as refusal:
        console.print(f"refused: {refusal}", style="red", markup=False)
        return 1
    except (RepositoryError, ValueError, OSError) as error:
        console.print(f"not released: {error}", style="red", markup=False)
        return 1
    if not published.written:
        console.print(f"{published.manifest.name} is published already: nothing was examined, nothing is to be done")
    print(published.manifest.name)
    return 0


def reporter(console: Console) -> Report:
    """Shows checks as lines, and what is going on as a line that goes away."""

    def report(line: str) -> None:
        if line.startswith("... "):
            if console.is_terminal:
                console.print(line, style="dim", markup=False, end="\r")
        else:
            style = "red" if line.startswith(("NO", "FORCED")) else None
            console.print(line, style=style, markup=False)

    return report


if __name__ == "__main__":
    sys.exit(main())
