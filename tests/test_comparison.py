"""A shadow and a canary are compared with the stable release, and no user notices."""

from __future__ import annotations

import shutil
import socket
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import config
from export.repository import Repository
from gateway.comparison import Comparison, Comparisons
from tests.conftest import EXAMPLES, GatewayProcess, free_endpoint, wait_for
from tests.offline import Offline
from tests.test_outages import GOOD
from tests.test_problems import IMAGE, assert_problem
from tests.test_routing import ON_V1, Routed, canary
from triton_runtime.server import Endpoint, TritonServer

SHADOW = ON_V1 + '[shadow]\nrelease = "defect-v2"\npercent = {}\n'


def answer_of(confidence: float) -> Any:
    label = "damaged" if confidence >= 0.5 else "intact"
    scores = (("damaged", confidence), ("intact", 1 - confidence))
    return replace(GOOD, label=label, confidence=max(confidence, 1 - confidence), scores=scores)


# ---- the report ----


def test_a_report_has_the_figures_of_its_pairs() -> None:
    comparison = Comparison("defect-v2", "defect-v1")
    pairs = [(0.9, 0.8), (0.9, 0.2), (0.1, 0.1), (0.4, 0.6)]
    agreed = [comparison.add(f"r{n}", answer_of(a), answer_of(b)) for n, (a, b) in enumerate(pairs)]
    assert agreed == [True, False, True, False]
    report = comparison.report()
    assert (report.release, report.against, report.compared, report.agreement) == ("defect-v2", "defect-v1", 4, 0.5)
    assert report.confusion == {"damaged": {"damaged": 1, "intact": 1}, "intact": {"intact": 1, "damaged": 1}}
    assert report.mean_difference == pytest.approx((0.1 + 0.7 + 0.0 + 0.2) / 4)
    assert report.max_difference == pytest.approx(0.7)
    assert [entry.request_id for entry in report.most_disagreeing] == ["r1", "r3", "r0", "r2"]
    worst = report.most_disagreeing[0]
    assert (worst.stable.label, worst.this.label, worst.difference) == ("damaged", "intact", pytest.approx(0.7))


def test_a_report_keeps_the_twenty_largest() -> None:
    comparison = Comparison("defect-v2", "defect-v1")
    for n in range(500):
        comparison.add(f"r{n}", answer_of(0.5), answer_of(0.5 + (n * 37 % 500) / 1000))
    expected = sorted(range(500), key=lambda n: n * 37 % 500, reverse=True)[:20]
    assert [entry.request_id for entry in comparison.report().most_disagreeing] == [f"r{n}" for n in expected]


def test_another_label_is_worse_than_any_difference() -> None:
    comparison = Comparison("defect-v2", "defect-v1")
    for n, (a, b) in enumerate([(0.99, 0.51), (0.51, 0.49), (0.6, 0.4)]):
        comparison.add(f"r{n}", answer_of(a), answer_of(b))
    assert [entry.request_id for entry in comparison.report().most_disagreeing] == ["r2", "r1", "r0"]


def test_a_comparison_begins_again_with_another_stable_release() -> None:
    comparisons = Comparisons()
    first = comparisons.between("defect-v3", "defect-v1")
    first.shed += 1
    assert comparisons.between("defect-v3", "defect-v1") is first
    assert comparisons.between("defect-v3", "defect-v2").report().shed == 0
    assert comparisons.report("defect-v3").against == "defect-v2"


def test_labels_that_only_one_release_has_count_as_impossible_in_the_other() -> None:
    comparison = Comparison("defect-v2", "defect-v1")
    other = replace(GOOD, label="torn", confidence=0.6, scores=(("damaged", 0.4), ("torn", 0.6)))
    comparison.add("r", answer_of(0.5), other)
    assert comparison.report().max_difference == pytest.approx(0.6)


# ---- live ----


@pytest.fixture
def routed(pair_triton: Endpoint, tmp_path: Path) -> Any:
    file = tmp_path / "routing.toml"
    file.write_text(ON_V1)
    with GatewayProcess(pair_triton, tmp_path / "log", deadline_s=60, routing=file) as gateway:
        routed = Routed(gateway, file)
        wait_for(lambda: list(routed.samples("gateway_release_active").values()) == [1.0, 1.0])
        yield routed


def report(routed: Routed, name: str = "defect-v2") -> dict[str, Any]:
    return dict(routed.http.get(f"/v1/releases/{name}/report").json())


