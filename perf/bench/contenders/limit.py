"""The limit: processes that do nothing but prepare pictures and run the model. No server, no protocol, no waiting.

`python -m perf.bench.contenders.limit --seconds 5 --batch 4 PREPROCESSING MODEL PICTURES...` prints pictures a second.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

from perf.bench.contenders.work import CORES, Work, load_preprocess

_Job = tuple[Path, Path, list[Path], int, float]
_start: Barrier
"""Of this process of a pool: where it waits until all of them have loaded the model and warmed up."""


def _initialize(start: Barrier) -> None:
    global _start
    _start = start


def _work(job: _Job) -> list[float]:
    """One process: how long each batch took, in seconds, for `seconds` after the common start."""
    preprocessing, model, paths, batch, seconds = job
    work = Work(load_preprocess(preprocessing), model)
    pictures = itertools.cycle([path.read_bytes() for path in paths])

    def step() -> float:
        began = time.perf_counter()
        work.probabilities([next(pictures) for _ in range(batch)])
        return time.perf_counter() - began

    for _ in range(3):
        step()
    _start.wait(60)
    durations, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        durations.append(step())
    return durations


def _run(
    preprocessing: Path, model: Path, pictures: list[Path], batch: int, seconds: float, processes: int
) -> list[list[float]]:
    context = get_context("spawn")
    with context.Pool(processes, _initialize, (context.Barrier(processes),)) as pool:
        jobs = [(preprocessing, model, pictures[i:] + pictures[:i], batch, seconds) for i in range(processes)]
        return pool.map(_work, jobs, chunksize=1)


def measure(
    preprocessing: Path, model: Path, pictures: list[Path], *, batch: int, seconds: float, processes: int = CORES
) -> float:
    """Pictures a second of one process a core, each preparing and running `batch` pictures at a time."""
    batches = _run(preprocessing, model, pictures, batch, seconds, processes)
    return sum(map(len, batches)) * batch / seconds


def bare(preprocessing: Path, model: Path, pictures: list[Path], *, seconds: float) -> float:
    """Median milliseconds of one picture, prepared and judged alone in one process, one after the other."""
    (durations,) = _run(preprocessing, model, pictures, 1, seconds, 1)
    return 1e3 * statistics.median(durations)


def main() -> None:
    """One measurement."""
    parse = argparse.ArgumentParser(prog="python -m perf.bench.contenders.limit", description=__doc__)
    parse.add_argument("preprocessing", type=Path, help="preprocessing.py")
    parse.add_argument("model", type=Path, help="model.onnx")
    parse.add_argument("pictures", type=Path, nargs="+")
    parse.add_argument("--batch", type=int, default=4)
    parse.add_argument("--seconds", type=float, default=5.0)
    options = parse.parse_args()
    rate = measure(options.preprocessing, options.model, options.pictures, batch=options.batch, seconds=options.seconds)
    print(f"{rate:.1f}")


if __name__ == "__main__":
    main()
