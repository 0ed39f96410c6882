"""`make perf` on the real thing: perf_analyzer, gateway, Triton, real pictures.

Windows are short, so bounds are wide: the intervals of three rounds span decades if other work had the machine in one.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import contract
from export.repository import Repository
from perf import analyzer, budgets, drops, steps
from perf.__main__ import main
from perf.budgets import Budgets
from perf.load import Load, drive
from tests.conftest import EXAMPLES, GatewayProcess
from triton_runtime.server import Endpoint

BUDGETS = """
[[budget]]
endpoint = "gateway"
concurrency = 4
p50 = 0.01

[[budget]]
release = "latest"
endpoint = "gateway"
request_rate = 10
p50 = 1e9
p99 = 1e9

[[budget]]
endpoint = "classifier"
concurrency = 1
p50 = 1e9

[[budget]]
release = "defect-v77"
endpoint = "ensemble"
concurrency = 1
p50 = 0.01
"""
# Three rounds: of two, an interval spans every bound if other work had the machine in one of them.
SHORT = ("--rounds", "3", "--seconds", "0.9", "--concurrency", "2")


@pytest.fixture
def perf(triton: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`python -m perf` against the Triton of the tests, with reports in the test's folder."""
    return runner(triton, monkeypatch, tmp_path)


@pytest.fixture
def perf_of_pair(pair_triton: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    return runner(pair_triton, monkeypatch, tmp_path)


def runner(triton: Endpoint, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., int]:
    for name, value in triton.to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("harness.commands.unwind_on_signals", lambda: None)
    return lambda root, *arguments: main(["--repository", str(root), "--out", str(folder), *arguments])


def written(folder: Path) -> tuple[str, dict]:
    (page,) = folder.glob("*.html")
    return page.read_text(), json.loads(page.with_suffix(".json").read_text())


def test_a_broken_budget_fails_and_the_report_shows_where_the_time_went(
    perf: Callable[..., int], pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "budgets.toml").write_text(BUDGETS)
    assert perf(pristine, "--budgets", str(tmp_path / "budgets.toml"), *SHORT) == 1
    page, data = written(tmp_path)

    broken, *others = data["verdicts"]
    outcomes = {(v["endpoint"], v["what"]): v["outcome"] for v in others}
    assert outcomes.pop(("gateway", "rate"))  # which one, is the machine's: its bound cannot be made wide
    assert outcomes == {
        ("gateway", "p50"): "pass",
        ("gateway", "p99"): "inconclusive",  # not even a hundred requests
        ("classifier", "p50"): "pass",
    }
    counts = Counter(verdict["outcome"] for verdict in data["verdicts"])
    total = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("fail", "inconclusive", "pass") if counts[outcome])
    assert (broken["outcome"], broken["bound"], broken["load"]["concurrency"]) == ("fail", 0.01, 4)
    assert broken["measured"]["low"] <= broken["measured"]["middle"] <= broken["measured"]["high"]

    runs = {(run["case"]["endpoint"], run["round"]): run for run in data["results"]["runs"]}
    assert {endpoint for endpoint, _ in runs} == {"gateway", "ensemble", "preprocess", "classifier", "postprocess"}
    assert all(run["requests"] > 0 and not run["failed"] for run in runs.values())
    for endpoint in ("gateway", "ensemble"):
        run = runs[endpoint, 0]
        assert list(run["parts"]) == ["gateway", "queue", "preprocess", "model", "postprocess"]
        assert sum(run["parts"].values()) == pytest.approx(run["mean"], rel=0.2)
    assert runs["gateway", 0]["answers"]["total"] <= runs["gateway", 0]["mean"]
    assert list(runs["classifier", 1]["parts"]) == ["gateway", "queue", "model"]

    assert page.count("<svg") == 3  # two curves and the breakdown
    assert "http" not in page.replace("HTTP", "")  # nothing is loaded from anywhere
    for shown in (
        "defect-v1, gateway",
        "postprocess",
        "p50 ≤ 0.01 ms",
        total,
        "python -m perf",
    ):
        assert shown in page, shown
    printed = capsys.readouterr().out
    assert total in printed
    assert "needs 100" in printed and str(tmp_path) in printed


