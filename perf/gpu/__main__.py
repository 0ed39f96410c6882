"""`python -m perf.gpu` (`make gpu-check`): serve on a GPU, compare its answers, and find what it waits for.

Exports fp32 and fp16, runs the model alone, and the whole service with both on the GPU and on the processor, with more
and fewer preprocessing processes, and with more than one instance of the model. Needs no network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from contract import Manifest
from export.printing import wide_console
from export.repository import Repository
from harness import ROOT
from harness.commands import parser
from perf import machine
from perf.analyzer import BINARY, PerfError
from perf.gpu import bare, report
from perf.gpu.shares import gpus
from perf.gpu.stack import Row, Running, Setting, largest_difference, pixels, running
from triton_runtime.installation import Missing
from triton_runtime.server import TritonFailed
from triton_runtime.signals import Stopped, unwind_on_signals

_CORES = len(os.sched_getaffinity(0))
_PICTURES = 64
_EPILOG = """exit status
  0  everything was measured
  1  something was not: it is listed with its reason, and the rest is there
  2  nothing was: there is no GPU that ONNX Runtime can use (--without-gpu goes on), or no release

Without make and network, with the packages of requirements/gpu.lock in an environment that was brought along:
  ENVIRONMENT/bin/python -m perf.gpu
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the JSON after each measurement, print the tables; the exit status is in `_EPILOG`."""
    options = _parser().parse_args(arguments)
    unwind_on_signals()
    if (lack := _lacks_gpu()) and not options.without_gpu:
        print(f"gpu-check: {lack}; --without-gpu tries everything else, on the processor", file=sys.stderr)
        return 2
    check = Check(options)
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            check.run(Path(folder, "model_repository"))
    except (PerfError, OSError) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    except Stopped:
        check.fail("the rest", "it was stopped")
    check.show()
    return int(bool(check.results.failed))


def _parser() -> argparse.ArgumentParser:
    parse = parser("perf.gpu", __doc__, _EPILOG)
    several = partial(parse.add_argument, type=int, nargs="*", metavar="N")
    parse.add_argument("--without-gpu", action="store_true", help="run all of it on the processor, to try this script")
    parse.add_argument("--precisions", nargs="+", choices=["fp32", "fp16"], default=["fp32", "fp16"])
    several("--in-flight", default=[1, 16, 64, 256], help="default: 1 16 64 256")
    several("--on-processor", default=[16, 64], help="there, none: not at all (default: 16 64)")
    several("--preprocess", default=[2, 4, 8, 12], help="processes (default: 2 4 8 12)")
    several("--instances", default=[1, 2], help="of the model on a GPU (default: 1 2)")
    several("--batches", default=[1, 8, 16, 32], help="of the model alone (default: 1 8 16 32)")
    parse.add_argument("--seconds", type=float, default=3.0, help="of one measurement (default: 3)")
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", help="folder of JPEGs (default: examples)")
    parse.add_argument("--perf-analyzer", type=Path, default=_analyzer(), help="default: .venv-perf, or beside Python")
    parse.add_argument("--out", type=Path, default=ROOT / "perf/results", help="folder (default: perf/results)")
    return parse


def _analyzer() -> Path:
    return BINARY if BINARY.is_file() else Path(sys.executable).with_name("perf_analyzer")


def _lacks_gpu() -> str:
    """Why nothing can run on a GPU here; empty where something can."""
    if bare.CUDA not in onnxruntime.get_available_providers():
        return f"ONNX Runtime {onnxruntime.__version__} in {sys.prefix} has no CUDA: install requirements/gpu.lock"
    return "" if gpus() else "there is no NVIDIA GPU here: nvidia-smi names none"


class Check:
    """One run of everything. What fails is written down, and the next is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._gpu = "cpu" if options.without_gpu else "gpu"
        self._preprocess = max([number for number in options.preprocess if number <= _CORES] or [1])
        """Processes of preprocessing where their number is not what is looked at."""
        self._began = time.monotonic()
        self._pictures = sorted(options.pictures.rglob("*.jpg"))[:_PICTURES]
        self._golden = sorted(path for path in (ROOT / "export" / "golden").iterdir() if path.is_file())
        self._answers: dict[str, dict[str, dict[str, float]]] = {}
        self._log = options.out / "gpu-check-triton.log"
        self.results = report.GpuResults(
            machine={**machine.facts(), "ONNX Runtime": onnxruntime.__version__}, gpus=gpus()
        )

    def run(self, root: Path) -> None:
        """Measure everything, on a copy of the repository at `root`.

        Raises:
            PerfError: there is nothing to measure.
        """
        if not self._pictures:
            raise PerfError(f"{self._options.pictures} holds no JPEGs")
        self._options.out.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)
        releases = self._export(root)
        self._repository = Repository(root)
        for precision, release in releases.items():
            self._alone(precision, release)
        for precision, release in releases.items():
            self._served(precision, release)
        last = list(releases)[-1]
        self._sweep(last, releases[last])
        self._compare()

    def _export(self, root: Path) -> dict[str, Manifest]:
        """A release of each precision, the first of which has to be there."""
        shutil.copytree(self._options.repository, root)
        found: dict[str, Manifest] = {}
        for precision in self._options.precisions:
            with self._attempt(f"export {precision}"):
                command = [sys.executable, "-m", "export", "--repository", str(root), "--precision", precision]
                run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise PerfError(run.stderr.strip()[-800:])
                name = run.stdout.split()[-1]
                found[precision] = next(each for each in Repository(root).releases("defect") if each.name == name)
        if not found:
            raise PerfError(f"nothing could be exported: {self.results.failed}")
        return found

    def _alone(self, precision: str, release: Manifest) -> None:
        """The model in ONNX Runtime, where it is judged by the same pixels on both devices."""
        options = self._options
        model = self._repository.step_folder("defect", "classifier", release.steps["classifier"].version) / "model.onnx"
        with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
            file = Path(folder, "pixels.npy")
            np.save(file, pixels(self._repository, release, self._golden))
            kinds = [
                ("cpu", False),
                *([("gpu", False)] + [("gpu", True)] * (precision == "fp32")) * (self._gpu == "gpu"),
            ]
            for device, tf32 in kinds:
                name = f"{precision}{' as TF32' * tf32} on {device}"
                with self._attempt(f"the model alone, {name}"):
                    batches = options.batches if device == self._gpu else options.batches[-1:]
                    seconds = min(1.0, options.seconds)
                    found = bare.measure(model, file, device=device, batches=batches, seconds=seconds, tf32=tf32)
                    self.results.bare[name] = found.rates
                    rows = zip(self._golden, found.probabilities.tolist(), strict=True)
                    self._answers[f"the model alone, {name}"] = {
                        path.name: {str(i): value for i, value in enumerate(row)} for path, row in rows
                    }

    def _served(self, precision: str, release: Manifest) -> None:
        """The whole service, on the GPU and on the processor; what is asked for first leaves the choice to Triton."""
        options = self._options
        first = next(iter(options.precisions))
        loads = [(self._gpu, options.in_flight)]
        if self._gpu == "gpu" and precision == first and options.on_processor:
            loads.append(("cpu", options.on_processor))
        for device, levels in loads:
            asked = "auto" if device == "gpu" and precision == first else device
            with self._running(Setting(precision, asked, self._preprocess, threads=_CORES), release) as stack:
                if stack is None:
                    continue
                with self._attempt(f"golden pictures, {precision} on {device}"):
                    self._answers[f"the service, {precision} on {device}"] = stack.answers(self._golden)
                for number in levels:
                    self._measure(f"{precision} on {device}, {number} in flight", stack.over_http, number)

    def _sweep(self, precision: str, release: Manifest) -> None:
        """How many processes feed the GPU, over gRPC so that the gateway is no limit; then more instances on it."""
        options = self._options
        numbers = [(number, options.instances[0]) for number in options.preprocess] if options.instances else []
        numbers += [(self._preprocess, instances) for instances in options.instances[1:]]
        for preprocess, instances in numbers:
            setting = Setting(precision, self._gpu, preprocess, instances, threads=_CORES)
            with self._running(setting, release) as stack:
                if stack is None:
                    continue
                self._measure(f"{setting}, ensemble", stack.over_grpc, "ensemble", 2 * preprocess)
                if preprocess == self._preprocess:
                    self._measure(f"{setting}, whole", stack.over_http, max(options.in_flight or [1]))
                    self._measure(f"{setting}, classifier", stack.over_grpc, "classifier", 2 + 2 * instances)

    def _compare(self) -> None:
        """The GPU's answers with the processor's, of the same precision and of the first one."""
        for name, answers in self._answers.items():
            place, _, what = name.partition(", ")
            precision = what.split()[0]
            for other in dict.fromkeys((precision, "fp32")):
                base = f"{place}, {other} on cpu"
                if base != name and base in self._answers:
                    self.results.differences[f"{name} - {other} on cpu"] = largest_difference(
                        answers, self._answers[base]
                    )
        self._save()

    @contextmanager
    def _running(self, setting: Setting, release: Manifest) -> Iterator[Running | None]:
        """The service with this setting; None where it does not start, which is written down."""
        options = self._options
        context = running(
            setting,
            self._repository,
            release,
            self._pictures,
            seconds=options.seconds,
            analyzer=options.perf_analyzer,
            log=self._log,
        )
        try:
            stack = context.__enter__()
        except (TritonFailed, Missing, PerfError, OSError) as error:
            self.fail(f"serving {setting}", str(error))
            yield None
            return
        self._note_where(setting)
        try:
            yield stack
        finally:
            context.__exit__(None, None, None)

    def _note_where(self, setting: Setting) -> None:
        """What the classifier said of where it runs, and whether that is where it should."""
        own = self._log.read_text(errors="replace").rpartition("--- ")[2]
        said = [line.partition(": ")[2] for line in own.splitlines() if "_classifier " in line and ": on " in line]
        self.results.where[str(setting)] = said
        if setting.device != "cpu" and not any(line.startswith("on GPU") for line in said):
            self.fail(f"serving {setting} on the GPU", f"it says {said or 'nothing'}: see {self._log}")

    def _measure(self, name: str, measure: Callable[..., Row], *load: object) -> None:
        with self._attempt(name):
            self.results.rows.append(measure(*load))

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """What fails in this block is written down, and costs the rest nothing."""
        print(f"{time.monotonic() - self._began:5.0f} s  {name}", file=sys.stderr, flush=True)
        try:
            yield
        except Exception as error:  # whatever it is: a machine is seldom at hand twice
            self.fail(name, f"{type(error).__name__}: {error}")
        self._save()

    def fail(self, name: str, reason: str) -> None:
        """Write down that something was not measured."""
        print(f"gpu-check: {name}: {reason}", file=sys.stderr, flush=True)
        self.results.failed[name] = reason

    def _save(self) -> None:
        self.results.seconds = time.monotonic() - self._began
        self.results.write(self._options.out / "gpu-check.json")

    def show(self) -> None:
        """The tables, and where the figures are."""
        self._save()
        results, console = self.results, wide_console()
        facts = {**results.machine, **{f"GPU {i}": name for i, name in enumerate(results.gpus)}}
        console.print(report.facts("the machine", facts))
        console.print(report.bare(results))
        console.print(report.loads(results, _CORES))
        console.print(report.facts("largest difference of a probability, golden pictures", results.differences))
        for name, reason in results.failed.items():
            console.print(f"not measured: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
        print(f"{results.seconds:.0f} s; figures: {self._options.out / 'gpu-check.json'}, Triton's log: {self._log}")


if __name__ == "__main__":
    sys.exit(main())
