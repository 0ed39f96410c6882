"""The Python processes of a Triton: which there are, and which of them died. And a container's health check.

Triton runs each instance of a Python step in a process of its own, a stub. One that dies stays behind as a zombie:
Triton 24.10 neither takes notice of it nor starts another one. What a zombie ran can no longer be read, so whoever
wants to know looks again and again and remembers.

Needs nothing but the standard library of Python 3.10: deploy/triton.Dockerfile copies this file into NVIDIA's image,
where it is the health check. It fails when the server does not answer, and ends a server that has dead processes, so
that the container's restart policy starts a whole one: Docker restarts nothing that is merely unhealthy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_NAME = "triton_python_backend_stub"
_COMM = _NAME[:15]
"""As the kernel cuts it."""
_SERVER = "tritonserver"


@dataclass(frozen=True)
class Process:
    """One process, told from a later one of the same number by the clock tick in which it started."""

    pid: int
    started: int


@dataclass(frozen=True)
class Seen:
    """The stubs of a server: each living one with the file of the model's version that it runs, and the dead ones.

    `ending` are those that do not say what they run: they just began, or are ending.
    """

    living: dict[Process, Path]
    dead: frozenset[Process]
    ending: frozenset[Process] = frozenset()


def look(server: int, strangers: set[int] | None = None, proc: Path = PROC) -> Seen:
    """The stubs of the server with that process id, now.

    `strangers` is kept from one look to the next: the processes that are no children of the server, and that need not
    be read again, which makes a look cheap where many processes run.
    """
    living, dead, ending = {}, set(), set()
    names = {_COMM, (_status(proc, server) or (_SERVER,))[0]}  # before it becomes a stub it has the server's
    here = {int(entry) for entry in os.listdir(proc) if entry.isdigit()}
    strangers = set() if strangers is None else strangers
    strangers &= here
    for pid in here - strangers:
        if (found := _status(proc, pid)) is None:
            continue
        name, state, parent, started = found
        if parent != server:
            strangers.add(pid)
        elif name not in names:
            continue
        elif state in "ZX":
            dead.add(Process(pid, started))
        elif model := _model(proc / str(pid)):
            living[Process(pid, started)] = model
        else:
            ending.add(Process(pid, started))
    return Seen(living, frozenset(dead), frozenset(ending))


def servers_since(proc: Path = PROC) -> list[float]:
    """When each Triton that runs on this machine began, in seconds since the epoch, right to about a tenth."""
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    found = [_status(proc, int(entry)) for entry in os.listdir(proc) if entry.isdigit()]
    ticks = os.sysconf("SC_CLK_TCK")
    return [booted + each[3] / ticks for each in found if each and each[0] == _SERVER and each[1] not in "ZX"]


def _status(proc: Path, pid: int) -> tuple[str, str, int, int] | None:
    """Name, state, parent and start of a process; None where it ended."""
    try:
        head, _, tail = (proc / str(pid) / "stat").read_text().rpartition(")")
    except OSError:
        return None
    fields = tail.split()
    return head.partition("(")[2], fields[0], int(fields[1]), int(fields[19])


def _model(process: Path) -> Path | None:
    """The first argument of a stub; None where it is not one yet, or ended."""
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return Path(os.fsdecode(arguments[1])) if arguments[0].endswith(_NAME.encode()) and len(arguments) > 1 else None


# ---- the health check of a container ----


def check(server: int, memory: Path, *, patience: float, grace: float, proc: Path = PROC) -> str:
    """Look for dead stubs, and end the server if it keeps them; returns what is wrong, or nothing.

    While a model is unloaded its processes are dead for a moment. So what counts is one that was dead `patience`
    seconds ago, as an earlier check wrote into `memory`. The server gets SIGTERM then. One that does not end within
    `grace` seconds is killed: it waits until its exit timeout for models that failed requests keep from being unloaded.
    """
    now = time.monotonic()
    # A container that is started again keeps its files and gives the same numbers to its processes.
    name = f"{server}, {(_status(proc, server) or ('', '', 0, 0))[3]}"
    before = _remembered(memory, name)
    dead = {f"{p.pid}, {p.started}": p for p in look(server, proc=proc).dead}
    since = {key: before["dead"].get(key, now) for key in dead}
    told = before["told"]
    lasting = [str(process.pid) for key, process in dead.items() if now - since[key] >= patience]
    problem = ""
    if lasting:
        problem = f"processes of Python steps died ({', '.join(lasting)}): "
        if told is None:
            problem += "the server is told to end"
            told = now
            os.kill(server, signal.SIGTERM)
        elif now - told >= grace:
            problem += "the server did not end, and is killed"
            os.kill(server, signal.SIGKILL)
        else:
            problem += "the server is ending"
    memory.write_text(json.dumps({"server": name, "dead": since, "told": told}))
    return problem


def _remembered(memory: Path, server: str) -> dict:
    """What the last check wrote, where it was about the same server."""
    nothing: dict = {"server": server, "dead": {}, "told": None}
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return nothing
    is_ours = isinstance(known, dict) and known.get("server") == server and nothing.keys() <= known.keys()
    return known if is_ours else nothing


def _server(proc: Path = PROC) -> int | None:
    """The process id of the server; None where there is none."""
    for pid in sorted(int(entry) for entry in os.listdir(proc) if entry.isdigit()):
        if (found := _status(proc, pid)) and found[0] == _SERVER and found[1] not in "ZX":
            return pid
    return None


def main() -> int:
    """Exit with 0 where the server is well, else with 1 and the reason on standard error."""
    parse = argparse.ArgumentParser(description=main.__doc__)
    parse.add_argument("--server", type=int, help="its process id (default: the process named tritonserver)")
    parse.add_argument("--url", default="http://127.0.0.1:8000/v2/health/live", help="default: %(default)s")
    parse.add_argument("--memory", type=Path, default=Path("/tmp/stubs.json"), help="default: %(default)s")  # noqa: S108
    parse.add_argument("--patience", type=float, default=3.0, help="seconds of being dead (default: %(default)s)")
    parse.add_argument("--grace", type=float, default=4.0, help="seconds for ending in order (default: %(default)s)")
    options = parse.parse_args()
    server = options.server or _server()
    if server is None:
        print("no tritonserver runs", file=sys.stderr)
        return 1
    if problem := check(server, options.memory, patience=options.patience, grace=options.grace):
        print(problem, file=sys.stderr)
        return 1
    try:
        urllib.request.urlopen(options.url, timeout=2).close()
    except OSError as error:
        print(f"the server does not answer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