def expected_answers(root: Path) -> dict[str, list[tuple[str, dict[str, float]]]]:
    """What each release answers to the examples, by release."""
    answers = {}
    for release in Repository(root).releases("defect"):
        offline = Offline(root, release=release)
        answers[release.name] = [offline.answer(path.read_bytes()) for path in EXAMPLES]
    return answers


@pytest.mark.parametrize("role", ["shadow", "canary"])
def test_the_report_is_about_the_answers_of_both_releases(routed: Routed, pristine_pair: Path, role: str) -> None:
    """In both directions: a shadow's copy of stable traffic, and the stable release's copy of a canary's."""
    expected = expected_answers(pristine_pair)
    routed.write(SHADOW.format(100) if role == "shadow" else canary(100), lambda routing: routing[role] is not None)
    before = report(routed)
    assert (before["against"], before["since"], before["compared"], before["agreement"]) == (None, None, 0, None)
    asked = [(f"turn-{turn}-{path.stem}", path) for turn in range(3) for path in EXAMPLES]
    for count, (request_id, path) in enumerate(asked, 1):
        answered = routed.ask(path.read_bytes(), headers={"X-Request-ID": request_id})
        assert answered["model_version"] == ("defect-v1" if role == "shadow" else "defect-v2")
        wait_for(lambda count=count: report(routed)["compared"] == count)

    pairs = list(zip(expected["defect-v1"], expected["defect-v2"], strict=True))
    assert any(stable[0] != this[0] for stable, this in pairs), "they disagree by construction"
    differences = [max(abs(stable[1][label] - this[1][label]) for label in stable[1]) for stable, this in pairs]
    confusion: dict[str, Counter[str]] = {}
    for stable, this in pairs:
        confusion.setdefault(stable[0], Counter())[this[0]] += 3
    found = report(routed)
    assert (found["release"], found["against"]) == ("defect-v2", "defect-v1")
    assert found["confusion"] == confusion
    assert found["agreement"] == pytest.approx(sum(s[0] == t[0] for s, t in pairs) / len(pairs), abs=1e-5)
    assert found["mean_difference"] == pytest.approx(sum(differences) / len(differences), abs=1e-4)
    assert found["max_difference"] == pytest.approx(max(differences), abs=1e-4)
    assert (found["errors"], found["shed"]) == ({}, 0)
    worst = EXAMPLES[differences.index(max(differences))]
    first = found["most_disagreeing"][0]
    assert first["request_id"].endswith(worst.stem)
    assert first["stable"]["label"] == expected["defect-v1"][EXAMPLES.index(worst)][0]
    assert first["this"]["label"] == expected["defect-v2"][EXAMPLES.index(worst)][0]
    outcomes = routed.samples("gateway_comparisons_total")
    disagreed = 3 * sum(s[0] != t[0] for s, t in pairs)
    assert outcomes[("disagreed", "defect-v2")] == disagreed
    assert sum(outcomes.values()) == 3 * len(pairs)


def test_pinned_traffic_and_traffic_outside_of_the_share_is_not_compared(routed: Routed, jpeg: bytes) -> None:
    routed.write(SHADOW.format(0), lambda routing: routing["shadow"] is not None)
    for _ in range(10):
        routed.ask(jpeg)
    routed.write(SHADOW.format(100), lambda routing: routing["shadow"]["percent"] == 100)
    for _ in range(10):
        routed.ask(jpeg, params={"model_version": "defect-v1"})
    routed.ask(jpeg)
    wait_for(lambda: report(routed)["compared"] == 1)
    time.sleep(0.3)
    assert report(routed)["compared"] == 1


def test_a_report_of_what_is_not_there(routed: Routed) -> None:
    problem = assert_problem(routed.http.get("/v1/releases/defect-v9/report"), "unknown_release")
    assert "defect-v1, defect-v2" in problem["detail"]


def give_a_slow_step(root: Path, release: str, flag: Path) -> None:
    """Let a release preprocess by a version of its own, which takes two seconds while `flag` exists."""
    folder = Path(shutil.copytree(root / "defect_preprocess/1", root / "defect_preprocess/2"))
    model = (folder / "model.py").read_text()
    head = "    def execute(self, requests: list) -> list:\n"
    assert head in model
    slow = f"        if __import__('os').path.exists({str(flag)!r}):\n            __import__('time').sleep(2)\n"
    (folder / "model.py").write_text(model.replace(head, head + slow))
    step, ensemble = root / "defect_preprocess/config.pbtxt", root / release / "config.pbtxt"
    policy, pins = config.parse(step.read_text()), config.parse(ensemble.read_text())
    policy.version_policy.specific.versions.append(2)
    pins.ensemble_scheduling.step[0].model_version = 2
    step.write_bytes(config.render(policy))
    ensemble.write_bytes(config.render(pins))


