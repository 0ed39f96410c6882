"""What is busy while something is measured: processors, by part of the stack, and the GPU.

The GPU's share is nvidia-smi's: of the time, how much had work of any kind on it. A GPU that always has a little to do
shows as full, so beside it stand its power and what the model alone can do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import psutil

from perf.bench.services import Service

_QUERY = ("utilization.gpu", "memory.used", "power.draw")
_EVERY_MS = 200


@dataclass
class Shares:
    """Filled when the block that it was made for ends. Processors are in cores: 1.0 is one that was always busy."""

    cores: dict[str, float] = field(default_factory=dict)
    """By part of the stack: gateway, triton, preprocess, classifier, postprocess."""
    machine: float = 0.0
    """Of all processes of the machine, load generator included."""
    gpu_percent: float | None = None
    gpu_mib: float | None = None
    gpu_watts: float | None = None


def smi() -> str:
    """The path of nvidia-smi; empty where there is none."""
    return shutil.which("nvidia-smi", path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/nvidia/bin") or ""


def gpus() -> list[str]:
    """Each GPU with its memory and driver, as nvidia-smi names them."""
    query = "--query-gpu=name,memory.total,driver_version"
    run = subprocess.run(
        [smi() or "false", query, "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip().splitlines() if run.returncode == 0 else []


@contextlib.contextmanager
def watched(service: Service) -> Iterator[Shares]:
    """Look at the processes of a service, at the machine and at its first GPU, for the length of this block."""
    shares = Shares()
    with _sampled() as samples:
        before, machine, began = service.cpu_seconds(), _busy(), time.perf_counter()
        yield shares
        seconds = time.perf_counter() - began
        spent = service.cpu_seconds()
        shares.machine = (_busy() - machine) / seconds
        shares.cores = {part: (spent[part] - before.get(part, 0.0)) / seconds for part in sorted(spent)}
    means = {name: statistics.mean(values) for name, values in samples.items() if values}
    shares.gpu_percent, shares.gpu_mib, shares.gpu_watts = (means.get(name) for name in _QUERY)


def _busy() -> float:
    """Seconds that the machine's processors worked until now."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


@contextlib.contextmanager
def _sampled() -> Iterator[Mapping[str, list[float]]]:
    """nvidia-smi's figures by name, there when the block has ended; none without it."""
    samples: dict[str, list[float]] = {name: [] for name in _QUERY}
    if not (program := smi()):
        yield samples
        return
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits", "--id=0"]
    with tempfile.TemporaryFile("w+") as lines:
        process = subprocess.Popen([*command, f"--loop-ms={_EVERY_MS}"], stdout=lines, stderr=subprocess.DEVNULL)
        try:
            yield samples
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            lines.seek(0)
            for line in lines:
                values = line.split(",")
                with contextlib.suppress(ValueError):  # "[N/A]", and a line that was cut off
                    for name, value in zip(_QUERY, values, strict=True):
                        samples[name].append(float(value))
