"""A good picture, through every form, gives the offline pipeline's answer and says which release gave it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.offline import Offline

Send = Callable[[httpx.Client, bytes, dict], httpx.Response]


def as_json(client: httpx.Client, data: bytes, metadata: dict) -> httpx.Response:
    return client.post("/v1/predict", json={"image": base64.b64encode(data).decode(), "metadata": metadata})


def as_form(client: httpx.Client, data: bytes, metadata: dict) -> httpx.Response:
    files = {"image": ("parcel.jpg", data), "metadata": (None, json.dumps(metadata))}
    return client.post("/v1/predict", files=files)


def as_bytes(client: httpx.Client, data: bytes, metadata: dict) -> httpx.Response:
    return client.post("/v1/predict", content=data, headers={"Content-Type": "image/jpeg"})


FORMS: dict[str, Send] = {"json": as_json, "form": as_form, "bytes": as_bytes}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_whole_answer(
    client: httpx.Client, offline: Offline, release: str, jpeg: bytes, form: str
) -> None:
    metadata = {"parcel": "A-17", "weight": 2.5, "retry": False, "count": 3, "note": None, "ä": "ü"}
    response = FORMS[form](client, jpeg, metadata)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == [
        "request_id",
        "model_version",
        "route",
        "label",
        "confidence",
        "scores",
        "metadata",
        "timing_ms",
    ]
    label, scores = offline.answer(jpeg)
    assert (answer["model_version"], answer["route"]) == (release, "stable")
    assert answer["label"] == label
    assert answer["confidence"] == pytest.approx(scores[label], abs=1e-5)
    assert {s["label"]: s["confidence"] for s in answer["scores"]} == pytest.approx(scores, abs=1e-5)
    confidences = [score["confidence"] for score in answer["scores"]]
    assert confidences == sorted(confidences, reverse=True)
    assert answer["metadata"] == ({} if form == "bytes" else metadata)
    timing = answer["timing_ms"]
    assert list(timing) == ["read", "admit", "queue", "preprocess", "infer", "postprocess", "total"]
    assert all(value >= 0 for value in timing.values())
    parts = sum(value for name, value in timing.items() if name != "total")
    assert parts == pytest.approx(timing["total"], rel=0.05, abs=1)
    assert response.headers["X-Request-ID"] == answer["request_id"]


def test_every_photograph_is_answered_as_the_offline_pipeline_answers_it(
    client: httpx.Client, offline: Offline, photographs: list[Path]
) -> None:
    forms = list(FORMS.values())

    def ask(numbered: tuple[int, Path]) -> tuple[Path, httpx.Response]:
        number, path = numbered
        return path, forms[number % 3](client, path.read_bytes(), {})

    with ThreadPoolExecutor(8) as pool:  # concurrently, so that Triton forms batches
        for path, response in pool.map(ask, enumerate(photographs)):
            assert response.status_code == 200, response.text
            label, scores = offline.answer(path.read_bytes())
            answer = response.json()
            assert answer["label"] == label, path
            assert {s["label"]: s["confidence"] for s in answer["scores"]} == pytest.approx(scores, abs=1e-5), path


def test_the_path_without_a_version_is_the_same(client: httpx.Client, jpeg: bytes) -> None:
    answers = [
        client.post(path, content=jpeg, headers={"Content-Type": "image/jpeg"}).json()
        for path in ("/predict", "/v1/predict")
    ]
    assert answers[0]["scores"] == answers[1]["scores"]


def test_metadata_is_optional_in_every_form(client: httpx.Client, jpeg: bytes) -> None:
    encoded = base64.b64encode(jpeg).decode()
    for response in (
        client.post("/v1/predict", json={"image": encoded}),
        client.post("/v1/predict", files={"image": ("p.jpg", jpeg)}),
    ):
        assert response.status_code == 200
        assert response.json()["metadata"] == {}


def test_metadata_may_be_a_file_part(client: httpx.Client, jpeg: bytes) -> None:
    files = {"image": ("p.jpg", jpeg), "metadata": ("m.json", b'{"a": 1}', "application/json")}
    assert client.post("/v1/predict", files=files).json()["metadata"] == {"a": 1}


def test_content_type_parameters_and_case_do_not_matter(client: httpx.Client, jpeg: bytes) -> None:
    body = json.dumps({"image": base64.b64encode(jpeg).decode()})
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON"):
        assert client.post("/v1/predict", content=body, headers={"Content-Type": kind}).status_code == 200
    # The picture's own header decides what it is, not what the client calls it.
    assert client.post("/v1/predict", content=jpeg, headers={"Content-Type": "image/png"}).status_code == 200


@pytest.mark.parametrize("sent", ["scanner-7:0001", "a" * 128])
def test_a_request_id_is_taken_over(client: httpx.Client, jpeg: bytes, sent: str) -> None:
    response = client.post("/v1/predict", content=jpeg, headers={"Content-Type": "image/jpeg", "X-Request-ID": sent})
    assert response.json()["request_id"] == response.headers["X-Request-ID"] == sent


@pytest.mark.parametrize("sent", ["", "a" * 129, "two words", '"quoted"', "<script>"])
def test_a_request_id_that_could_do_harm_is_replaced(client: httpx.Client, sent: str) -> None:
    response = client.get("/health/live", headers={"X-Request-ID": sent})
    assert response.headers["X-Request-ID"] != sent
    assert len(response.headers["X-Request-ID"]) == 32
