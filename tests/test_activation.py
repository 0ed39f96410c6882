"""A release answers only after it answered its golden pictures on this server as its export recorded."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import grpc

from contract import Golden
from export.repository import Repository
from gateway.triton import activation
from gateway.triton.client import Inference, ModelState, TritonError
from gateway.triton.inventory import Inventory, Known
from tests.conftest import GatewayProcess, free_endpoint, http, wait_for
from tests.test_outages import GOOD, MANIFEST, predict
from tests.test_problems import IMAGE, assert_problem
from tests.two_releases import edit_release
from triton_runtime.server import TritonServer


def described(gateway: GatewayProcess) -> dict[str, tuple[str, str]]:
    releases = http.get(f"{gateway.url}/version").json()["pipeline"]["releases"]
    return {release["name"]: (release["state"], release["reason"]) for release in releases}


def is_tried(gateway: GatewayProcess, name: str) -> bool:
    return "being tried" not in described(gateway).get(name, ("", "being tried"))[1]


def test_a_release_that_differs_from_its_record_never_answers(pair: Path, tmp_path: Path, jpeg: bytes) -> None:
    """The other one serves; what was refused says why, and is tried again once it was replaced."""
    untouched = (pair / "defect-v2/config.pbtxt").read_bytes()
    golden = Repository(pair).releases("defect")[-1].golden[0]
    wrong = {**golden.scores, "damaged": golden.scores["damaged"] + 0.1}
    record = {"label": golden.label, "scores": wrong, "image": json.loads(_record(pair, golden.name))["image"]}
    edit_release(pair, "defect-v2", {f"golden {golden.name}": json.dumps(record)})

    endpoint = free_endpoint()
    with (
        TritonServer(pair, endpoint, poll_seconds=1) as server,
        GatewayProcess(endpoint, tmp_path / "log", deadline_s=60) as gateway,
    ):
        server.wait_until_ready()
        wait_for(gateway.is_ready)
        wait_for(lambda: is_tried(gateway, "defect-v2"))
        state, reason = described(gateway)["defect-v2"]
        assert state == "unavailable"
        assert reason.startswith(f"{golden.name}: damaged {golden.scores['damaged']:.4f} ")
        assert f"instead of {wrong['damaged']:.4f}, allowed " in reason
        assert described(gateway)["defect-v1"] == ("ready", "")

        answers = [predict(gateway, jpeg).json() for _ in range(5)]
        assert {answer["model_version"] for answer in answers} == {"defect-v1"}
        pinned = http.post(
            f"{gateway.url}/v1/predict", params={"model_version": "defect-v2"}, content=jpeg, headers=IMAGE
        )
        assert_problem(pinned, "release_unavailable")
        assert json.dumps(f"{reason}")[1:-1] in gateway.log.read_text()
        page = http.get(f"{gateway.url}/metrics").text
        assert 'gateway_release_active{release="defect-v2"} 0.0' in page
        assert 'gateway_predictions_total{release="defect-v1",route="stable"} 5.0' in page
        assert page.count("gateway_predictions_total{") == 1, "golden pictures are no predictions of users"
        requests = [
            line for line in map(json.loads, gateway.log.read_text().splitlines()) if line["message"] == "request"
        ]
        assert "golden" not in "".join(line["request_id"] for line in requests), "nor are they requests"

        (pair / "defect-v2/config.pbtxt").write_bytes(untouched)
        wait_for(lambda: predict(gateway, jpeg).json()["model_version"] == "defect-v2")


def _record(root: Path, name: str) -> str:
    release = Repository(root).releases("defect")[-1]
    return release.to_parameters()[f"golden {name}"]


def test_a_release_without_golden_pictures_never_answers(repository: Path, tmp_path: Path, jpeg: bytes) -> None:
    names = [golden.name for golden in Repository(repository).releases("defect")[0].golden]
    edit_release(repository, "defect-v1", {f"golden {name}": None for name in names})
    endpoint = free_endpoint()
    with TritonServer(repository, endpoint) as server, GatewayProcess(endpoint, tmp_path / "log") as gateway:
        server.wait_until_ready()
        wait_for(lambda: is_tried(gateway, "defect-v1"))
        assert "publish it again" in described(gateway)["defect-v1"][1]
        assert_problem(predict(gateway, jpeg), "no_release")
        assert_problem(http.get(f"{gateway.url}/health/ready"), "no_release")


def test_what_answered_before_is_tried_again_when_triton_returns(pair: Path, tmp_path: Path, jpeg: bytes) -> None:
    """Its step was edited meanwhile: same names, same digests, other answers."""
    endpoint = free_endpoint()
    with GatewayProcess(endpoint, tmp_path / "log", deadline_s=10) as gateway:
        with TritonServer(pair, endpoint) as server:
            server.wait_until_ready()
            wait_for(lambda: described(gateway).get("defect-v2") == ("ready", ""))
        wait_for(lambda: http.get(f"{gateway.url}/version").json()["triton"] is None)
        settings = pair / "defect_postprocess/1/settings.json"
        settings.write_text(settings.read_text().replace('"damaged"', '"x"').replace('"intact"', '"damaged"'))
        settings.write_text(settings.read_text().replace('"x"', '"intact"'))
        with TritonServer(pair, endpoint) as server:
            server.wait_until_ready()
            # Not the state alone: for a moment it is that of releases which Triton is still loading.
            wait_for(lambda: all("instead of" in reason for _, reason in described(gateway).values()))
            assert all(state == "unavailable" for state, _ in described(gateway).values())
            assert_problem(predict(gateway, jpeg), "no_release")


def test_a_release_that_triton_came_back_without_is_not_called_ready(pair: Path, tmp_path: Path, jpeg: bytes) -> None:
    """Its step is not loaded: the index then gives neither a state nor a reason, as for one that is being loaded."""
    endpoint = free_endpoint()
    with GatewayProcess(endpoint, tmp_path / "log", deadline_s=10) as gateway:
        with TritonServer(pair, endpoint) as server:
            server.wait_until_ready()
            wait_for(lambda: described(gateway).get("defect-v2") == ("ready", ""))
        classifier = pair / "defect_classifier/config.pbtxt"
        classifier.write_text(classifier.read_text().replace("    versions: 2\n", ""))
        with TritonServer(pair, endpoint):
            wait_for(lambda: "does not have it" in described(gateway)["defect-v2"][1])
            wait_for(lambda: described(gateway)["defect-v1"] == ("ready", ""))
            answer = predict(gateway, jpeg).json()
            assert answer.get("model_version") == "defect-v1", answer
            assert predict(gateway, jpeg).json()["route"] == "stable"


# ---- a fault that the real server cannot be made to show on demand ----


class Faltering:
    """Triton, which fails so many times before it answers."""

    def __init__(self, failures: int, answer: Inference) -> None:
        self.failures = failures
        self.answer = answer

    async def infer(self, *_: object) -> list[Inference]:
        self.failures -= 1
        if self.failures >= 0:
            raise TritonError(grpc.StatusCode.UNAVAILABLE, "connection reset")
        return [self.answer]


def test_trouble_on_the_way_is_no_verdict() -> None:
    manifest = replace(MANIFEST, golden=(Golden("a", b"", "damaged", dict(GOOD.scores)),), tolerance=0.01)
    releases = Inventory(None, "defect", 1)  # type: ignore[arg-type]
    release = Known("defect-v3", 3, manifest, "new", is_tried=False)
    releases.known = (release,)

    async def refresh(times: int) -> list[str]:
        triton = Faltering(2, GOOD)

        async def follow() -> None:
            while True:
                await activation.follow(triton, releases)  # type: ignore[arg-type]

        follower = asyncio.create_task(follow())
        reasons = []
        for _ in range(times):
            releases.refreshed.set()
            await asyncio.sleep(0.01)
            reasons.append(release.reason)
        follower.cancel()
        return reasons

    first, second, third = asyncio.run(refresh(3))
    assert "connection reset" in first
    assert first == second
    assert third == ""
    assert releases.active() == [manifest]


class Moving:
    """Triton, while it loads what it has served before: its index gives no reason then, nor for what is gone."""

    def __init__(self) -> None:
        self.states: list[ModelState] = []
        self.is_there = True

    async def is_ready(self, *_: object) -> bool:
        return self.is_there

    async def version(self, _: float) -> str:
        return "2.51.0"

    async def index(self, _: float) -> list[ModelState]:
        return self.states

    async def config(self, *_: object) -> tuple[dict[str, str], int]:
        return MANIFEST.to_parameters(), 8


def test_what_answers_goes_on_while_triton_loads_it_again_and_what_is_new_waits() -> None:
    triton = Moving()
    releases = Inventory(triton, "defect", 1)  # type: ignore[arg-type]

    def look(*states: ModelState) -> list[str]:
        triton.states = list(states)
        asyncio.run(releases.refresh())
        return [release.name for release in releases.active()]

    ready, moving = ModelState("defect-v3", True, ""), ModelState("defect-v3", False, "")
    assert look(moving) == []
    assert "loading" in releases.known[0].reason
    assert look(ready) == [], "it has not been tried yet"
    releases.judge(releases.known[0], "")
    assert look(ready) == look(moving) == ["defect-v3"]
    assert look(ready) == ["defect-v3"]
    triton.is_there = False
    assert look(moving) == [], "it is not there any more"
    assert "does not have it" in releases.known[0].reason
    releases.judge(releases.known[0], "")
    triton.is_there = True
    assert look(ready) == ["defect-v3"]
    assert releases.untried() == list(releases.known), "and is tried again"
    assert look(ModelState("defect-v3", False, "no such file")) == []
    assert releases.known[0].reason == "no such file"
