"""The FastAPI application: the routes, and the errors that they document."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from gateway import pages, schemas, views
from gateway.access import OPENAPI_SCHEMES, OPENAPI_SECURITY, Access
from gateway.errors import PROBLEMS, Failure, Problem, codes_of, openapi_responses
from gateway.ingest import OPENAPI_PARAMETERS, OPENAPI_REQUEST_BODY, read_picture
from gateway.keys import ApiKeys
from gateway.metrics import Metrics
from gateway.middleware import RequestContext, problem_response
from gateway.predict import predict
from gateway.service import Service
from gateway.settings import Settings
from gateway.triton import TritonError

_DESCRIPTION = """Send a picture of a parcel, get back whether it is damaged, how sure the model is, and which
release answered. Every error is a problem (RFC 9457) with a stable `code`."""

_PREDICT = codes_of("connection", "access", "read", "route", "preprocess", "infer", "verify", "gateway")
_ACCESS = codes_of("access")


def create_app(settings: Settings, metrics: Metrics | None = None, keys: ApiKeys | None = None) -> FastAPI:
    """The application for these settings; nothing is connected before its lifespan starts.

    Without `keys`, those of the settings.
    """
    service: Service
    metrics, keys = metrics or Metrics(), keys or ApiKeys.of(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal service
        service = Service(settings, metrics, keys)
        async with service.running():
            yield

    app = FastAPIOffline(
        docs_url=None,  # pages.py has them
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat whatever Host the client sent
        title="Parcel defect service",
        version=views.CONTRACT,
        description=_DESCRIPTION,
        lifespan=lifespan,
    )
    app.add_middleware(Access, keys=keys)
    app.add_middleware(RequestContext, metrics=metrics)  # the outermost: added last

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
        openapi_extra={
            "requestBody": OPENAPI_REQUEST_BODY,
            "parameters": OPENAPI_PARAMETERS,
            "security": OPENAPI_SECURITY,
        },
        operation_id="predict",
    )
    async def predict_route(request: Request) -> Response:
        request_id, log = request.state.request_id, request.state.log
        with service.predicting():
            picture = await read_picture(request, settings)
            read = time.monotonic()
            candidates = service.router.choose(picture.pin, picture.metadata, request.headers)
            answer = await predict(service.triton, candidates, picture.data, request_id, settings.deadline_s)
            answered = time.monotonic()
        body = views.prediction(request_id, answer, picture.metadata, request.state.started, read, answered)
        metrics.predicted(body.model_version, body.route)
        log["release"], log["route"], log["label"] = body.model_version, body.route, body.label
        log["timing_ms"] = body.timing_ms.model_dump()
        if answer.passed_over:
            log["passed_over"] = str(answer.passed_over)

        async def compare() -> None:
            await service.mirrors.offer(answer, picture.data, request_id, service.in_flight)

        # Starlette runs it once the answer was sent.
        return Response(body.model_dump_json(), media_type="application/json", background=BackgroundTask(compare))

    @app.get(
        "/v1/releases",
        summary="Every release, and what it is used for",
        responses=openapi_responses(*_ACCESS),
        openapi_extra={"security": OPENAPI_SECURITY},
        operation_id="releases",
    )
    async def releases_route() -> schemas.Releases:
        return views.releases(service)

    @app.get(
        "/v1/releases/{name}/report",
        summary="How a release compares with the stable one",
        responses=openapi_responses("unknown_release", *_ACCESS),
        openapi_extra={"security": OPENAPI_SECURITY},
        operation_id="report",
    )
    async def report_route(name: str) -> schemas.Report:
        if service.releases.find(name) is None:
            there = ", ".join(release.name for release in service.releases.known)
            raise Failure("unknown_release", f"{name[:64]!r} is no release; there are {there or 'none'}")
        return service.comparisons.report(name)

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
        release = service.router.stable()
        try:
            # Triton's own readiness stays false after any failed load: only the release counts.
            is_ready = await service.triton.is_ready(release.name, settings.probe_timeout_s)
        except TritonError as error:
            raise Failure("triton_unavailable", str(error)) from error
        if not is_ready:
            raise Failure("no_release", f"{release.name} is not ready")
        return schemas.Health(model_version=release.name, triton=service.releases.triton_version)

    @app.get("/version", summary="Everything that has a version", operation_id="version")
    async def version_route() -> schemas.Version:
        return views.version(service)

    @app.get("/metrics", include_in_schema=False)
    async def metrics_route() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs_route() -> Response:
        return pages.docs(app.title)

    html: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {}}}}

    @app.get(
        "/errors",
        summary="Every error there is",
        response_model=list[schemas.ErrorKind],
        responses=html,
        operation_id="errors",
    )
    async def errors(request: Request, response: Response) -> object:
        response.headers["Vary"] = "Accept"
        return pages.errors() if pages.wants_html(request) else [views.error(code) for code in PROBLEMS]

    @app.get(
        "/errors/{code}",
        summary="What a problem's `type` leads to",
        response_model=schemas.ErrorKind,
        responses={**html, **openapi_responses("not_found")},
        operation_id="error",
    )
    async def error(request: Request, response: Response, code: str) -> object:
        if code not in PROBLEMS:
            raise Failure("not_found", f"there is no error {code[:64]}")
        response.headers["Vary"] = "Accept"
        return pages.error(code) if pages.wants_html(request) else views.error(code)

    _complete_openapi(app)
    return app


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
            document["components"]["securitySchemes"] = OPENAPI_SCHEMES
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
