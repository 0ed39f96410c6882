"""`make gpu-check` where there is no GPU: what it says, and all of it but the GPU itself."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest

from perf.analyzer import PerfError
from perf.gpu import report
from perf.gpu.__main__ import Check, _lacks_gpu, _parser, main
from perf.gpu.shares import Shares, gpus, watched
from perf.gpu.stack import Row, Setting, largest_difference
from triton_runtime.installation import Installation

without_gpu = pytest.mark.skipif(not _lacks_gpu(), reason="there is a GPU")


@without_gpu
def test_without_a_gpu_it_says_why_and_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "requirements/gpu.lock" in said or "there is no NVIDIA GPU" in said
    assert "--without-gpu" in said


def test_everything_but_the_gpu_is_measured_without_one(tmp_path: Path) -> None:
    few = ["--in-flight", "2", "--preprocess", "1", "--batches", "1", "--instances", "1", "--seconds", "0.3"]
    assert main(["--without-gpu", "--precisions", "fp32", *few, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["failed"] == {}
    assert found["bare"]["fp32 on cpu"]["1"] > 0
    assert [row["endpoint"] for row in found["rows"]] == ["gateway", "ensemble", "gateway", "classifier"]
    for row in found["rows"]:
        assert row["throughput"] > 0
        assert 0 < row["p50"] <= row["p99"]
        assert row["shares"]["machine"] > 0
    assert all(where == ["on the processor"] for where in found["where"].values())
    assert found["rows"][0]["shares"]["cores"]["classifier"] > 0


def check(tmp_path: Path, *arguments: str) -> Check:
    """One that has not begun."""
    options: argparse.Namespace = _parser().parse_args(["--without-gpu", "--out", str(tmp_path), *arguments])
    return Check(options)


def test_what_cannot_be_measured_is_listed_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> Row:
        raise PerfError("perf_analyzer is missing")

    one = check(tmp_path)
    one._measure("first", refuse)
    one._measure("second", lambda: row(gateway=0.5))
    one.show()
    kept = json.loads((tmp_path / "gpu-check.json").read_text())
    assert kept["failed"] == {"first": "PerfError: perf_analyzer is missing"}
    assert [each["endpoint"] for each in kept["rows"]] == ["gateway"]
    assert "not measured: first: PerfError" in capsys.readouterr().out


def test_a_model_that_fell_back_to_the_processor_is_no_measurement_of_a_gpu(tmp_path: Path) -> None:
    one = check(tmp_path)
    said = "defect_classifier 1: on the processor, though there is GPU 0: no cuDNN"
    one._log.write_text(f"--- earlier\ndefect_classifier 1: on GPU 0 (CUDA)\n--- now\n{said}\n")
    one._note_where(Setting("fp32", "auto", 2))
    assert "though there is GPU 0: no cuDNN" in next(iter(one.results.failed.values()))
    one.results.failed.clear()
    one._log.write_text("--- now\ndefect_classifier 1: on GPU 0 (CUDA)\n")
    one._note_where(Setting("fp32", "auto", 2))
    assert not one.results.failed


def row(*, gpu: float | None = None, machine: float = 1.0, generator: float = 0.1, **cores: float) -> Row:
    """A load under which so many cores were busy."""
    shares = Shares(cores=cores, machine=machine, gpu_percent=gpu)
    return Row(Setting("fp32", "gpu", 4), "gateway", 16, 100.0, 1.0, 2.0, {}, generator, shares)


@pytest.mark.parametrize(
    ("measured", "busiest"),
    [
        (row(preprocess=3.8, gateway=0.9, gpu=40.0), "preprocess 95%"),
        (row(preprocess=3.8, gateway=0.99, gpu=40.0), "gateway 99%"),
        (row(preprocess=2.0, gateway=0.5, gpu=97.0), "GPU 97%"),
        (row(preprocess=2.0, gateway=0.5, generator=0.9), "load generator 90%"),
        (row(preprocess=2.0, gateway=0.5, machine=15.8), "all cores 99%"),
        (row(classifier=9.0, gateway=0.5), "gateway 50%"),
    ],
)
def test_the_bottleneck_is_what_is_closest_to_its_own_end(measured: Row, busiest: str) -> None:
    assert report.busiest(measured, cores=16) == busiest


def test_the_largest_difference_is_over_pictures_that_both_answered() -> None:
    one = {"a": {"damaged": 0.9, "intact": 0.1}, "b": {"damaged": 0.2, "intact": 0.8}, "c": {"damaged": 1.0}}
    other = {"a": {"damaged": 0.9, "intact": 0.1}, "b": {"damaged": 0.25, "intact": 0.75}}
    assert largest_difference(one, other) == pytest.approx(0.05)


class Idle:
    """A service without processes."""

    def cpu_seconds(self) -> dict[str, float]:
        """None."""
        return {}


def test_the_gpu_s_share_is_the_mean_of_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program that says what nvidia-smi would: there is no GPU where tests run."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys, time\n"
        "if 'driver_version' in sys.argv[1]:\n"
        "    print('NVIDIA X, 100 MiB, 580.1')\n"
        "    sys.exit()\n"
        "assert sys.argv[1] == '--query-gpu=utilization.gpu,memory.used,power.draw'\n"
        "print('40, 1000, 300.5', '60, 3000, [N/A]', '80, 2000, 310', sep='\\n', flush=True)\n"
        "time.sleep(60)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus() == ["NVIDIA X, 100 MiB, 580.1"]
    with watched(Idle()) as shares:  # type: ignore[arg-type]
        time.sleep(1)
    assert shares.gpu_percent == 60
    assert shares.gpu_mib == 2000
    assert shares.gpu_watts == pytest.approx(305.25)


def test_the_server_finds_cuda_and_keeps_what_the_driver_is_found_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/nvidia/lib64")
    installation = Installation.find()
    assert installation.library_path.split(":") == [*map(str, installation.libraries), "/usr/local/nvidia/lib64"]
    cuda = sorted(installation.site_packages.glob("nvidia/*/lib"))
    assert list(installation.libraries[2:]) == cuda
