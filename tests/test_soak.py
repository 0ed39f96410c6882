"""A soak sends requests of every kind and tells what keeps growing from what only breathes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest

from export.repository import Repository
from perf import soak
from perf.analyzer import PerfError

MEMORY = "memory, MiB"


def series(per_request: float, *, warm_up: float = 0.0, noise: float = 0.0, step: float = 0.0) -> list:
    """100 samples of 50,000 requests; a process of 300 MiB that gains bytes a request, and a `step` late on."""
    chance = random.Random(0)
    return [
        (n, 300 + per_request * n / 2**20 + warm_up * min(1, n / 10_000) + chance.gauss(0, noise) + step * (n > 40_000))
        for n in range(0, 50_000, 500)
    ]


@pytest.mark.parametrize(
    ("points", "grows"),
    [
        (series(0), False),
        (series(0, warm_up=200, noise=3), False),
        (series(0, noise=3, step=7), False),
        (series(1024), True),
        (series(1024, warm_up=200, noise=5), True),
        (series(500, noise=5), True),
    ],
    ids=["still", "warming up", "one more arena", "a leak", "a leak behind a warm-up", "a small leak in noise"],
)
def test_a_leak_is_told_from_warming_up(points: list, grows: bool) -> None:
    assert soak.judge(MEMORY, "gateway", points).grows is grows


def test_a_leaking_descriptor_is_found() -> None:
    assert soak.judge("file descriptors", "gateway", [(n, 40 + n / 1000) for n in range(0, 50_000, 500)]).grows


def test_the_growth_is_between_the_quarters_of_the_second_half() -> None:
    growth = soak.judge(MEMORY, "gateway", series(1024))
    assert growth.growth == pytest.approx(0.75 * 1024 * 25_000 / 2**20, rel=0.05)
    assert growth.end > growth.middle > 320


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(PerfError, match="send more requests"):
        soak.judge(MEMORY, "gateway", [(0, 1.0), (10, 2.0), (20, 3.0)])


@pytest.mark.alone
def test_a_short_soak_of_the_whole_stack(
    tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.commands.unwind_on_signals", lambda: None)
    monkeypatch.setenv("GATEWAY_PIPELINE", "tiny")
    soak.main(["--repository", str(tiny.root), "--requests", "240", "--results", str(tmp_path / "soak")])
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["unexpected"] == []
    assert sum(times for answers in figures["answers"].values() for times in answers.values()) == 240
    assert figures["answers"]["jpeg"].keys() == {"200"}
    assert figures["answers"]["too many pixels"].keys() == {"422"}
    parts = {"gateway", "triton", "preprocess", "classifier", "postprocess"}
    for figure in (MEMORY, "file descriptors", "threads"):
        assert set(figures["series"][figure]) == parts
        assert all(value > 0 for points in figures["series"][figure].values() for _, value in points)
    assert set(figures["series"]["shared memory, MiB"]) == {"triton"}
    assert {growth["part"] for growth in figures["growth"]} == parts
    ElementTree.parse(tmp_path / "soak.svg")
    assert "240 requests in" in capsys.readouterr().out
