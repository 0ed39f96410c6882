"""Version 1 of the contract: committed, not drifting, and never broken."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from contract import Manifest, StepPin, parse_release_name, release_name
from gateway.api.schemas import PredictResponse
from gateway.app import create_app
from gateway.problems import PROBLEMS, Problem
from gateway.settings import Settings
from tests.compatibility import incompatibilities
from tests.conftest import ROOT

RECORDED = Path(__file__).parent / "contract_v1"
FIRST: dict[str, Any] = json.loads((RECORDED / "openapi.json").read_text())


def current() -> dict[str, Any]:
    return dict(json.loads(json.dumps(create_app(Settings()).openapi())))


def test_the_committed_document_is_the_servers() -> None:
    committed = json.loads((ROOT / "gateway/openapi.json").read_text())
    assert committed == current(), "the contract changed: run 'make openapi' and look at the difference"


def test_nothing_that_version_1_promised_is_broken() -> None:
    assert incompatibilities(FIRST, current()) == []


def predict(document: dict[str, Any]) -> dict[str, Any]:
    return dict(document["paths"]["/v1/predict"]["post"])


def schema(document: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(document["components"]["schemas"][name])


BREAKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a path is removed": lambda d: d["paths"].pop("/version"),
    "a form is removed": lambda d: predict(d)["requestBody"]["content"].pop("image/*"),
    "a field is required": lambda d: schema(d, "PredictRequest")["required"].append("metadata"),
    "a field is refused": lambda d: schema(d, "PredictRequest")["properties"].pop("metadata"),
    "a field is narrowed": lambda d: schema(d, "PredictRequest")["properties"]["image"].update(maxLength=1000),
    "metadata loses a type": lambda d: schema(d, "PredictRequest")["properties"]["metadata"].update(
        additionalProperties={"type": "string"}
    ),
    "an answer loses a field": lambda d: schema(d, "PredictResponse")["properties"].pop("confidence"),
    "an answer's field is optional": lambda d: schema(d, "PredictResponse")["required"].remove("label"),
    "an answer's field has another type": lambda d: schema(d, "Score")["properties"]["confidence"].update(
        type="string"
    ),
    "a nested field is removed": lambda d: schema(d, "Timing")["properties"].pop("queue"),
    "a problem loses its code": lambda d: schema(d, "Problem")["properties"].pop("code"),
    "an error is removed": lambda d: predict(d)["responses"]["422"]["content"]["application/problem+json"][
        "examples"
    ].pop("image_corrupt"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_the_check_sees_each_kind_of_break(case: str) -> None:
    broken = copy.deepcopy(FIRST)
    BREAKS[case](broken)
    assert incompatibilities(FIRST, broken)


def test_growing_is_allowed() -> None:
    grown = copy.deepcopy(FIRST)
    grown["paths"]["/v1/predict/batch"] = grown["paths"]["/v1/predict"]
    schema(grown, "PredictRequest")["properties"]["model_version"] = {"type": "string"}
    schema(grown, "PredictResponse")["properties"]["shadow"] = {"type": "string"}
    schema(grown, "PredictResponse")["required"].append("shadow")
    assert incompatibilities(FIRST, grown) == []


@pytest.mark.parametrize("path", sorted(RECORDED.glob("request-*.json")), ids=lambda path: path.stem)
def test_a_recorded_request_is_answered_as_it_was(client: httpx.Client, path: Path) -> None:
    """The same fields of the same types, and the same code where it was refused; scores belong to the release."""
    recorded = json.loads(path.read_text())
    response = client.post("/v1/predict", json=recorded["request"])
    assert response.status_code == recorded["status"]
    assert covers(response.json(), recorded["response"])
    if recorded["status"] == 200:
        assert response.json()["metadata"] == recorded["response"]["metadata"]
        PredictResponse.model_validate(response.json())
    else:
        assert response.json()["code"] == recorded["response"]["code"]
        Problem.model_validate(response.json())


def covers(now: Any, then: Any) -> bool:
    """Whether `now` has every field of `then`, of the same JSON type."""
    if isinstance(then, dict):
        return isinstance(now, dict) and all(name in now and covers(now[name], then[name]) for name in then)
    if isinstance(then, list):
        return isinstance(now, list) and all(covers(item, then[0]) for item in now)
    numbers = (int, float)
    return type(now) is type(then) or (isinstance(now, numbers) and isinstance(then, numbers))


def test_codes_of_version_1_keep_their_status() -> None:
    recorded = json.loads((RECORDED / "problems.json").read_text())
    assert {code: PROBLEMS[code].status for code in recorded} == recorded


# ---- what releases say of themselves ----


def manifest(**changes: object) -> Manifest:
    steps = {step: StepPin(number, f"{number}" * 64) for number, step in enumerate(("preprocess", "classifier"), 1)}
    fields: dict[str, Any] = {
        "pipeline": "defect",
        "number": 12,
        "labels": ("beschädigt", "a, b", '"'),
        "steps": {**steps, "postprocess": StepPin(7, "7" * 64)},
        "built_from": "somewhere",
        "built_at": "2026-01-01T00:00:00+00:00",
        "evaluation": {"accuracy": 0.9, "by": {"label": [1, 2]}},
    }
    return Manifest(**{**fields, **changes})


def test_a_manifest_survives_its_way_through_parameters() -> None:
    assert Manifest.from_parameters("defect-v12", manifest().to_parameters()) == manifest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "[]"}, "malformed"),
        ({"labels": "not JSON"}, "malformed"),
        ({"labels": "[1]"}, "malformed"),
        ({"classifier_version": "one"}, "malformed"),
        ({"classifier_digest": None}, "classifier_digest"),
    ],
)
def test_a_broken_manifest_is_named(change: dict[str, str | None], message: str) -> None:
    parameters = {k: v for k, v in {**manifest().to_parameters(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        Manifest.from_parameters("defect-v12", parameters)


@pytest.mark.parametrize(
    "name", ["defect", "defect-v0", "defect-v01", "Defect-v1", "defect-v1x", "defect-v", "-v1", ""]
)
def test_what_is_no_release_is_not_taken_for_one(name: str) -> None:
    assert parse_release_name(name) is None


def test_a_releases_name_is_read_as_it_is_written() -> None:
    assert parse_release_name(release_name("fruit_2", 41)) == ("fruit_2", 41)
