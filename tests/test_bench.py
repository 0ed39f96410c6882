"""The yardsticks: each does the work that it claims to do, and a verdict is one only where every round agrees."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import httpx
import pytest

from perf import bench
from perf.bench import LIMIT, STACK, TUNED, Run
from perf.contenders import inprocess, limit
from tests.conftest import EXAMPLES
from tests.offline import Offline


def files(root: Path) -> tuple[Path, Path]:
    return root / "defect_preprocess/1/preprocessing.py", root / "defect_classifier/1/model.onnx"


def ask(kind: str, root: Path, jpeg: bytes) -> dict:
    transport = httpx.ASGITransport(inprocess.create_app(kind, *files(root)))

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            return await client.post("/v1/predict", content=jpeg, headers={"Content-Type": "image/jpeg"})

    return dict(asyncio.run(post()).json())


def test_the_tuned_app_gives_the_same_answer(pristine: Path, offline: Offline, jpeg: bytes) -> None:
    answer = ask("tuned", pristine, jpeg)
    label, scores = offline.answer(jpeg)
    assert answer["label"] == label
    assert answer["scores"] == pytest.approx(scores, abs=1e-5)
    assert answer["confidence"] == pytest.approx(scores[label], abs=1e-5)


def test_the_plain_app_answers_nearly_so(pristine: Path, offline: Offline, jpeg: bytes) -> None:
    """It decodes at full size and resizes otherwise, which is what comes of writing preprocessing twice."""
    answer = ask("plain", pristine, jpeg)
    _, scores = offline.answer(jpeg)
    assert answer["scores"] == pytest.approx(scores, abs=0.2)
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_the_limit_is_measured(pristine: Path) -> None:
    assert limit.measure(*files(pristine), EXAMPLES, batch=2, seconds=1, processes=1) > 0


def runs(*stack: float) -> list[Run]:
    """A limit of 100 in every round, and the stack at these rates."""
    return [
        run
        for number, rate in enumerate(stack)
        for run in (
            Run(LIMIT, 16, number, 100.0),
            Run(TUNED, 16, number, 90.0),
            Run(STACK, 16, number, rate, cpu_ms={"x": 1}),
        )
    ]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [((91, 95, 90), "met"), ((80, 89, 85), "missed"), ((80, 95, 93), "inconclusive")],
)
def test_a_verdict_needs_every_round(rates: tuple[float, ...], expected: str) -> None:
    shares = bench.ratios(runs(*rates), STACK, LIMIT, 16)
    assert shares == pytest.approx([rate / 100 for rate in rates])
    assert bench.verdict(shares, 0.90) == expected


@pytest.mark.skipif(
    not shutil.which("wrk"), reason="the load generator is a package of the system: apt-get install wrk"
)
def test_the_whole_comparison_runs(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("perf.bench.unwind_on_signals", lambda: None)
    monkeypatch.setenv("COLUMNS", "120")
    figures = tmp_path / "bench.json"
    command = ["--repository", str(pristine), "--seconds", "1", "--rounds", "1", "--connections", "4"]
    assert bench.main([*command, "--form", "json", "--json", str(figures)]) == 0
    measured = {run["contender"]: run for run in json.loads(figures.read_text())}
    assert set(measured) == {LIMIT, STACK, bench.TRITON, TUNED, bench.PLAIN}
    assert all(run["throughput"] > 0 for run in measured.values())
    assert {run["failed"] for run in measured.values()} == {0}
    assert set(measured[STACK]["cpu_ms"]) == {"gateway", "triton", "preprocess", "classifier", "postprocess"}
    assert "4 connections" in capsys.readouterr().out