def test_two_releases_are_compared_side_by_side(
    perf_of_pair: Callable[..., int], pristine_pair: Path, tmp_path: Path
) -> None:
    (tmp_path / "budgets.toml").write_text(
        "[[compare]]\nendpoint = 'gateway'\nconcurrency = 2\np50 = 1e6\nthroughput = 1e-6\n"
        "[[compare]]\nendpoint = 'ensemble'\nconcurrency = 2\np50 = 1e-6\n"
    )
    names = ("--release", "defect-v2", "--base", "defect-v1", "--budgets", str(tmp_path / "budgets.toml"))
    assert perf_of_pair(pristine_pair, *names, *SHORT) == 1
    page, data = written(tmp_path)
    assert {(v["what"], v["outcome"]) for v in data["verdicts"][:2]} == {("p50 ratio", "pass"), ("req/s ratio", "pass")}
    assert data["verdicts"][2]["outcome"] == "fail"
    first, second = ([r["case"]["release"] for r in data["results"]["runs"] if r["round"] == n] for n in (0, 1))
    assert first[:2] == ["defect-v2", "defect-v1"] and second[:2] == ["defect-v1", "defect-v2"]
    assert "defect-v2 against defect-v1" in page and "defect-v2 / defect-v1" in page


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--release", "defect-v99"), "there is no release defect-v99; there is defect-v1"),
        (("--base", "defect-v1"), "give another release of defect"),
        (("--budgets", "nowhere.toml"), "nowhere.toml"),
        (("--pictures", "perf"), "holds no pictures"),
    ],
)
def test_what_cannot_be_measured_says_why(
    perf: Callable[..., int], pristine: Path, capsys: pytest.CaptureFixture[str], arguments: tuple, reason: str
) -> None:
    assert perf(pristine, *arguments) == 2
    assert reason in capsys.readouterr().err


def test_budgets_that_say_nothing_of_a_release_are_no_pass(
    perf: Callable[..., int], pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "budgets.toml").write_text(BUDGETS[BUDGETS.index('[[budget]]\nrelease = "defect-v77"') :])
    assert perf(pristine, "--budgets", str(tmp_path / "budgets.toml")) == 2
    assert "says nothing of defect-v1" in capsys.readouterr().err


