"""A load on a service, by wrk: the bodies that are sent, and what is measured."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT
from perf.analyzer import PerfError
from perf.bench.services import Service

NOTHING = float("nan")
_WARM_UP = 1
"""Seconds, as of every measurement: processes that were stopped have to get their pages and caches back."""
_REST = 0.5
"""Seconds after it: at its end wrk leaves requests behind that are still being answered."""


@dataclass(frozen=True)
class WrkLoad:
    """How many connections send one request after the other, and the form of their bodies: raw or json."""

    connections: int
    form: str

    def __str__(self) -> str:
        return f"{self.connections} connection{'s' * (self.connections > 1)}, {self.form}"


@dataclass(frozen=True)
class ContenderRun:
    """One contender in one round: answers a second, milliseconds, and processor milliseconds a request by process.

    What it does not have is not a number.
    """

    contender: str
    load: WrkLoad
    round: int
    throughput: float = NOTHING
    p50: float = NOTHING
    p99: float = NOTHING
    failed: int = 0
    cpu_ms: dict[str, float] | None = None
    memory_mib: float = NOTHING


@dataclass(frozen=True)
class Bodies:
    """Requests, as files."""

    media_type: str
    files: list[Path]

    @classmethod
    def of(cls, form: str, pictures: list[Path], folder: Path) -> Bodies:
        """The pictures as `form` sends them; what has to be written goes to `folder`."""
        if form == "raw":
            return cls("image/jpeg", pictures)
        files = [folder / f"{number}.json" for number in range(len(pictures))]
        for picture, file in zip(pictures, files, strict=True):
            file.write_text(json.dumps({"image": base64.b64encode(picture.read_bytes()).decode()}))
        return cls("application/json", files)


def wrk(service: Service, contender: str, load: WrkLoad, number: int, bodies: Bodies, seconds: int) -> ContenderRun:
    """Load a service in round `number`, after some of the same that is not counted.

    Raises:
        PerfError: wrk did not finish.
    """
    with service.awake():
        _run(service, contender, load, bodies, _WARM_UP)
        time.sleep(_REST)
        before = service.cpu_seconds()
        figures = _run(service, contender, load, bodies, seconds)
        after = service.cpu_seconds()
    requests = max(1, figures["requests"])
    return ContenderRun(
        contender,
        load,
        number,
        throughput=(figures["requests"] - figures["failed"]) / figures["seconds"],
        p50=figures["p50"],
        p99=figures["p99"],
        failed=int(figures["failed"]),
        cpu_ms={part: 1e3 * (after[part] - before[part]) / requests for part in after},
        memory_mib=service.memory_mib(),
    )


def _run(service: Service, contender: str, load: WrkLoad, bodies: Bodies, seconds: int) -> dict[str, float]:
    environment = {**os.environ, "BENCH_BODIES": ":".join(map(str, bodies.files)), "BENCH_TYPE": bodies.media_type}
    command = ["wrk", "-t1", f"-c{load.connections}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-s", str(ROOT / "perf/bench/wrk.lua"), service.url]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise PerfError(f"wrk failed on {contender}: {(run.stdout + run.stderr).strip().splitlines()[-1:]}")
    figures: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return figures
