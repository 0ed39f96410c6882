"""`python -m export watch`: follow what is dropped into the repository, examine it, publish it or refuse it.

A drop is a numbered folder of a step that no release pins or ever pinned. It is examined once it stopped changing,
and again whenever it changes after that; several are taken one after the other, each with the newest other steps.
Nothing is remembered but what lies in the repository, so a restart at any moment goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn

import contract
from export import exam, links, publish, rights
from export.exam import Report
from export.publish import Examiner, Refused, Withdrawn
from export.repository import BARE, Repository, bare_folders, is_version, told

_EPILOG = """Writes a JSON object a line: what was seen, each check of an exam, what was published or refused and why.
Ends with SIGTERM or Ctrl-C.
"""

_RETRY_S = 30.0
"""After a failure that is no verdict on the drop, a full disk for one."""

_EXAM = "exam"


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
        say: takes each event, a line of JSON.
    """

    def __init__(self, examiner: Examiner, settle_s: float, say: Report) -> None:
        self.examiner = examiner
        self.settle_s = settle_s
        self._say = say
        self._seen: dict[Drop, tuple[str, float]] = {}
        self._judged: dict[Drop, str] = {}
        self._strays: set[Path] = set()
        self._bare: dict[Path, bool] = {}
        """Folders without a configuration, and whether that was said."""
        self._troubles: dict[str, str] = {}
        self._is_stopped = False

    @property
    def repository(self) -> Repository:
        """What is watched."""
        return self.examiner.repository

    def follow(self, seconds: float) -> None:
        """Look again and again, until it is told to stop."""
        while not self._is_stopped:
            self.look()
            time.sleep(seconds)

    def stop(self, *_: object) -> NoReturn:
        """Handle a signal: unwind, so that an exam in progress ends too.

        What is raised may land where exceptions are dropped, as in a destructor; then the loop ends nevertheless.
        """
        self._is_stopped = True
        raise KeyboardInterrupt

    def look(self) -> None:
        """Look once: repair, then examine every drop that has settled.

        Whatever goes wrong with a pipeline or a drop is said, once, tried again, and in nobody else's way.

        Raises:
            SystemExit: nobody takes what is said any more.
        """
        pipelines: list[str] | None = None
        with self._minding("repository"):
            pipelines = self.repository.pipelines()
        if pipelines is None:
            return
        with self._minding("folders"):
            self._name_bare_folders()
        with self._minding("links"):  # before anything walks through the repository
            cleared = links.clear(self.repository)
            for folder, verdict in cleared.refused.items():
                self._event("refused", drop=self._place(folder), cause=verdict.cause)
            for path, target in cleared.removed.items():
                how = f"the link to {target} is removed: {links.WHY}"
                self._event("repaired", path=self._place(path), how=how)
        for drop in [drop for drop in self._seen if drop.pipeline not in pipelines]:
            self._forget(drop)
        for pipeline in pipelines:
            with self._minding("repair", pipeline=pipeline):
                for path, how in self.repository.reconcile(pipeline).items():
                    self._event("repaired", path=self._place(path), how=how)
            with self._minding("state", pipeline=pipeline):
                self.repository.require_servable(pipeline)
            with self._minding("strays", pipeline=pipeline):
                self._name_strays(pipeline)
            with self._minding("drops", pipeline=pipeline):
                self._look_at_drops(pipeline)

    def _look_at_drops(self, pipeline: str) -> None:
        drops = list(self.drops(pipeline))
        for drop in [drop for drop in self._seen if drop.pipeline == pipeline and drop not in drops]:
            self._forget(drop)
        for drop in drops:
            settled = False
            with self._minding("look", drop=drop.name), contextlib.suppress(FileNotFoundError):  # just removed
                settled = self._has_settled(drop)
            if settled:
                with self._minding(_EXAM, drop=drop.name):
                    self._examine(drop)

    def _forget(self, drop: Drop) -> None:
        if not self._folder(drop).exists():
            self._event("gone", drop=drop.name)
        del self._seen[drop]
        self._judged.pop(drop, None)
        self._troubles.pop(self._key(_EXAM, drop.name), None)

    @staticmethod
    def _key(task: str, *what: str) -> str:
        return " ".join((task, *what))

    @contextlib.contextmanager
    def _minding(self, task: str, **what: str) -> Iterator[None]:
        """Say what goes wrong in here, once for as long as it does."""
        key = self._key(task, *what.values())
        try:
            yield
        except Exception as error:  # whatever it is: the others are not to suffer
            text = told(error)
            if self._troubles.get(key) != text:
                self._troubles[key] = text
                self._event("trouble", **what, error=text)
        else:
            self._troubles.pop(key, None)

    def drops(self, pipeline: str) -> Iterator[Drop]:
        """The versions of a pipeline that no release pins, and that none ever pinned as they are."""
        for step in contract.STEPS:
            for number, owners in self.repository.unpinned(pipeline, step).items():
                if not owners:
                    yield Drop(pipeline, step, number)

    def _has_settled(self, drop: Drop) -> bool:
        folder = self._folder(drop)
        state, now = exam.state_of(folder), time.monotonic()
        if self._judged.get(drop) == state:
            return False
        if drop not in self._seen or self._seen[drop][0] != state:
            verdict = publish.verdict_of(folder)
            if verdict and verdict.seen == state and not verdict.is_open:  # since before a restart
                if verdict.deaths:  # nobody lived to say it
                    self._event("refused", drop=drop.name, cause=verdict.cause)
                self._judged[drop] = state
                self._seen[drop] = (state, now)
                return False
            self._event("changed" if drop in self._seen else "seen", drop=drop.name)
            self._troubles.pop(self._key(_EXAM, drop.name), None)
            self._seen[drop] = (state, now)
        return "\n" in state and now - self._seen[drop][1] >= self.settle_s  # an empty folder is none yet

    def _examine(self, drop: Drop) -> None:
        folder = self._folder(drop)
        with contextlib.suppress(OSError):  # the exam says what cannot be read
            for path in rights.open_up(folder):
                self._event("repaired", path=self._place(path), how="everybody may read it now")
        state = exam.state_of(folder)
        again = self._key(_EXAM, drop.name) in self._troubles
        if not again:
            self._event("examining", drop=drop.name)

        def report(line: str) -> None:
            if not again and not line.startswith("... "):
                self._event("check", drop=drop.name, check=line)

        # Tried again after a while, unless something else happens to it: a full disk is not the drop's fault.
        self._seen[drop] = (state, time.monotonic() + _RETRY_S)
        try:
            published = self.examiner.publish_drop(drop.pipeline, {drop.step: drop.number}, report)
        except Withdrawn:
            pass  # which the next look says
        except Refused as refusal:
            self._event("refused", drop=drop.name, cause=str(refusal))
            self._judged[drop] = state
        else:
            self._event("published", drop=drop.name, release=published.manifest.name)

    def _folder(self, drop: Drop) -> Path:
        return self.repository.step_folder(drop.pipeline, drop.step, drop.number)

    def _place(self, path: Path) -> str:
        return str(path.relative_to(self.repository.root))

    def _name_strays(self, pipeline: str) -> None:
        """Say, once, which folders look like versions and are none."""
        models = {contract.step_model(pipeline, step) for step in contract.STEPS}
        found = {
            path
            for model in models
            for path in (self.repository.root / model).glob("[0-9]*")
            if not is_version(path.name)
        }
        for path in sorted(found - self._strays):
            cause = "its name is no plain number: nobody examines it, but Triton may take it for a version: move it out"
            self._event("stray", path=self._place(path), cause=cause)
        self._strays = {path for path in self._strays if path.parent.name not in models} | found

    def _name_bare_folders(self) -> None:
        """Say, once, which folders are no models for Triton. One that is being copied here has until the next look."""
        bare = bare_folders(self.repository.root)
        for path in bare:
            if self._bare.get(path) is False:
                self._event("stray", path=self._place(path), cause=f"{BARE}: move it out")
        self._bare = {path: path in self._bare for path in bare}

    def _event(self, event: str, **fields: str) -> None:
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": at, "logger": "export.watch", "event": event, **fields})
        try:
            self._say(line)
        except (OSError, ValueError) as error:  # a closed pipe, a closed file
            raise SystemExit(f"watch: cannot say what happens: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Watch until a signal comes."""
    parse = argparse.ArgumentParser(
        prog="python -m export watch",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    publish.add_options(parse)
    parse.add_argument("--settle-s", type=float, default=3.0, metavar="S", help="unchanged for this long (default: 3)")
    parse.add_argument("--every-s", type=float, default=1.0, metavar="S", help="how often to look (default: 1)")
    options = parse.parse_args(arguments)
    try:
        examiner = publish.examiner_of(options)
    except (ValueError, OSError) as error:
        print(f"watch: {error}", file=sys.stderr)
        return 1
    if not options.repository.is_dir():
        print(f"watch: there is no {options.repository}", file=sys.stderr)
        return 1
    watcher = Watcher(examiner, options.settle_s, lambda line: print(line, flush=True))
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, watcher.stop)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            watcher.follow(options.every_s)
        except SystemExit:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left of it
            raise
    return 0
