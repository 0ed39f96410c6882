"""The real perf_analyzer on the real release, with real pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from perf import analyzer, drops
from perf.__main__ import main
from tests.conftest import EXAMPLES
from triton_runtime.server import Endpoint


@pytest.fixture
def perf(triton: Endpoint, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`python -m perf` against the Triton of the tests."""
    for name, value in triton.to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("perf.__main__.unwind_on_signals", lambda: None)
    return lambda *arguments: main(["--repository", str(pristine), *arguments])


def test_perf_analyzer_measures_the_release(perf: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert perf("--concurrency", "1", "4", "--interval-ms", "1000") == 0
    printed = capsys.readouterr().out
    assert "defect-v1 over gRPC" in printed
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["1", "4"]
    assert all(float(cell) > 0 for row in rows for cell in row.split("│")[1:-1])


def test_an_unknown_release_is_an_error_with_its_reason(
    perf: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert perf("--release", "defect-v99") == 1
    assert "perf_analyzer failed at concurrency 1" in capsys.readouterr().err


def test_pictures_carry_their_length_in_front() -> None:
    (element, *_) = analyzer.input_data(EXAMPLES)["data"]
    raw = base64.b64decode(element["IMAGE"]["b64"])
    picture = EXAMPLES[0].read_bytes()
    assert raw == len(picture).to_bytes(4, "little") + picture


def test_a_missing_binary_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(analyzer.PerfError, match="make perf-tools"):
        analyzer.measure("defect-v1", "localhost:1", EXAMPLES, [1], binary=tmp_path / "nothing")


def test_an_empty_folder_of_pictures_is_an_error(perf: Callable[..., int], tmp_path: Path) -> None:
    assert perf("--pictures", str(tmp_path)) == 1


def test_a_drop_is_timed_from_its_arrival_to_its_first_answer(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("perf.drops.unwind_on_signals", lambda: None)
    figures = tmp_path / "drops.json"
    command = ["--repository", str(pristine), "--drops", "1", "--settle-s", "0.5", "--json", str(figures)]
    assert drops.main(command) == 0
    (seconds,) = json.loads(figures.read_text())["drops"]
    assert list(seconds) == list(drops.PARTS)
    assert seconds["settle"] >= 0.5
    assert all(value > 0 for value in seconds.values())
    printed = capsys.readouterr().out
    assert all(part in printed for part in [*drops.PARTS, "all"])
