"""The exam: whether a candidate pipeline may be published, decided before Triton can see it.

What runs the candidate is `export.exam_worker`, in a process with limits of its own. Here are the rules, the look at
the files, and the verdict.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

import contract
from contract.tables import Table
from export import bounded, rights, walk
from export.exam_worker import CHECKS, REQUIRED, Check, Job
from export.steps import VERDICT, NoModel, Step, is_hidden, is_picture

ROOT = Path(__file__).resolve().parent
GOLDEN = ROOT / "golden"
"""The pictures that every exam begins with."""

HALF_DIFFERENCE = 0.02
"""How far fp16 may move a probability from fp32's."""
_CLOCK_SLACK_S = 60
_MOST_DEATHS = 3
_MOST_DETAIL = 2000
"""Characters of a cause that a verdict keeps."""
_FORCIBLE = {"agreement", "accuracy", "cost"}
"""A matter of judgement. What fails the others would break a server or a client, so nothing overrules them."""

Report = Callable[[str], None]


class Rules(Table):
    """What a candidate must show: `export/exam.toml`. Without `max_cost`, the cost is measured and not judged."""

    min_agreement: float = Field(default=0.75, ge=0, le=1)
    min_accuracy: float = Field(default=0.7, ge=0, le=1)
    max_cost: float | None = Field(default=2.0, gt=0)
    tolerance: float = Field(default=0.005, gt=0, lt=0.5)
    timeout_s: float = Field(default=300, gt=0)
    memory_gib: float = Field(default=8, gt=0)
    nice: int = Field(default=10, ge=0, le=19)

    def for_half(self) -> Rules:
        """The rules for fp16: processor time says nothing about a GPU, where rounding also goes another way."""
        return self.model_copy(update={"max_cost": None, "tolerance": max(self.tolerance, HALF_DIFFERENCE)})


