"""perf_analyzer: found, fed with real pictures, run over gRPC, and its report read.

Its wheel expects two libraries of the system that the wheel of the server carries under other names.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import contract
from triton_runtime.installation import Installation

BINARY = Path(__file__).resolve().parent.parent / ".venv-perf" / "bin" / "perf_analyzer"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


class PerfError(RuntimeError):
    """perf_analyzer is missing or failed; the message says what to do."""


@dataclass(frozen=True)
class Measurement:
    """One level of load: requests a second, and latencies in milliseconds as the client saw them."""

    concurrency: int
    throughput: float
    p50: float
    p90: float
    p95: float
    p99: float


def measure(
    release: str,
    grpc_url: str,
    pictures: Sequence[Path],
    concurrencies: Iterable[int],
    *,
    group: int = 1,
    interval_ms: int = 5000,
    binary: Path = BINARY,
    report_level: Callable[[int], None] = lambda _: None,
) -> list[Measurement]:
    """Load `release` with these pictures in turn, at each number of requests in flight, each of `group` pictures.

    Throughput counts pictures. `report_level` is told each number before its measurement.

    Raises:
        PerfError: perf_analyzer is not installed, or did not finish.
        triton_runtime.installation.Missing: the wheel of the server is not installed.
    """
    if not binary.is_file():
        raise PerfError(f"{binary} is missing: run 'make perf-tools'")
    with tempfile.TemporaryDirectory(prefix="perf-") as name:
        folder = Path(name)
        data, report = folder / "pictures.json", folder / "report.csv"
        data.write_text(json.dumps(input_data(pictures)))
        libraries = Installation.find().libraries
        for wanted, pattern in _LIBRARIES.items():
            (folder / wanted).symlink_to(next(libraries[0].glob(pattern)))
        measurements = []
        for concurrency in concurrencies:
            report_level(concurrency)
            command = [str(binary), "-m", release, "-i", "grpc", "-u", grpc_url, "-f", str(report)]
            command += [f"--input-data={data}", f"--concurrency-range={concurrency}", "--percentile=95"]
            command += ["-b", str(group)]
            # Three windows, averaged. Windows need not agree: on a shared machine they rarely do.
            command += [f"--measurement-interval={interval_ms}", "--stability-percentage=999", "--max-trials=3"]
            path = ":".join(map(str, (folder, *libraries)))
            environment = {**os.environ, "LD_LIBRARY_PATH": path}
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if run.returncode or not report.is_file():
                lines = (run.stdout + run.stderr).strip().splitlines()
                raise PerfError(f"perf_analyzer failed at concurrency {concurrency}: {' / '.join(lines[-3:])}")
            measurements += read_report(report)
            report.unlink()
    return measurements


def input_data(pictures: Sequence[Path]) -> dict[str, list]:
    """perf_analyzer's input file. A BYTES element given in base64 carries its length in front, as on the wire."""
    return {"data": [{contract.IMAGE: {"b64": _element(path.read_bytes()), "shape": [1]}} for path in pictures]}


def _element(data: bytes) -> str:
    return base64.b64encode(struct.pack("<I", len(data)) + data).decode()


def read_report(path: Path) -> list[Measurement]:
    """perf_analyzer's CSV; its times are microseconds."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        Measurement(
            concurrency=int(row["Concurrency"]),
            throughput=float(row["Inferences/Second"]),
            p50=float(row["p50 latency"]) / 1000,
            p90=float(row["p90 latency"]) / 1000,
            p95=float(row["p95 latency"]) / 1000,
            p99=float(row["p99 latency"]) / 1000,
        )
        for row in rows
    ]