def test_a_release_that_the_triton_does_not_serve_is_not_measured(
    perf: Callable[..., int], pristine_pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perf(pristine_pair) == 2
    assert "does not serve defect-v2" in capsys.readouterr().err


def test_the_shipped_budgets_are_read() -> None:
    shipped = Budgets.read(budgets.BUDGETS)
    assert shipped.budget and shipped.compare
    assert any(budget.of_limit for budget in shipped.budget)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[budget]]\nendpoint = 'gateway'\nconcurrency = 1\np50 = \n", "line 4"),
        ("[[budget]]\nendpoint = 'model'\nconcurrency = 1\np50 = 1", r"budget\.0\.endpoint: Input should be 'gateway'"),
        ("[[budget]]\nendpoint = 'gateway'\np50 = 1", r"budget\.0: .*give one load"),
        ("[[budget]]\nendpoint = 'gateway'\nconcurrency = 1\nrequest_rate = 2\np50 = 1", "give one load"),
        ("[[budget]]\nendpoint = 'gateway'\nconcurrency = 1", "give at least one of p50"),
        ("[[budget]]\nendpoint = 'gateway'\nconcurrency = 1\np50 = -1", r"budget\.0\.p50: .*greater than 0"),
        ("[[budget]]\nendpoint = 'gateway'\nconcurrency = 1\np90 = 1", r"budget\.0\.p90: Extra inputs"),
        ("[[budget]]\nrelease = 'v3'\nendpoint = 'gateway'\nconcurrency = 1\np50 = 1", "such as defect-v1"),
        ("[[budget]]\nendpoint = 'classifier'\nconcurrency = 1\nof_limit = 0.5", "of_limit is for the gateway and"),
        ("[[budget]]\nendpoint = 'gateway'\nrequest_rate = 1\nof_limit = 0.5", "of_limit is for the gateway and"),
        ("[[compare]]\nendpoint = 'gateway'\nrequest_rate = 1\nthroughput = 0.9", "throughput needs a concurrency"),
    ],
)
def test_malformed_budgets_are_refused_with_their_place(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        Budgets.read(path)


def test_failed_requests_are_told_apart_from_answers(gateway: GatewayProcess, release: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    url = f"{gateway.url}/v1/predict?model_version={release}"
    answered = drive(url, [tmp_path / "broken.jpg", EXAMPLES[0]], Load(2), seconds=1)
    assert answered.latencies and len(answered.answers) == len(answered.latencies)
    (reason,) = answered.failed
    assert reason.startswith("status 422") and "image_" in reason


def test_an_open_loop_counts_from_when_a_request_was_due(stalling: str, tmp_path: Path) -> None:
    """A server that answers one at a time, in 0.2 s, is asked 20 times a second: the last one waits for seconds."""
    answered = drive(stalling, EXAMPLES[:1], Load(request_rate=20), seconds=1, warm_up=0)
    assert len(answered.latencies) == 20
    assert max(answered.latencies) > 2000
    assert answered.throughput < 6


@pytest.fixture
def stalling() -> Iterator[str]:
    """A fault that no part of the stack can be made to show: an HTTP server with one slow thread."""

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.2)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Slow)
    server.socket.listen(64)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_each_step_is_fed_with_what_the_step_before_made_of_the_picture(pristine: Path, release: str) -> None:
    repository = Repository(pristine)
    rows = steps.inputs(repository, repository.release(release), EXAMPLES)
    assert set(rows) == {"ensemble", "preprocess", "classifier", "postprocess"}
    assert all(len(each) == len(EXAMPLES) for each in rows.values())
    (pixels,) = rows["classifier"][0].values()
    assert pixels.shape == (224, 224, 3) and pixels.std() > 1
    assert rows["postprocess"][0]["PROBABILITIES"].sum() == pytest.approx(1, abs=1e-4)
    assert bytes(rows["postprocess"][0]["DIGEST"]).hex() == repository.release(release).steps["classifier"].digest


