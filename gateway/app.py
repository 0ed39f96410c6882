"""The FastAPI application: the routes, and the lifespan that owns every long-lived object."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

import contract
from gateway import __version__, schemas
from gateway.errors import PROBLEMS, Failure, Problem, openapi_responses
from gateway.ingest import OPENAPI_REQUEST_BODY, read_picture
from gateway.middleware import RequestContext, problem_response
from gateway.predict import Answer, predict
from gateway.releases import Known, Releases
from gateway.settings import Settings
from gateway.triton import TritonClient, TritonError

CONTRACT = "v1"

_DESCRIPTION = """Send a picture of a parcel, get back whether it is damaged, how sure the model is, and which
release answered. Every error is a problem (RFC 9457) with a stable `code`."""

_BODY = ("missing_body", "invalid_json", "invalid_base64", "invalid_multipart", "body_timeout", "body_too_large")
_CONTENT = ("unsupported_media_type", "invalid_request", "invalid_metadata")
_PICTURE = ("image_empty", "image_unsupported", "image_truncated", "image_corrupt", "image_too_large")
_SERVICE = ("triton_unavailable", "no_release", "deadline_exceeded", "inference_failed", "invalid_answer")
_PREDICT = (*_BODY, *_CONTENT, *_PICTURE, *_SERVICE, "provenance_mismatch", "internal_error")


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings; nothing is connected before its lifespan starts."""
    triton: TritonClient
    releases: Releases

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal triton, releases
        triton = TritonClient(settings.triton_url)
        releases = Releases(triton, settings.pipeline, settings.probe_timeout_s)
        await releases.refresh()
        follower = asyncio.create_task(releases.follow(settings.refresh_s))
        yield
        follower.cancel()
        await triton.close()

    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat whatever Host the client sent
        title="Parcel defect service",
        version=CONTRACT,
        description=_DESCRIPTION,
        lifespan=lifespan,
    )
    app.add_middleware(RequestContext)

    @app.exception_handler(Failure)
    async def on_failure(request: Request, failure: Failure) -> Response:
        return problem_response(request, failure)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        response = problem_response(request, Failure(code, f"{request.method} {request.url.path[:200]}"))
        response.headers.update(error.headers or {})
        return response

    @app.post("/predict", include_in_schema=False)
    @app.post(
        "/v1/predict",
        summary="Judge one picture",
        response_model=schemas.PredictResponse,
        responses=openapi_responses(*_PREDICT),
        openapi_extra={"requestBody": OPENAPI_REQUEST_BODY},
        operation_id="predict",
    )
    async def predict_route(request: Request) -> Response:
        picture = await read_picture(request, settings)
        read = time.monotonic()
        answer = await predict(triton, releases, picture.data, request.state.request_id, settings.deadline_s)
        body = _response(request, answer, picture.metadata, read, time.monotonic())
        log = request.state.log
        log["release"], log["label"], log["timing_ms"] = body.model_version, body.label, body.timing_ms.model_dump()
        return Response(body.model_dump_json(), media_type="application/json")

    @app.get("/health/live", summary="Does the process run?", operation_id="live")
    async def live() -> schemas.Live:
        return schemas.Live()

    @app.get(
        "/health/ready",
        summary="Would a prediction be answered now?",
        responses=openapi_responses("triton_unavailable", "no_release"),
        operation_id="ready",
    )
    @app.get("/health", include_in_schema=False)
    async def ready() -> schemas.Health:
        release = releases.stable()
        try:
            # Triton's own readiness stays false after any failed load: only the release counts.
            is_ready = await triton.is_ready(release.name, settings.probe_timeout_s)
        except TritonError as error:
            raise Failure("triton_unavailable", str(error)) from error
        if not is_ready:
            raise Failure("no_release", f"{release.name} is not ready")
        return schemas.Health(model_version=release.name, triton=releases.triton_version)

    @app.get("/version", summary="Everything that has a version", operation_id="version")
    async def version() -> schemas.Version:
        try:
            stable = releases.stable().name
        except Failure:
            stable = None
        return schemas.Version(
            gateway=__version__,
            contract=CONTRACT,
            triton=releases.triton_version,
            pipeline=schemas.Pipeline(
                name=settings.pipeline, stable=stable, releases=[_describe(release) for release in releases.known]
            ),
        )

    @app.get("/errors", summary="Every error there is", operation_id="errors")
    async def errors() -> list[schemas.ErrorKind]:
        return [_explain(code) for code in PROBLEMS]

    @app.get(
        "/errors/{code}",
        summary="What a problem's `type` leads to",
        responses=openapi_responses("not_found"),
        operation_id="error",
    )
    async def error(code: str) -> schemas.ErrorKind:
        if code not in PROBLEMS:
            raise Failure("not_found", f"there is no error {code[:64]}")
        return _explain(code)

    _complete_openapi(app)
    return app


def _response(
    request: Request, answer: Answer, metadata: schemas.Metadata, read: float, answered: float
) -> schemas.PredictResponse:
    inference = answer.inference
    started, prepared, decided, ended = inference.times_ns
    in_steps = (ended - started) / 1e6
    return schemas.PredictResponse(
        request_id=request.state.request_id,
        model_version=answer.release.name,
        label=inference.label,
        confidence=_probability(inference.confidence),
        scores=[schemas.Score(label=name, confidence=_probability(p)) for name, p in inference.scores],
        metadata=metadata,
        timing_ms=schemas.Timing(
            read=round((read - request.state.started) * 1e3, 3),
            queue=round(max(0.0, (answered - read) * 1e3 - in_steps), 3),
            preprocess=round((prepared - started) / 1e6, 3),
            infer=round((decided - prepared) / 1e6, 3),
            postprocess=round((ended - decided) / 1e6, 3),
            total=round((answered - request.state.started) * 1e3, 3),
        ),
    )


def _probability(value: float) -> float:
    """float32 carries seven digits; rounding may lie a hair outside of [0, 1]."""
    return min(1.0, max(0.0, round(value, 7)))


def _describe(release: Known) -> schemas.Release:
    manifest = release.manifest
    description = schemas.Release(
        name=release.name, state="ready" if release.ready else "unavailable", reason=release.reason
    )
    if manifest is None:
        return description
    return description.model_copy(
        update={
            "labels": list(manifest.labels),
            "steps": {
                step: schemas.StepVersion(
                    model=contract.step_model(manifest.pipeline, step), version=pin.version, digest=pin.digest
                )
                for step, pin in manifest.steps.items()
            },
            "built_from": manifest.built_from,
            "built_at": manifest.built_at,
            "evaluation": dict(manifest.evaluation),
        }
    )


def _explain(code: str) -> schemas.ErrorKind:
    kind = PROBLEMS[code]
    return schemas.ErrorKind(code=code, status=kind.status, title=kind.title, advice=kind.advice)


def _complete_openapi(app: FastAPI) -> None:
    """Add the schemas that routes refer to by name, and drop FastAPI's own error format, which is never sent."""
    generate = app.openapi

    def openapi() -> dict:
        if app.openapi_schema is None:
            document = generate()
            components = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (Problem, schemas.PredictRequest):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                components.update(schema.pop("$defs", {}))
                components[model.__name__] = schema
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            for path in document["paths"].values():
                for operation in path.values():
                    responses = operation["responses"]
                    if "HTTPValidationError" in str(responses.get("422", "")):
                        del responses["422"]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
