"""Tuning: which settings are tried, which win, and that what was measured or written is found again."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from export.__main__ import main as export
from export.config import Serving, parse
from perf import tune
from perf.analyzer import Measurement
from perf.tuning import report, serving_file, space
from perf.tuning.choice import LatencyBudget, MedianRange, Round, Trial, decide, front, ranked
from tests.conftest import ROOT

PRESENT = Serving.read(ROOT / "export" / "serving.toml")
OTHERS = [space.changed(PRESENT, {"queue_delay_us": 1000 * i}) for i in (1, 2, 3)]


def measured(throughput: float, latency: float) -> Measurement:
    return Measurement(16, throughput, latency / 2, latency, latency, latency, mean=latency / 2)


def trial(serving: Serving, throughput: list[float], latency: list[float]) -> Trial:
    """Rounds in which the present settings reach 100 a second and 200 ms."""
    pairs = zip(throughput, latency, strict=True)
    return Trial(serving, tuple(Round(measured(*pair), measured(100, 200)) for pair in pairs))


# ---- what is tried ----


def test_coarse_changes_one_setting_at_a_time_and_one_pair() -> None:
    tried = [space.difference(each, PRESENT) for each in space.coarse(PRESENT, space.default_grid(PRESENT, 2))]
    assert [change for change in tried if len(change) != 1] == [{"classifier.instances": 2, "classifier.threads": 1}]
    assert {name for change in tried for name in change} == set(space.NAMES)
    assert {"queue_delay_us": 500} in tried
    assert {"preprocess.instances": 3} in tried
    assert len(set(map(str, tried))) == len(tried)


def test_refinement_combines_what_helped_and_looks_beside_the_best() -> None:
    changes = [{"queue_delay_us": 2000}, {"classifier.instances": 3}, {"queue_delay_us": 500}]
    best = [space.changed(PRESENT, change) for change in changes]
    tried = [space.difference(each, PRESENT) for each in space.refined(PRESENT, best, known=best)]
    assert {"queue_delay_us": 2000, "classifier.instances": 3} in tried
    assert {"queue_delay_us": 1000} in tried
    assert {"queue_delay_us": 3000} in tried
    assert not [change for change in tried if change in changes]


def test_a_value_out_of_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="instances"):
        space.changed(PRESENT, {"classifier.instances": 0})


# ---- what wins ----


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    slow, quick, beaten = OTHERS
    trials = [trial(slow, [120], [220]), trial(quick, [90], [100]), trial(beaten, [110], [230])]
    assert [each.serving for each in front(trials, "p99")] == [quick, slow]
    assert front([trial(beaten, [90], [210])], "p99") == [], "the present settings beat it"


def test_the_budget_goes_before_throughput() -> None:
    trials = [trial(OTHERS[0], [150], [260]), trial(OTHERS[1], [110], [240]), trial(OTHERS[2], [120], [250])]
    assert [each.serving for each in ranked(trials, LatencyBudget("p99", 250))] == [OTHERS[2], OTHERS[1], OTHERS[0]]
    assert [each.serving for each in ranked(trials, LatencyBudget("p99", 100))] == [OTHERS[1], OTHERS[2], OTHERS[0]]


@pytest.mark.parametrize(
    ("throughput", "latency", "limit_ms", "wins"),
    [
        ([105, 103, 110], [200] * 3, 250, True),
        ([130, 99, 120], [200] * 3, 250, False),  # not in every round: noise
        ([130, 120, 120], [260] * 3, 250, False),  # beyond the budget
        ([95, 96, 97], [120] * 3, 150, True),  # the present settings miss the budget
        ([95, 96, 97], [120, 140, 210], 150, False),  # they do, but not beyond the noise
        ([105, 103, 110], [190, 210, 230], None, True),  # no limit: not worse as far as one can say
        ([105, 103, 110], [210, 220, 230], None, False),
    ],
)
def test_settings_win_beyond_noise_and_within_the_budget(
    throughput: list[float], latency: list[float], limit_ms: float | None, wins: bool
) -> None:
    winner, why = decide([trial(OTHERS[0], throughput, latency)], LatencyBudget("p99", limit_ms))
    assert winner == (OTHERS[0] if wins else None)
    assert wins != ("the present settings stay" in why)


def test_an_interval_is_median_and_range() -> None:
    assert MedianRange.of([1.2, 0.9, 1.0]) == MedianRange(0.9, 1.0, 1.2)


def test_settings_that_triton_refuses_are_shown_and_never_win(tmp_path: Path) -> None:
    trials = [Trial(OTHERS[0], (), "no memory"), trial(OTHERS[1], [120], [150])]
    assert [each.serving for each in ranked(trials, LatencyBudget())] == [OTHERS[1]]
    assert len(front(trials, "p99")) == 1
    stages = {each.serving: "coarse" for each in trials}
    assert report.table(trials, PRESENT, LatencyBudget(), stages).row_count == 2
    report.plot(trials, PRESENT, LatencyBudget("p99", 180), OTHERS[1], tmp_path / "plot.svg")
    circles = ElementTree.parse(tmp_path / "plot.svg").findall("{http://www.w3.org/2000/svg}circle")
    assert [circle.get("class") for circle in circles] == ["winner", "present"]


# ---- what is written ----


def test_writing_keeps_the_comments_and_the_export_picks_it_up(repository: Path, tmp_path: Path) -> None:
    before = (ROOT / "export" / "serving.toml").read_text()
    path = tmp_path / "serving.toml"
    path.write_text(serving_file.edited(before, {"queue_delay_us": 700, "classifier.instances": 3}))
    removed = set(before.splitlines()) - set(path.read_text().splitlines())
    assert removed <= {"queue_delay_us = 0", "instances = 2"}
    assert space.difference(Serving.read(path), PRESENT) == {"queue_delay_us": 700, "classifier.instances": 3}
    assert "+queue_delay_us = 700" in serving_file.diff(ROOT / "export" / "serving.toml", path.read_text())
    assert export(["--repository", str(repository), "--serving", str(path)]) == 0
    config = parse((repository / "defect_classifier" / "config.pbtxt").read_text())
    assert config.instance_group[0].count == 3
    assert config.dynamic_batching.max_queue_delay_microseconds == 700


# ---- all of it, for real ----


@pytest.fixture
def run(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("harness.commands.unwind_on_signals", lambda: None)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copy(ROOT / "export" / "serving.toml", tmp_path / "serving.toml")
    return tmp_path


def test_a_run_measures_once_and_a_second_one_nothing(
    run: Path, pristine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--repository", str(pristine), "--results", str(run), "--serving", str(run / "serving.toml")]
    command += ["--vary", "preprocess.instances=1", "--seconds", "1", "--rounds", "1", "--concurrency", "4"]
    command += ["--group", "2", "--p99-ms", "10000", "--write"]
    assert tune.main(command) == 0
    first = capsys.readouterr().out
    assert "2 trials made in this run" in first
    lines = (run / "tune.jsonl").read_text().splitlines()
    assert len(lines) == 2, "coarse and final: one instance has no neighbours that are new"
    ElementTree.parse(run / "tune.svg")
    written = space.difference(Serving.read(run / "serving.toml"), PRESENT)
    assert ("stay" in first) != bool(written)
    shutil.copy(ROOT / "export" / "serving.toml", run / "serving.toml")
    (run / "tune.jsonl").write_text("\n".join([*lines, lines[0][:50]]) + "\n")  # as an interrupted run leaves it
    assert tune.main(command) == 0
    assert "0 trials made in this run" in capsys.readouterr().out
    assert len((run / "tune.jsonl").read_text().splitlines()) == len(lines) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "colour=1"], "there is max_batch_size"),
        (["--vary", "max_batch_size=4"], "cannot go below 16"),
        (["--vary", "classifier.threads=0"], "threads"),
        (["--group", "17"], "takes 16 pictures a call"),
        (["--release", "defect-v99"], "there is no release defect-v99"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_its_reason(
    arguments: list[str], message: str, run: Path, pristine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(["--repository", str(pristine), "--results", str(run), *arguments]) == 1
    assert message in capsys.readouterr().err