def test_a_picture_that_the_release_cannot_use_is_named(pristine: Path, release: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    repository = Repository(pristine)
    with pytest.raises(analyzer.PerfError, match=r"broken\.jpg.*image_unsupported.*take it out"):
        steps.inputs(repository, repository.release(release), [tmp_path / "broken.jpg"])


def test_an_incomplete_release_says_what_is_missing(repository: Path, release: str) -> None:
    shutil.rmtree(repository / "defect_classifier" / "1")
    found = Repository(repository)
    with pytest.raises(analyzer.PerfError, match=r"defect_classifier.* missing.*make export"):
        steps.inputs(found, found.release(release), EXAMPLES)


def test_bytes_carry_their_length_in_front() -> None:
    picture = EXAMPLES[0].read_bytes()
    element = analyzer.entry(np.array([picture], np.object_))
    assert base64.b64decode(str(element["b64"])) == len(picture).to_bytes(4, "little") + picture
    assert element["shape"] == [1]


def analyzing(
    triton: Endpoint, monkeypatch: pytest.MonkeyPatch, **load: float
) -> tuple[analyzer.Measurement, list[int]]:
    """What perf_analyzer measures, and the windows that it was given, in milliseconds."""
    windows, run = [], subprocess.run

    def observed(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        windows.append(next(int(part.partition("=")[2]) for part in command if "measurement-interval" in part))
        return run(command, **options)

    monkeypatch.setattr(analyzer.subprocess, "run", observed)
    with analyzer.Analyzer(triton.grpc_url) as tool:
        rows = [{contract.IMAGE: np.array([EXAMPLES[0].read_bytes()], np.object_)}]
        return tool.run("defect-v1", tool.store("pictures", rows), Load(**load), interval_ms=300), windows


def test_windows_in_which_nothing_is_answered_are_made_longer(
    triton: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request a second leaves most windows of 300 ms empty, as a busy machine does."""
    measured, windows = analyzing(triton, monkeypatch, request_rate=1)
    assert windows[0] == 300 and len(windows) > 1
    assert measured.throughput > 0
    assert measured.seconds == 3 * windows[-1] / 1000


def test_a_case_in_which_nothing_is_answered_is_inconclusive_and_the_others_are_measured(
    perf: Callable[..., int],
    pristine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows of a millisecond, in which no picture is answered, are to perf_analyzer what a busy machine is."""
    monkeypatch.setattr(analyzer, "LONGER", (1 / 300,))
    (tmp_path / "budgets.toml").write_text(
        "[[budget]]\nendpoint = 'ensemble'\nconcurrency = 1\np50 = 1e9\n"
        "[[budget]]\nendpoint = 'gateway'\nconcurrency = 1\np50 = 1e-6\n"
    )
    short = ("--rounds", "2", "--seconds", "0.9", "--concurrency", "1")
    assert perf(pristine, "--budgets", str(tmp_path / "budgets.toml"), *short) == 1
    page, data = written(tmp_path)
    outcomes = {(v["endpoint"], v["what"]): v["outcome"] for v in data["verdicts"]}
    assert outcomes == {("ensemble", "p50"): "inconclusive", ("gateway", "p50"): "fail"}
    # Where the machine stood still at the right moment, one of the two was measured.
    said = r"not measured in [12] of 2 rounds, no request was answered within 0\.001 s: lengthen --seconds"
    assert re.search(said, page) and re.search(said, " ".join(capsys.readouterr().out.split()))


def test_perf_analyzer_is_run_by_hand_with_the_input_that_is_written(
    perf: Callable[..., int], triton: Endpoint, pristine: Path, release: str, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert perf(pristine, "--input-only") == 0
    inputs = Path(capfd.readouterr().out.strip())
    assert inputs == tmp_path / f"{release}-input.json"
    run = ["-m", release, "-i", "grpc", "-u", triton.grpc_url, "--concurrency-range", "2"]
    assert analyzer.main(run) == 2
    assert f"python -m perf --release {release} --input-only" in capfd.readouterr().err
    count = ["--measurement-mode", "count_windows", "--measurement-request-count", "8", "--stability-percentage", "999"]
    assert analyzer.main([*run, "--input-data", str(inputs), *count]) == 0
    assert "Inferences/Second vs. Client Average Batch Latency" in capfd.readouterr().out
    assert analyzer.main(["--no-such-option"]) not in (0, 2), "its own exit status"


def test_a_missing_binary_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(analyzer.PerfError, match="make perf-tools"):
        analyzer.measure("defect-v1", "localhost:1", EXAMPLES, [1], binary=tmp_path / "nothing")


def test_a_drop_is_timed_from_its_arrival_to_its_first_answer(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.commands.unwind_on_signals", lambda: None)
    figures = tmp_path / "drops.json"
    command = ["--repository", str(pristine), "--drops", "1", "--settle-s", "0.5", "--json", str(figures)]
    assert drops.main(command) == 0
    (seconds,) = json.loads(figures.read_text())["drops"]
    assert list(seconds) == list(drops.PARTS)
    assert seconds["settle"] >= 0.5
    assert all(value > 0 for value in seconds.values())
    printed = capsys.readouterr().out
    assert all(part in printed for part in [*drops.PARTS, "all"])