def test_a_shadow_that_hangs_delays_nobody(pair: Path, tmp_path: Path, jpeg: bytes) -> None:
    """Its copies end at their deadline, two at a time; every other request is not copied, and that is counted."""
    endpoint, file, flag = free_endpoint(), tmp_path / "routing.toml", tmp_path / "slow"
    file.write_text(SHADOW.format(100))
    give_a_slow_step(pair, "defect-v2", flag)
    with (
        TritonServer(pair, endpoint) as server,
        GatewayProcess(endpoint, tmp_path / "log", deadline_s=1, routing=file) as gateway,
    ):
        server.wait_until_ready()
        routed = Routed(gateway, file)
        wait_for(lambda: list(routed.samples("gateway_release_active").values()) == [1.0, 1.0])
        routed.ask(jpeg)
        wait_for(lambda: report(routed)["compared"] == 1)
        flag.touch()
        began, took = time.monotonic(), []
        while time.monotonic() - began < 4 or len(took) < 20:
            asked = time.monotonic()
            assert routed.ask(jpeg)["route"] == "stable"
            took.append(time.monotonic() - asked)
        assert statistics.median(took) < 0.9, "no answer waited for a copy, each of which took a second"
        wait_for(lambda: report(routed)["errors"].get("deadline_exceeded", 0) >= 4)
        found = report(routed)
        assert found["compared"] == 1
        # What could not be answered in its time is refused at once, after a while.
        assert found["errors"].keys() <= {"deadline_exceeded", "overloaded"}
        assert found["errors"]["deadline_exceeded"] <= 2 * (time.monotonic() - began + 1), "two at a time"
        assert 0 < found["shed"] < len(took)
        outcomes = routed.samples("gateway_comparisons_total")
        assert outcomes[("shed", "defect-v2")] == found["shed"]
        assert outcomes[("failed", "defect-v2")] == sum(found["errors"].values())


def test_under_load_nothing_is_compared(pair_triton: Endpoint, tmp_path: Path, jpeg: bytes) -> None:
    """Another prediction is in flight as long as its body is on its way."""
    file = tmp_path / "routing.toml"
    file.write_text(SHADOW.format(100))
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 5000\r\n\r\n"
    with GatewayProcess(pair_triton, tmp_path / "log", deadline_s=60, routing=file, mirror_max_load=0) as gateway:
        routed = Routed(gateway, file)
        wait_for(lambda: list(routed.samples("gateway_release_active").values()) == [1.0, 1.0])
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as other:
            other.sendall(head)
            wait_for(lambda: routed.samples("gateway_in_flight") == {(): 1.0})
            for _ in range(5):
                routed.ask(jpeg)
            wait_for(lambda: report(routed)["shed"] == 5)
        wait_for(lambda: routed.samples("gateway_in_flight") == {(): 0.0})
        routed.ask(jpeg)
        wait_for(lambda: report(routed)["compared"] == 1)
        assert report(routed)["shed"] == 5


# ---- the rest of /metrics ----


def test_metrics_count_requests_without_what_clients_write(routed: Routed, jpeg: bytes) -> None:
    for name in ("a", "b"):
        routed.http.get(f"/errors/{name}")
        routed.http.get(f"/{name}")
    routed.http.get("/openapi.json")
    routed.http.get("/docs")
    routed.ask(jpeg)
    routed.http.post("/v1/predict", content=b"x", headers=IMAGE)
    requests = routed.samples("gateway_requests_total")
    assert requests[("not_found", "/errors/{code}", "404")] == 2
    assert requests[("not_found", "unknown", "404")] == 2
    assert requests[("", "/openapi.json", "200")] == requests[("", "/docs", "200")] == 1
    assert requests[("", "/v1/predict", "200")] == 1
    assert requests[("image_unsupported", "/v1/predict", "422")] == 1
    assert routed.samples("gateway_request_seconds_count")[("/v1/predict",)] == 2
    assert routed.samples("gateway_predictions_total") == {("defect-v1", "stable"): 1.0}
    assert routed.samples("gateway_triton_reachable") == {(): 1.0}
    assert routed.samples("gateway_in_flight") == {(): 0.0}
    assert routed.http.get("/metrics").headers["content-type"].startswith("text/plain")
