"""perf_analyzer: found, fed with real inputs, run over gRPC, and its report read.

Its wheel expects two libraries of the system that the wheel of the server carries under other names, so
`python -m perf.analyzer` runs it with these, and takes whatever perf_analyzer takes.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

import contract
from perf.load import Load
from triton_runtime.installation import Installation, Missing

BINARY = Path(__file__).resolve().parent.parent / ".venv-perf" / "bin" / "perf_analyzer"
WINDOWS = 3
"""perf_analyzer measures in windows; this many are taken together."""
LONGER = (1, 4, 16)
"""Windows are made so many times longer, where no request began and ended within one: the machine may be busy."""
_NOTHING = "larger time window"  # of what it says then
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


class PerfError(RuntimeError):
    """Something cannot be measured; the message says what to do."""


class NothingMeasured(PerfError):
    """No request was answered within a window, however long it was made; another load may be measured all the same."""


@dataclass(frozen=True)
class Measurement:
    """One level of load: requests a second, and latencies in milliseconds as the client saw them.

    `concurrency` is 0 where a rate was asked for. `seconds` is how long it was measured.
    """

    concurrency: int
    throughput: float
    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    seconds: float = 0.0


class Analyzer:
    """perf_analyzer against the Triton at `grpc_url`, with a folder of its own. Use as a context manager.

    Raises:
        PerfError: on entering, where perf_analyzer is not installed.
        triton_runtime.installation.Missing: on entering, where the wheel of the server is not installed.
    """

    def __init__(self, grpc_url: str, binary: Path = BINARY) -> None:
        self._url, self._binary = grpc_url, binary

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="perf-")
        self._folder = Path(self._temporary.name)
        try:
            self._environment = _environment(self._binary, self._folder)
        except BaseException:
            self._temporary.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def store(self, name: str, rows: Sequence[Mapping[str, np.ndarray]]) -> Path:
        """Write inputs as perf_analyzer reads them: a row a request, a tensor without its batch axis by its name."""
        path = self._folder / f"{name}.json"
        path.write_text(inputs_file(rows))
        return path

    def run(
        self, model: str, inputs: Path, load: Load, *, interval_ms: int, version: int | None = None, group: int = 1
    ) -> Measurement:
        """Load a model, or one version of it, with these inputs in turn, `group` at a time, for `WINDOWS` intervals.

        On a busy machine nothing may be answered within so short a time; then the intervals are made longer (`LONGER`).

        Raises:
            NothingMeasured: not even within the longest.
            PerfError: perf_analyzer did not finish.
        """
        report = self._folder / "report.csv"
        command = [str(self._binary), "-m", model, "-i", "grpc", "-u", self._url, "-f", str(report), "--verbose-csv"]
        command += [f"--input-data={inputs}", "--percentile=95"]
        # Windows need not agree: on a shared machine they rarely do.
        command += ["--stability-percentage=1000000", f"--max-trials={WINDOWS}"]
        command += ["-b", str(group)] if group > 1 else []
        command += ["-x", str(version)] if version else []
        if load.request_rate:
            # Asynchronous: a thread a request would let few requests wait at once.
            command += [f"--request-rate-range={load.request_rate}", "--async"]
        else:
            command += [f"--concurrency-range={load.concurrency}"]
        for longer in LONGER:
            interval = round(longer * interval_ms)
            report.unlink(missing_ok=True)  # perf_analyzer writes over nothing
            timed = [*command, f"--measurement-interval={interval}"]
            run = subprocess.run(timed, env=self._environment, capture_output=True, text=True, check=False)
            if run.returncode == 0 and report.is_file():
                return replace(read_report(report), seconds=WINDOWS * interval / 1000)
            said = run.stdout + run.stderr
            if _NOTHING not in said:
                lines = said.strip().splitlines()
                raise PerfError(f"perf_analyzer failed on {model}, {load}: {' / '.join(lines[-3:])}")
        raise NothingMeasured(f"no request was answered within {interval / 1000:g} s: lengthen --seconds")


def measure(
    release: str,
    grpc_url: str,
    pictures: Sequence[Path],
    concurrency: int,
    *,
    group: int = 1,
    interval_ms: int = 5000,
    binary: Path = BINARY,
) -> Measurement:
    """Load `release` with these pictures in turn, `concurrency` requests in flight, each of `group` pictures.

    Throughput counts pictures.

    Raises:
        PerfError: perf_analyzer is not installed, or did not finish.
        triton_runtime.installation.Missing: the wheel of the server is not installed.
    """
    with Analyzer(grpc_url, binary) as analyzer:
        rows = [{contract.IMAGE: np.array([path.read_bytes()], np.object_)} for path in pictures]
        inputs = analyzer.store("pictures", rows)
        return analyzer.run(release, inputs, Load(concurrency), interval_ms=interval_ms, group=group)


def inputs_file(rows: Sequence[Mapping[str, np.ndarray]]) -> str:
    """The text of an input file: a row a request, each a tensor without its batch axis by its name."""
    return json.dumps({"data": [{name: entry(array) for name, array in row.items()} for row in rows]})


def entry(array: np.ndarray) -> dict[str, object]:
    """A tensor in perf_analyzer's input file. BYTES elements carry their length in front, as on the wire."""
    if array.dtype == np.object_:
        data = b"".join(struct.pack("<I", len(element)) + element for element in array.reshape(-1))
    else:
        data = array.tobytes()
    return {"b64": base64.b64encode(data).decode(), "shape": list(array.shape)}


def read_report(path: Path) -> Measurement:
    """perf_analyzer's CSV of one load; its times are microseconds."""
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    return Measurement(
        concurrency=int(row.get("Concurrency", 0)),
        throughput=float(row["Inferences/Second"]),
        p50=float(row["p50 latency"]) / 1000,
        p90=float(row["p90 latency"]) / 1000,
        p95=float(row["p95 latency"]) / 1000,
        p99=float(row["p99 latency"]) / 1000,
        mean=(float(row["request/response"]) + float(row["response wait"])) / 1000,
    )


def _environment(binary: Path, folder: Path) -> dict[str, str]:
    """The environment that perf_analyzer runs in; `folder` gets the libraries by the names that it expects."""
    if not binary.is_file():
        raise PerfError(f"{binary} is missing: run 'make perf-tools'")
    installation = Installation.find()
    for wanted, pattern in _LIBRARIES.items():
        (folder / wanted).symlink_to(next(installation.libraries[0].glob(pattern)))
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{installation.library_path}"}


def main(arguments: Sequence[str]) -> int:
    """Run perf_analyzer with these arguments; its exit status, or 2 where it cannot be run."""
    model = next((after for flag, after in pairwise(arguments) if flag in ("-m", "--model-name")), "")
    has_inputs = any(argument.startswith("--input-data") for argument in arguments)
    try:
        if contract.parse_release_name(model) and not has_inputs:
            raise PerfError(
                f"without --input-data {model} would get random bytes, and refusing them is quick: "
                f"write its file with 'python -m perf --release {model} --input-only'"
            )
        with tempfile.TemporaryDirectory(prefix="perf-") as folder:
            environment = _environment(BINARY, Path(folder))
            return subprocess.run([str(BINARY), *arguments], env=environment, check=False).returncode
    except (PerfError, Missing) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
