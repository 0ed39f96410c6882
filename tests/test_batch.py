"""Several pictures in one request: a result for each, in their order, whatever became of the others."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.problems import PROBLEMS
from gateway.settings import Settings


def item(data: bytes, **fields: Any) -> dict[str, Any]:
    return {"image": base64.b64encode(data).decode(), **fields}


def test_each_picture_gets_the_answer_it_gets_alone(client: httpx.Client, photographs: list[Path]) -> None:
    pictures = [path.read_bytes() for path in photographs[:12]]
    alone = [
        client.post("/v1/predict", content=data, headers={"Content-Type": "image/jpeg"}).json() for data in pictures
    ]
    items = [item(data, metadata={"place": i}) for i, data in enumerate(pictures)]
    headers = {"X-Request-ID": "shelf-7"}
    response = client.post("/v1/predict/batch", json={"items": items}, headers=headers)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["request_id"] == "shelf-7"
    answers = [result["answer"] for result in body["results"]]
    for i, (answer, expected) in enumerate(zip(answers, alone, strict=True)):
        assert answer["request_id"] == f"shelf-7-{i}"
        assert answer["metadata"] == {"place": i}
        assert (answer["label"], answer["model_version"]) == (expected["label"], expected["model_version"])
        assert answer["confidence"] == pytest.approx(expected["confidence"], abs=1e-5)


def test_what_is_wrong_with_one_is_told_in_its_place(client: httpx.Client, jpeg: bytes, release: str) -> None:
    items: list[Any] = [
        item(jpeg),
        item(b""),
        item(b"no picture"),
        item(jpeg[: len(jpeg) // 2]),
        {"image": "?"},
        {},
        7,
        item(jpeg, metadata={"deep": {}}),
        item(jpeg, metadata={"long": "x" * 1000, **{f"key{i}": "x" * 1000 for i in range(5)}}),
        item(jpeg, model_version="defect-v99"),
        {"image_url": "https://example.com/a.jpg"},
        item(jpeg, image_url="https://example.com/a.jpg"),
        item(jpeg, model_version=release),
    ]
    response = client.post("/v1/predict/batch", json={"items": items})
    assert response.status_code == 200
    results = response.json()["results"]
    codes = [result.get("problem", {}).get("code", result.get("answer", {}).get("route")) for result in results]
    assert codes == [
        "stable",
        "image_empty",
        "image_unsupported",
        "image_truncated",
        "invalid_base64",
        "invalid_request",
        "invalid_request",
        "invalid_metadata",
        "invalid_metadata",
        "unknown_release",
        "url_not_allowed",
        "invalid_request",
        "pinned",
    ]
    for i, result in enumerate(results):
        if problem := result.get("problem"):
            assert problem["request_id"] == f"{response.headers['X-Request-ID']}-{i}"
            assert problem["status"] == PROBLEMS[problem["code"]].status


@pytest.mark.parametrize(
    ("content", "media_type", "code"),
    [
        (b"", "application/json", "missing_body"),
        (b"{", "application/json", "invalid_json"),
        (b"[]", "application/json", "invalid_request"),
        (b"{}", "application/json", "invalid_request"),
        (b'{"items": []}', "application/json", "invalid_request"),
        (b'{"items": 3}', "application/json", "invalid_request"),
        (b'{"items": [{}], "more": 1}', "application/json", "invalid_request"),
        (b'{"items": [' + b"1," * Settings().max_items + b"1]}", "application/json", "invalid_request"),
        (b'{"items": [{}]}', "image/jpeg", "unsupported_media_type"),
        (b"x" * (8 * 2**20 + 1), "application/json", "body_too_large"),
    ],
)
def test_what_is_wrong_with_the_whole_is_one_problem(
    client: httpx.Client, content: bytes, media_type: str, code: str
) -> None:
    response = client.post("/v1/predict/batch", content=content, headers={"Content-Type": media_type})
    assert (response.status_code, response.json()["code"]) == (PROBLEMS[code].status, code)
