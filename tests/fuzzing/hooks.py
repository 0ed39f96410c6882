"""What Schemathesis must be told beside the OpenAPI document: pictures, and limits that no schema can express.

Loaded by `st run` through SCHEMATHESIS_HOOKS. No check is switched off. One failure is looked at twice: where valid
data was refused, the reason may be one that JSON Schema has no words for, and then it must be true of that request.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import schemathesis
from hypothesis import Phase, settings
from hypothesis import strategies as st
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.generation.case import Case
from schemathesis.openapi.checks import RejectedPositiveData

from gateway.settings import Settings
from tests.fuzzing.corpus import specimen
from tests.fuzzing.seeds import seeds
from tests.offline import PREPROCESSING

# Without the phase that climbs towards accepted requests: from one picture to a better one it does not end.
settings.register_profile("no climbing", phases=[phase for phase in Phase if phase is not Phase.target])
settings.load_profile("no climbing")

_GOOD = [seed.data for seed in seeds()]
_BAD = [specimen(0, number).data for number in range(100) if number % 20 != 19]  # no bombs: they are slow
for _media_type in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(_media_type, st.sampled_from([*_GOOD, *_BAD]) | st.binary(min_size=1, max_size=200))


@schemathesis.hook
def map_case(context: schemathesis.HookContext, case: Case) -> Case:
    """Put a picture where the schema can only ask for base64, JSON where a form can only ask for text; give it time."""
    if case.headers and case.meta and case.meta.generation.mode.is_positive and "X-Timeout-Ms" in case.headers:
        case.headers["X-Timeout-Ms"] = "30000"
    if case.meta and case.meta.generation.mode.is_positive and isinstance(case.body, dict):
        image, metadata = case.body.get("image"), case.body.get("metadata")
        if isinstance(image, str) and len(image) > 4:  # the shortest ones stay as they are
            case.body["image"] = base64.b64encode(_GOOD[len(image) % len(_GOOD)]).decode()
        if isinstance(metadata, str):
            case.body["metadata"] = json.dumps({"text": metadata[:100]})
    return case


@schemathesis.hook
def filter_failure(context: schemathesis.HookContext, failure: Failure, case: Case, response: Response) -> bool:
    """Whether it is one: valid data may be refused for a reason beyond the schema that holds for these very data."""
    if not isinstance(failure, RejectedPositiveData):
        return True
    code, body = response.json()["code"], case.body if isinstance(case.body, dict) else {}
    pins = [part["model_version"] for part in (case.query, body) if part and "model_version" in part]
    if code in PREPROCESSING.PictureError.CODES:
        return code != _code_of(_picture(case.body))
    if code == "invalid_request":
        return len(set(pins)) < 2  # two pins that contradict each other
    if code == "retired_release":
        return not pins
    if code == "invalid_metadata" and isinstance(body.get("metadata"), dict):
        size = len(json.dumps(body["metadata"], separators=(",", ":"), ensure_ascii=False).encode())
        return size <= Settings().max_metadata_bytes
    return True


def _picture(body: Any) -> bytes:
    """The picture of a request in any of its forms."""
    image = body.get("image") if isinstance(body, dict) else body
    return base64.b64decode(image) if isinstance(image, str) else bytes(getattr(image, "data", image))


def _code_of(picture: bytes) -> str:
    try:
        PREPROCESSING.preprocess(picture, 224)
    except PREPROCESSING.PictureError as error:
        return str(error.code)
    return "answered"