class Verdict(BaseModel):
    """The outcome of an exam, and the content of a refused drop's verdict file.

    `seen` is the state of the folders that were judged; a drop that changed since is examined again. `evaluation` are
    the figures that were measured. `deaths` counts the examiners in a row that did not live to write a verdict.
    """

    passed: bool
    forced: bool = False
    at: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    checks: list[Check]
    evaluation: dict[str, Any] = {}
    seen: str = ""
    deaths: int = 0

    @classmethod
    def beforehand(cls, seen: str, last: Verdict | None) -> Verdict:
        """What holds if this examiner dies in the exam that it begins now. `last` is the verdict that lies there."""
        deaths = last.deaths + 1 if last and last.seen == seen else 1
        times = "once" if deaths == 1 else f"{deaths} times"
        detail = f"its exam began {times} and has not ended: change the drop, or remove {VERDICT} to try again"
        return cls(passed=False, checks=[Check(name="exam", passed=False, detail=detail)], seen=seen, deaths=deaths)

    @property
    def is_open(self) -> bool:
        """Whether an examiner should try again: machines are restarted, but a drop may kill whoever examines it."""
        return 0 < self.deaths < _MOST_DEATHS

    @property
    def cause(self) -> str:
        """What was not passed, in one line; empty where nothing was."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)

    def summary(self) -> dict[str, Any]:
        """What a release records of it."""
        return {"at": self.at, "forced": self.forced, "checks": {check.name: check.detail for check in self.checks}}


class Recorded(BaseModel):
    """What the worker measured: the golden answers as of `contract.Golden.to_json`, by picture, and figures."""

    golden: dict[str, dict[str, Any]] = {}
    evaluation: dict[str, Any] = {}


class _Message(BaseModel):
    """A line of the worker: one of these."""

    begin: str | None = None
    progress: str | None = None
    check: Check | None = None
    recorded: Recorded | None = None


@dataclass(frozen=True)
class Subject:
    """What is examined: version folders by step, what they are held against, and what is declared of them.

    `current` are the folders of the release that this one would follow; `data` is a folder of labelled pictures, one
    folder a label. Without `has_own_golden`, the golden pictures are of another kind and say nothing about agreement.
    """

    folders: Mapping[str, Path]
    current: Mapping[str, Path] | None
    configs: Mapping[str, str]
    labels: tuple[str, ...]
    golden: Path = GOLDEN
    data: Path | None = None
    has_own_golden: bool = True


@dataclass(frozen=True)
class Outcome:
    """A verdict, and the golden answers of what was examined (none where it was refused)."""

    verdict: Verdict
    golden: tuple[contract.Golden, ...] = field(default=())


def examine(
    subject: Subject,
    rules: Rules,
    report: Report,
    *,
    force: bool = False,
    require_wanted: Callable[[], None] = lambda: None,
) -> Outcome:
    """Hold an exam, reporting each check as it ends. `force` overrules what is a matter of judgement.

    `require_wanted` is called now and then; what it raises ends the exam without a verdict.
    """
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        report(f"{'ok' if check.passed else 'NO':3} {check.name}: {check.detail}")

    for step, folder in subject.folders.items():
        if problem := files_problem(step, folder):
            add(Check(name="files", passed=False, detail=problem))
    if checks:
        return Outcome(Verdict(passed=False, checks=checks))
    add(Check(name="files", passed=True, detail="complete, plain and readable"))
    recorded = _run(_job(subject, rules), rules, add, report, require_wanted)
    failed = {check.name for check in checks if not check.passed}
    # Without a record the process did not end in order, whichever check it was in.
    forced = bool(failed) and force and failed <= _FORCIBLE and bool(recorded.golden)
    if forced:
        report(f"FORCED: published although it failed {', '.join(sorted(failed))}; the release records it")
    passed = not failed or forced
    answers = recorded.golden if passed else {}
    return Outcome(
        Verdict(passed=passed, forced=forced, checks=checks, evaluation=recorded.evaluation),
        tuple(contract.Golden.from_json(name, answer) for name, answer in answers.items()),
    )


def files_problem(step: str, folder: Path) -> str:
    """Why the files of a version cannot even be looked at; empty where they can."""
    place = f"{folder.parent.name}/{folder.name}"
    try:
        if folder.is_symlink():
            return f"{place} is a link: copy what it stands for"
        if rights.is_closed(folder):
            return f"{place}: {rights.WHY}: {rights.remedy(folder)}"
        paths = [path for path in folder.iterdir() if not is_hidden(path.name)]
        for path in paths:
            if not _is_text(path.name):
                return f"{place} holds a file whose name is no text (UTF-8): {os.fsencode(path.name)!r}"
            if path.is_symlink():
                return f"{place}/{path.name} is a link to {os.readlink(path)}: copy what it stands for"
            if not path.is_file():
                return f"{place}/{path.name} is no plain file: a version is a folder of files"
            if rights.is_closed(path):
                return f"{place}/{path.name}: {rights.WHY}: {rights.remedy(folder)}"
            if path.stat().st_mtime > time.time() + _CLOCK_SLACK_S:
                return f"{place}/{path.name} is dated in the future, so Triton would not see later changes: touch it"
            if path.stat().st_size == 0 and path.name == "model.onnx":
                return f"{place}/{path.name} is empty"
        names = {path.name for path in paths} - {VERDICT}
        wanted = "model.onnx" if step == "classifier" else "model.py"
        if wanted not in names:
            return f"{place} has no {wanted}; it holds {', '.join(sorted(names)) or 'nothing'}"
        if step == "classifier" and names != {wanted}:
            return f"{place} holds {', '.join(sorted(names - {wanted}))} beside {wanted}: keep everything in that file"
        if Step.read(folder) is None:
            return f"{place} holds nothing"
    except NoModel as error:
        return f"{place}/{error}"
    except PermissionError:
        return f"{place}: {rights.WHY}: {rights.remedy(folder)}"
    except OSError as error:
        return f"{place} cannot be read: {error.strerror}"
    return ""


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def state_of(folder: Path) -> str:
    """A version as the file system shows it: rights, names, sizes, dates. No content is read; nothing hidden counts."""
    if folder.is_symlink():
        return f"a link\nto {os.readlink(folder)}"  # through which it could be a whole file system
    entries = [f"{folder.lstat().st_mode:o}"]
    for path in sorted(walk.below(folder)):
        if path.name != VERDICT and not any(map(is_hidden, path.relative_to(folder).parts)):
            with suppress(OSError):
                entry = path.lstat()
                entries.append(f"{path.relative_to(folder)} {entry.st_size} {entry.st_mtime_ns} {entry.st_mode:o}")
    return "\n".join(entries)


def _job(subject: Subject, rules: Rules) -> Job:
    labelled = {}
    if subject.data:
        for label in subject.labels:
            labelled[label] = sorted(path for path in (subject.data / label).glob("*") if is_picture(path))
            if not labelled[label]:
                raise ValueError(f"{subject.data} has no pictures under {label}: expected a folder a label")
    pictures = sorted(path for path in subject.golden.glob("*") if is_picture(path))
    if not pictures:
        raise ValueError(f"{subject.golden} has no golden pictures: an exam needs some")
    return Job(
        candidate=dict(subject.folders),
        current=dict(subject.current) if subject.current else None,
        configs=dict(subject.configs),
        labels=list(subject.labels),
        pictures=pictures,
        labelled=labelled,
        has_own_golden=subject.has_own_golden,
        min_agreement=rules.min_agreement,
        min_accuracy=rules.min_accuracy,
        max_cost=rules.max_cost,
    )


class _Protocol:
    """Takes what the worker writes, line by line. It is believed as long as it keeps to the order of `CHECKS`."""

    def __init__(self, job: Job, add: Callable[[Check], None], report: Report) -> None:
        self._add, self._report = add, report
        self._pictures = {path.name for path in job.pictures}
        self._left = list(CHECKS)
        self._begun = False
        self._is_over = False
        self.running = "start"
        self.recorded: Recorded | None = None

    @property
    def lacking(self) -> str:
        """What a worker that ended in order should have said and did not."""
        if self._is_over or self.recorded:
            return ""
        return f"without a word on {self._left[0]}" if self._left else "without a record of its answers"

    def take(self, line: bytes) -> str:
        """One line; returns what is wrong with it."""
        try:
            message = _Message.model_validate_json(line)
            if message.progress is not None:
                self._report(f"... {message.progress[:_MOST_DETAIL]}")
            elif message.begin is not None:
                self._begin(message.begin)
            elif message.check is not None:
                self._end(message.check)
            elif message.recorded is not None:
                self._record(message.recorded)
            else:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = line[:80].decode(errors="replace")
            return f"the process wrote what the exam does not ask for: {text!r}"
        return ""

    def _begin(self, name: str) -> None:
        if self._begun or self._is_over or self._left[:1] != [name]:
            raise ValueError(name)
        self._begun, self.running = True, name
        self._report(f"... {name}")

    def _end(self, check: Check) -> None:
        if not self._begun or self._left[0] != check.name:
            raise ValueError(check.name)
        self._begun = False
        del self._left[0]
        self._is_over = not check.passed and check.name in REQUIRED
        self._add(check.model_copy(update={"detail": check.detail[:_MOST_DETAIL]}))

    def _record(self, recorded: Recorded) -> None:
        if self._left or self.recorded or set(recorded.golden) != self._pictures:
            raise ValueError("recorded")
        for name, answer in recorded.golden.items():
            contract.Golden.from_json(name, answer)
        self.recorded = recorded


def _run(
    job: Job, rules: Rules, add: Callable[[Check], None], report: Report, require_wanted: Callable[[], None]
) -> Recorded:
    """Run the job in a process with limits; the check that it dies in is the one that it did not pass."""
    protocol = _Protocol(job, add, report)
    ending = bounded.run(
        [sys.executable, "-m", "export.exam_worker"],
        job.model_dump_json().encode(),
        rules.timeout_s,
        protocol.take,
        folder=ROOT.parent,
        environment={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        limit=lambda: _limit(rules),
        check=require_wanted,
    )
    if ending.stopped:
        cause = ending.stopped
    elif ending.status is None:
        cause = f"not done after {rules.timeout_s:g} s"
    elif ending.status < 0:
        cause = f"the process was ended by signal {-ending.status}"
    elif ending.status:
        cause = f"the process ended with status {ending.status}"
    elif protocol.lacking:
        cause = f"the process ended {protocol.lacking}"
    else:
        return protocol.recorded or Recorded()
    add(Check(name=protocol.running, passed=False, detail=": ".join(filter(None, [cause, ending.last[:_MOST_DETAIL]]))))
    return Recorded()


def _limit(rules: Rules) -> None:
    """In the child: memory bounded, and never ahead of a server that answers requests."""
    seconds = int(rules.timeout_s) + 1  # ends what is left if the parent is killed, once it computes
    for limit, wanted in (
        (resource.RLIMIT_AS, int(rules.memory_gib * 2**30)),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(limit)[1]  # of the shell that we come from, which cannot be raised
        wanted = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(limit, (wanted, wanted))
    os.nice(rules.nice)
