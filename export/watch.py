"""`python -m export watch`: follow what is dropped into the repository, examine it, publish it or refuse it.

A drop is a numbered folder of a step that no release pins or ever pinned. It is examined once it stopped changing,
and again whenever it changes after that; several are taken one after the other, each with the newest other steps.
Nothing is remembered but what lies in the repository, so a restart at any moment goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import contract
from export import exam, release
from export.exam import Report
from export.release import Examiner, Refused
from export.repository import Repository, RepositoryError, is_version

_EPILOG = """Writes a JSON object a line: what was seen, each check of an exam, what was published or refused and why.
Ends with SIGTERM or Ctrl-C.
"""

_RETRY_S = 30.0
"""After a failure that is not the drop's, a full disk for one."""


@dataclass(frozen=True)
class Drop:
    """A version that no release pins."""

    pipeline: str
    step: str
    number: int

    @property
    def name(self) -> str:
        """As in the repository: defect_classifier/4."""
        return f"{contract.step_model(self.pipeline, self.step)}/{self.number}"


class Watcher:
    """Looks at the repository every now and then.

    Args:
        examiner: examines and publishes.
        settle_s: for how long a drop must not change before it is examined.
        say: where events go, each a flat dictionary.
    """

    def __init__(self, examiner: Examiner, settle_s: float, say: Report) -> None:
        self.examiner = examiner
        self.settle_s = settle_s
        self._say = say
        self._seen: dict[Drop, tuple[str, float]] = {}
        self._judged: dict[Drop, str] = {}
        self._strays: set[Path] = set()
        self._last_error = ""

    @property
    def repository(self) -> Repository:
        """What is watched."""
        return self.examiner.repository

    def follow(self, seconds: float) -> None:
        """Look for ever. What goes wrong is said, and tried again."""
        while True:
            try:
                self.look()
                self._last_error = ""
            except (RepositoryError, OSError) as error:
                if str(error) != self._last_error:
                    self._event("trouble", error=str(error))
                self._last_error = str(error)
            time.sleep(seconds)

    def look(self) -> None:
        """Look once: repair, then examine every drop that has settled."""
        for pipeline in self.repository.pipelines():
            for path in self.repository.reconcile(pipeline):
                self._event("repaired", config=str(path.relative_to(self.repository.root)))
        self._name_strays()
        drops = list(self.drops())
        for gone in set(self._seen) - set(drops):
            if not self._folder(gone).exists():
                self._event("gone", drop=gone.name)
            del self._seen[gone]
            self._judged.pop(gone, None)
        for drop in drops:
            try:
                if self._has_settled(drop):
                    self._examine(drop)
            except FileNotFoundError:
                continue  # removed while it was looked at

    def drops(self) -> Iterator[Drop]:
        """The versions that no release pins, and that no retired one pinned."""
        for pipeline in self.repository.pipelines():
            for step in contract.STEPS:
                for number, retired in self.repository.unpinned(pipeline, step).items():
                    if not retired:
                        yield Drop(pipeline, step, number)

    def _has_settled(self, drop: Drop) -> bool:
        folder = self._folder(drop)
        state, now = exam.state_of(folder), time.monotonic()
        if self._judged.get(drop) == state:
            return False
        if drop not in self._seen or self._seen[drop][0] != state:
            verdict = release.verdict_of(folder)
            if verdict and verdict.seen == state:  # refused before a restart, and not changed since
                self._judged[drop] = state
                self._seen[drop] = (state, now)
                return False
            self._event("changed" if drop in self._seen else "seen", drop=drop.name)
            self._seen[drop] = (state, now)
        return "\n" in state and now - self._seen[drop][1] >= self.settle_s  # an empty folder is none yet

    def _examine(self, drop: Drop) -> None:
        self._event("examining", drop=drop.name)
        state = self._seen[drop][0]

        def report(line: str) -> None:
            if not line.startswith("... "):
                self._event("check", drop=drop.name, check=line)

        try:
            published = self.examiner.release_drop(drop.pipeline, {drop.step: drop.number}, report)
        except (Refused, RepositoryError) as error:
            self._event("refused", drop=drop.name, cause=str(error))
            self._judged[drop] = state
        except OSError as error:
            self._event("trouble", drop=drop.name, error=str(error))
            self._seen[drop] = (state, time.monotonic() + _RETRY_S)
        else:
            self._event("published", drop=drop.name, release=published.manifest.name)

    def _folder(self, drop: Drop) -> Path:
        return self.repository.step_folder(drop.pipeline, drop.step, drop.number)

    def _name_strays(self) -> None:
        """Say, once, which folders look like versions and are none."""
        models = [
            contract.step_model(pipeline, step) for pipeline in self.repository.pipelines() for step in contract.STEPS
        ]
        found = {
            path
            for model in models
            for path in (self.repository.root / model).glob("[0-9]*")
            if not is_version(path.name)
        }
        for path in sorted(found - self._strays):
            self._event("stray", path=str(path.relative_to(self.repository.root)), cause="not a plain number: ignored")
        self._strays = found

    def _event(self, event: str, **fields: str) -> None:
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._say(json.dumps({"time": at, "logger": "export.watch", "event": event, **fields}))


def main(arguments: list[str] | None = None) -> int:
    """Watch until a signal comes."""
    parse = argparse.ArgumentParser(
        prog="python -m export watch",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    release.add_options(parse)
    parse.add_argument("--settle-s", type=float, default=3.0, metavar="S", help="unchanged for this long (default: 3)")
    parse.add_argument("--every-s", type=float, default=1.0, metavar="S", help="how often to look (default: 1)")
    options = parse.parse_args(arguments)
    try:
        examiner = release.examiner_of(options)
    except (ValueError, OSError) as error:
        print(f"watch: {error}", file=sys.stderr)
        return 1
    if not options.repository.is_dir():
        print(f"watch: there is no {options.repository}", file=sys.stderr)
        return 1
    watcher = Watcher(examiner, options.settle_s, lambda line: print(line, flush=True))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind, so that an exam in progress ends too
    with contextlib.suppress(KeyboardInterrupt):
        watcher.follow(options.every_s)
    return 0
