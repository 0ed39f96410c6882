"""What to do about the Python processes of a Triton that died: a step is loaded again, or the server started again.

Pure: `Healer` is told what there is and what time it is, and says what to do. `TritonServer` does it.

Triton 24.10 starts no process in place of one that died. But where a file of a version gets a later date, it loads that
version again, with new processes, and goes on answering with what is left of the old ones meanwhile. What it
cannot do is unload a model in which a request failed that way: the dead process stays a zombie, its shared memory
stays, and so do its living siblings, which are killed here once nobody needs them. Each version is looked after on its
own: only the one whose file got the date is loaded again.

A process that is killed in its first moment, about 30 ms, makes Triton wait for it forever: it loads nothing any more,
and where it is starting it never serves. Then only another server helps. Where it is killed a little later, and until
it has loaded its step, Triton takes it for a step that cannot be loaded, and cleans up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from triton_runtime.backoff import Backoff
from triton_runtime.stubs import Process, Seen

LOOK_S = 0.2
"""Between two looks; less while something is awaited that may be there but shortly."""
_SHORT_LOOK_S = 0.05
_DEAD_S = 0.3
"""One that is unloaded is dead for a moment, too."""
_STRAY_S = 3.0
"""A process that died before it was seen, or while the server started, and that Triton did not clean up."""
_YOUNG_S = 0.5
"""A process that died so soon after it was seen may have been killed in its first moment."""
_APPEAR_S = 10.0
"""On top of two of Triton's looks at its repository."""
_MOST_MISSED = 3
"""After so many times in a row in which Triton loaded nothing, it never will. It loads one change of its repository
after the other, so a large model may be what it is busy with."""
_PROVEN_S = 60.0
"""New processes that live so long are loaded, and nobody waits for the old ones any more."""
_CALM_S = 20.0
"""A process that dies later than this after it was asked for did not fail by itself, so the next one comes at once:
its release may have no other."""
_MOST_DEAD = 64
"""Each keeps a megabyte or more of shared memory in Triton, and about 45 threads, of which a machine allows so many."""
_MANY_DEAD = 16
"""So many are too many where shared memory runs out."""


@dataclass(frozen=True)
class Say:
    """Something that whoever runs the server should know."""

    text: str


@dataclass(frozen=True)
class Reload:
    """Give this file, the one that the dead process ran, a date that Triton takes notice of."""

    file: Path


@dataclass(frozen=True)
class Kill:
    """End this process, which is left over."""

    process: Process


@dataclass(frozen=True)
class Restart:
    """Stop the server, with little patience, and start it again."""


Action = Say | Reload | Kill | Restart


@dataclass
class _Step:
    """A version that lost a process: when it is due to be loaded again, or since when its new processes are awaited."""

    backoff: Backoff = field(default_factory=lambda: Backoff(first=1, most=60, calm=_CALM_S))
    due: float | None = None
    asked: float | None = None
    file: Path = Path()
    old: frozenset[Process] = frozenset()
    has_come: bool = False
    missed: int = 0
    """How often in a row nothing came."""
    refusal: str = ""


