"""Publishing into a running server: the next release takes over, and no request notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.asking import Asking
from tests.conftest import GatewayProcess, free_endpoint, http, wait_for
from tests.offline import Offline
from tests.two_releases import publish_contrary
from triton_runtime.server import TritonServer


def test_a_new_release_takes_over_without_a_failed_request(repository: Path, tmp_path: Path, jpeg: bytes) -> None:
    """Sixteen connections under load; every answer is the one that the release it names computes."""
    expected = {"defect-v1": Offline(repository).answer(jpeg)[1]}

    endpoint = free_endpoint()
    with (
        TritonServer(repository, endpoint, poll_seconds=1) as server,
        GatewayProcess(endpoint, tmp_path / "log", deadline_s=60) as gateway,
    ):
        server.wait_until_ready()
        wait_for(gateway.is_ready)
        with Asking(gateway.url, jpeg) as load:
            load.wait_for_more(50)
            publish_contrary(repository)
            expected["defect-v2"] = Offline(repository).answer(jpeg)[1]
            wait_for(lambda: load.answers[-1][1].get("model_version") == "defect-v2", 60)
            load.wait_for_more(50)
        answers = load.answers
        pipeline = gateway.page("/version")["pipeline"]

    assert expected["defect-v1"] != pytest.approx(expected["defect-v2"], abs=0.05), "the releases can be told apart"
    assert {status for status, _ in answers} == {200}
    assert {answer["model_version"] for _, answer in answers} == {"defect-v1", "defect-v2"}
    for _, answer in answers:
        scores = {score["label"]: score["confidence"] for score in answer["scores"]}
        assert scores == pytest.approx(expected[answer["model_version"]], abs=1e-5)
    assert pipeline["stable"] == "defect-v2"
    assert [(r["name"], r["state"]) for r in pipeline["releases"]] == [("defect-v1", "ready"), ("defect-v2", "ready")]


def test_a_broken_version_that_no_release_pins_is_invisible(repository: Path, tmp_path: Path, jpeg: bytes) -> None:
    """Dropped while the server runs, and there at its next cold start: neither is disturbed."""
    endpoint = free_endpoint()

    def answers() -> bool:
        with GatewayProcess(endpoint, tmp_path / "log", deadline_s=60) as gateway:
            wait_for(gateway.is_ready)
            headers = {"Content-Type": "image/jpeg"}
            return http.post(f"{gateway.url}/v1/predict", content=jpeg, headers=headers, timeout=60).status_code == 200

    with TritonServer(repository, endpoint, poll_seconds=1) as server:
        server.wait_until_ready()
        for step in ("preprocess", "classifier", "postprocess"):
            folder = repository / f"defect_{step}" / "9"
            folder.mkdir()
            (folder / ("model.onnx" if step == "classifier" else "model.py")).write_text("broken")
        assert answers()
    with TritonServer(repository, endpoint, poll_seconds=1) as server:
        server.wait_until_ready()
        assert answers()
