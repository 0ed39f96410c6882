"""The exam: whether a candidate pipeline may be published, decided before Triton can see it.

What runs the candidate is `export.examinee`, in a process with limits of its own. Here are the rules, the look at the
files, and the verdict.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from pydantic import BaseModel, Field

import contract
from contract.tables import Table
from export.examinee import Check, Job
from export.steps import VERDICT, Step, is_picture

ROOT = Path(__file__).resolve().parent
GOLDEN = ROOT / "golden"
"""The pictures that every exam begins with."""

_CLOCK_SLACK_S = 60
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


class Verdict(BaseModel):
    """The outcome of an exam, and the content of a refused drop's verdict file.

    `seen` is the state of the folders that were judged; a drop that changed since is examined again. `evaluation` are
    the figures that were measured.
    """

    passed: bool
    forced: bool = False
    at: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    checks: list[Check]
    evaluation: dict[str, Any] = {}
    seen: str = ""

    @property
    def cause(self) -> str:
        """What was not passed, in one line; empty where nothing was."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)

    def summary(self) -> dict[str, Any]:
        """What a release records of it."""
        return {"at": self.at, "forced": self.forced, "checks": {check.name: check.detail for check in self.checks}}


@dataclass(frozen=True)
class Subject:
    """What is examined: version folders by step, what they are held against, and what is declared of them.

    `current` are the folders of the release that this one would follow; `data` is a folder of labelled pictures, one
    folder a label.
    """

    folders: Mapping[str, Path]
    current: Mapping[str, Path] | None
    configs: Mapping[str, str]
    labels: tuple[str, ...]
    golden: Path = GOLDEN
    data: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """A verdict, and the golden answers of what was examined (none where it was refused)."""

    verdict: Verdict
    golden: tuple[contract.Golden, ...] = field(default=())


def examine(subject: Subject, rules: Rules, report: Report, *, force: bool = False) -> Outcome:
    """Hold an exam, reporting each check as it ends. `force` overrules what is a matter of judgement."""
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
    recorded = _run(_job(subject, rules), rules, add, report)
    failed = {check.name for check in checks if not check.passed}
    forced = bool(failed) and force and failed <= _FORCIBLE
    if forced:
        report(f"FORCED: published although it failed {', '.join(sorted(failed))}; the release records it")
    passed = not failed or forced
    answers = recorded.get("golden", {}) if passed else {}
    return Outcome(
        Verdict(passed=passed, forced=forced, checks=checks, evaluation=recorded.get("evaluation", {})),
        tuple(contract.Golden.from_json(name, answer) for name, answer in answers.items()),
    )


def files_problem(step: str, folder: Path) -> str:
    """Why the files of a version cannot even be looked at; empty where they can."""
    place = f"{folder.parent.name}/{folder.name}"
    try:
        if folder.is_symlink():
            return f"{place} is a link: copy what it stands for"
        paths = list(folder.iterdir())
        if not os.access(folder, os.R_OK | os.X_OK):
            raise PermissionError
        for path in paths:
            if path.is_symlink():
                return f"{place}/{path.name} is a link to {os.readlink(path)}: copy what it stands for"
            if not path.is_file():
                return f"{place}/{path.name} is no plain file: a version is a folder of files"
            if not os.access(path, os.R_OK):
                return f"{place}/{path.name} cannot be read: give the right to"
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
    except DecodeError:
        return f"{place}/model.onnx is no ONNX file, or only a part of one"
    except PermissionError:
        return f"{place} cannot be read: give the right to"
    except OSError as error:
        return f"{place} cannot be read: {error.strerror}"
    return ""


def state_of(folder: Path) -> str:
    """A version as the file system shows it: rights, names, sizes and dates. No content is read."""
    entries = [f"{folder.lstat().st_mode:o}"]
    for path in sorted(folder.rglob("*")):
        if path.name != VERDICT:
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
        min_agreement=rules.min_agreement,
        min_accuracy=rules.min_accuracy,
        max_cost=rules.max_cost,
    )


def _run(job: Job, rules: Rules, add: Callable[[Check], None], report: Report) -> dict[str, Any]:
    """Run the job in a process with limits; the check that it dies in is the one that it did not pass."""
    running, recorded = "start", {}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "export.examinee"],
            cwd=ROOT.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: _limit(rules),
        )
        assert process.stdin and process.stdout
        alarm = threading.Timer(rules.timeout_s, process.kill)
        alarm.start()
        started = time.monotonic()
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(job.model_dump_json())
                process.stdin.close()
            for line in process.stdout:
                message = json.loads(line)
                if "begin" in message:
                    running = message["begin"]
                    report(f"... {running}")
                elif "progress" in message:
                    report(f"... {message['progress']}")
                elif "check" in message:
                    add(Check.model_validate(message["check"]))
                else:
                    recorded = message["recorded"]
            status = process.wait()
        finally:
            alarm.cancel()
            process.kill()
            process.wait()
        if status:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            if time.monotonic() - started >= rules.timeout_s:
                cause = f"not done after {rules.timeout_s:g} s"
            elif status < 0:
                cause = f"the process was ended by signal {-status}"
            else:
                cause = f"the process ended with status {status}"
            add(Check(name=running, passed=False, detail=": ".join([cause, *last])))
            return {}
    return recorded


def _limit(rules: Rules) -> None:
    """In the child: memory bounded, and never ahead of a server that answers requests."""
    size = int(rules.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    seconds = int(rules.timeout_s) + 1  # should the parent be killed, it ends nevertheless
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(10)