class Healer:
    """Follows one server after the other; `look` has to be called about every `pause` seconds.

    Args:
        poll_seconds: how often Triton looks at its repository.
        grace_seconds: how long a request may take.
    """

    def __init__(self, poll_seconds: float, grace_seconds: float) -> None:
        self._appear_s = 2 * poll_seconds + _APPEAR_S
        self._proven_s = max(_PROVEN_S, grace_seconds + 5)
        self._steps: dict[Path, _Step] = {}
        self._restarts = Backoff(first=60, most=900, calm=3600)
        self._restarts_without_siblings = Backoff(first=1, most=60, calm=_CALM_S)
        self.begin()

    def begin(self) -> None:
        """Another server was started: forget its processes, and keep the counts of failures."""
        self._is_serving = False
        self._files: dict[Process, Path] = {}
        self._vanished: set[Path] = set()
        self._since: dict[Process, float] = {}
        self._dead_since: dict[Process, float] = {}
        self._settled: set[Process] = set()
        self._restart_at: float | None = None
        for step in self._steps.values():
            step.due = step.asked = None
            step.old, step.refusal, step.missed = frozenset(), "", 0

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        return _SHORT_LOOK_S if self.is_replacing or not self._is_serving else LOOK_S

    @property
    def is_replacing(self) -> bool:
        """Whether Triton loads a step again, or is about to."""
        return any(step.asked is not None for step in self._steps.values())

    @property
    def replaced(self) -> frozenset[Process]:
        """Processes that new ones take the place of. Those still running answer until the new ones have loaded."""
        return frozenset().union(*(step.old for step in self._steps.values() if step.has_come))

    def refused(self, file: Path, reason: str) -> None:
        """A `Reload` could not be done. If it was only a try, nothing follows."""
        if (step := self._steps.get(_folder(file))) and step.asked is not None:
            step.refusal = reason

    def gone(self, file: Path) -> None:
        """The file of a `Reload` is not there any more: its version was taken back, and nobody misses its processes."""
        self._settled |= {each for each in self._dead_since if self._files.get(each) == file}

    def look(self, now: float, seen: Seen, *, is_serving: bool = True, is_short: bool = False) -> list[Action]:
        """What is to be done, in this order.

        Args:
            now: by a clock that never goes back.
            seen: the server's processes.
            is_serving: whether it answers, which it does once it has tried to load all that it had at its start.
            is_short: whether there is little shared memory left.
        """
        self._remember(now, seen)
        if not self._is_serving and not is_serving:
            early = [process for process in sorted(seen.dead, key=_pid) if now - self._dead_since[process] >= _STRAY_S]
            why = f"process {_numbers(early)} died while the server started" if early else ""
            return list(self._restart(now, why, self._restarts_without_siblings))
        actions = [] if self._is_serving else list(self._load_what_vanished(seen))
        self._is_serving = True
        lost: dict[Path, list[Process]] = {}
        strays = []
        for process in sorted(seen.dead - self._settled, key=_pid):
            since = now - self._dead_since[process]
            if process in self._files:
                if since >= _DEAD_S:
                    lost.setdefault(_folder(self._files[process]), []).append(process)
            elif since >= _STRAY_S:
                strays.append(process)
        actions += [action for folder in lost for action in self._heal(now, folder, lost[folder], seen)]
        for folder, step in self._steps.items():
            if folder not in lost:
                step.due = step.asked = None  # Triton cleaned up
        backoff = self._restarts
        if strays and not any(self._has_siblings(_folder(file), seen) for file in seen.living.values()):
            backoff = self._restarts_without_siblings
        return actions + list(self._restart(now, self._why_restart(now, strays, seen, is_short), backoff))

    def _remember(self, now: float, seen: Seen) -> None:
        here = seen.dead | seen.ending | seen.living.keys()
        if not self._is_serving:
            self._vanished |= {file for process, file in self._files.items() if process not in here}
        self._since = {process: self._since.get(process, now) for process in here}
        self._files = {process: file for process, file in self._files.items() if process in here} | seen.living
        self._dead_since = {process: self._dead_since.get(process, now) for process in seen.dead}
        self._settled &= here

    def _load_what_vanished(self, seen: Seen) -> Iterator[Action]:
        """Once more what could not be loaded when the server started: somebody may have ended its processes then."""
        running = {_folder(file) for file in seen.living.values()}
        for file in sorted(file for file in self._vanished if _folder(file) not in running):
            yield Say(f"{_name(_folder(file))} lost its processes while the server started: it is to be loaded again")
            yield Reload(file)

    def _heal(self, now: float, folder: Path, lost: list[Process], seen: Seen) -> Iterator[Action]:
        step = self._steps.setdefault(folder, _Step())
        new = [process for process, file in seen.living.items() if _folder(file) == folder and process not in step.old]
        if step.asked is not None:
            if new and not step.has_come:
                step.has_come, step.missed = True, 0
                yield Say(f"{_name(folder)} is loaded again, in process {_numbers(new)}")
            if fresh := [process for process in lost if process not in step.old]:
                step.asked = None
                lost = fresh
            elif self._has_not_come(now, step) and not self._is_hopeless(folder, step, seen):
                step.missed += 1
                yield self._schedule(now, step, f"{_name(folder)} was not loaded again, and others answer")
            elif step.has_come and not new and not self._are_dying(folder, step, seen):
                yield self._schedule(now, step, f"{_name(folder)} could not be loaded, see Triton's log")
            elif step.has_come and now - step.asked >= self._proven_s:
                step.asked = None
                self._settled |= step.old
                yield from (Kill(process) for process in sorted(step.old & seen.living.keys(), key=_pid))
                return
        if step.asked is None and step.due is None:
            step.file = self._files[lost[0]]
            yield self._schedule(now, step, f"{_name(folder)} lost process {_numbers(lost)}")
        if step.due is not None and now >= step.due and not step.refusal:
            step.due, step.asked, step.has_come = None, now, False
            step.old = frozenset(process for process, file in self._files.items() if _folder(file) == folder)
            yield Reload(step.file)

    def _has_not_come(self, now: float, step: _Step) -> bool:
        return step.asked is not None and not step.has_come and now - step.asked >= self._appear_s

    def _are_dying(self, folder: Path, step: _Step, seen: Seen) -> bool:
        """Whether new processes died a moment ago, which is something else than that they could not be loaded."""
        dead = seen.dead - step.old
        return any(process in self._files and _folder(self._files[process]) == folder for process in dead)

    def _is_hopeless(self, folder: Path, step: _Step, seen: Seen) -> bool:
        """Whether to try once more is no use, or nobody else would have to pay for a restart."""
        young = [p for p in step.old & seen.dead if self._dead_since[p] - self._since[p] < _YOUNG_S]
        return bool(young) or step.missed + 1 >= _MOST_MISSED or not self._has_siblings(folder, seen)

    @staticmethod
    def _has_siblings(folder: Path, seen: Seen) -> bool:
        """Whether another version of the model runs, or another pipeline: a new server would cost their answers."""
        running = {_folder(file) for file in seen.living.values()}
        return any(
            each != folder if each.parent == folder.parent else _pipeline(each) != _pipeline(folder) for each in running
        )

    def _schedule(self, now: float, step: _Step, why: str) -> Say:
        wait = step.backoff.wait(now)
        step.asked, step.due, step.has_come = None, now + wait, False
        return Say(f"{why}: it is to be loaded again{f' in {wait:g} s' if wait else ''}")

    def _why_restart(self, now: float, strays: list[Process], seen: Seen, is_short: bool) -> str:
        """Why nothing but another server helps; empty where something else may."""
        if strays:
            return f"process {_numbers(strays)} died in its first moment, and Triton waits for it"
        if len(seen.dead) > (_MANY_DEAD if is_short else _MOST_DEAD):
            return f"it keeps the remains of {len(seen.dead)} processes that died"
        for folder, step in self._steps.items():
            if step.refusal:
                return f"{_name(folder)} cannot be loaded again ({step.refusal})"
            if self._has_not_come(now, step) and self._is_hopeless(folder, step, seen):
                times = f", {step.missed + 1} times" if step.missed else ""
                return f"it did not load {_name(folder)} again within {self._appear_s:g} s{times}"
        return ""

    def _restart(self, now: float, why: str, backoff: Backoff) -> Iterator[Action]:
        if not why:
            self._restart_at = None
        elif self._restart_at is None:
            wait = backoff.wait(now)
            self._restart_at = now + wait
            yield Say(f"{why}: the server is restarted{f' in {wait:g} s' if wait else ''}")
        if self._restart_at is not None and now >= self._restart_at:
            yield Restart()


def _pipeline(folder: Path) -> str:
    """The pipeline that a version's step belongs to."""
    return folder.parent.name.rpartition("_")[0]


def _folder(file: Path) -> Path:
    """The folder of a version, of the file that its processes run."""
    return file.parent


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _pid(process: Process) -> int:
    return process.pid


def _numbers(processes: list[Process]) -> str:
    return ", ".join(str(each.pid) for each in processes)
