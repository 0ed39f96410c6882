"""The FastAPI application: the routes, and the errors that they document."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from gateway.api import pages, responses, schemas
from gateway.auth.api_keys import ApiKeys
from gateway.auth.middleware import OPENAPI_SCHEMES, OPENAPI_SECURITY, Access
from gateway.carried import Carried
from gateway.http.body import (
    OPENAPI_BATCH_BODY,
    OPENAPI_PARAMETERS,
    OPENAPI_REQUEST_BODY,
    Picture,
    read_batch,
    read_picture,
)
from gateway.http.deadline import TIMEOUT_PARAMETER, Bounded, deadline_of
from gateway.http.draining import Draining
from gateway.http.fast_path import FastPath
from gateway.http.memory import Memory
from gateway.http.middleware import RequestContext, problem_response
from gateway.metrics import Metrics
from gateway.predict import RequestInfo
from gateway.problems import PROBLEMS, Failure, Problem, codes_of, openapi_responses
from gateway.service import Service
from gateway.settings import Settings

_DESCRIPTION = """Send a picture of a parcel, get back whether it is damaged, how sure the model is, and which
release answered. Every error is a problem (RFC 9457) with a stable `code`."""

_READ = codes_of("connection", "access", "read", "gateway")
_JUDGE = codes_of("admission", "fetch", "route", "preprocess", "infer", "verify")
_ACCESS = codes_of("access")


def create_app(
    settings: Settings,
    metrics: Metrics | None = None,
    keys: ApiKeys | None = None,
    draining: Draining | None = None,
) -> FastAPI:
    """The application for these settings; nothing is connected before its lifespan starts.

    Without `keys`, those of the settings. It is not ready once `draining` has begun.
    """
    service: Service
    metrics, keys = metrics or Metrics(), keys or ApiKeys.of(settings)
    memory = Memory(settings.max_held_bytes)
    metrics.observe(memory.gauges)

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
        version=responses.CONTRACT,
        description=_DESCRIPTION,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # metrics.py and logs.py have ours
        lifespan=lifespan,
    )

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        response = problem_response(request, Failure(code, f"{request.method} {request.url.path[:200]}"))
        response.headers.update(error.headers or {})
        if error.status_code == 405:  # Starlette names the methods of the first route alone
            there = [r for r in app.routes if isinstance(r, APIRoute) and r.matches(request.scope)[0] != Match.NONE]
            methods = {method for route in there for method in route.methods or ()}
            response.headers["Allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        return response

    judging: dict[str, Any] = {
        "response_model": schemas.PredictResponse,
        "responses": openapi_responses(*_READ, *_JUDGE),
        "openapi_extra": {
            "requestBody": OPENAPI_REQUEST_BODY,
            "parameters": OPENAPI_PARAMETERS,
            "security": OPENAPI_SECURITY,
        },
    }

    @app.api_route("/predict", methods=["POST", "PUT"], include_in_schema=False)
    @app.put("/v1/predict", summary="The same, for clients that put (`curl -T`)", operation_id="predict_put", **judging)
    @app.post("/v1/predict", summary="Judge one picture", operation_id="predict", **judging)
    async def predict_route(request: Request) -> Response:
        carried = Carried.of(request.scope)
        request_id, client, log = carried.request_id, carried.client, carried.log
        caller = RequestInfo(request_id, client.name, deadline_of(request, settings))
        with service.predicting, memory.share() as share:
            if not request.scope["query_string"]:  # which may name another release
                service.require_room(caller)  # before the work of reading, and before that costs the client something
            service.rates.spend(client.name, client.rate)
            picture = await read_picture(request, settings, caller.deadline, share)
            caller = replace(caller, deadline=deadline_of(request, settings))
            with Bounded(request):
                prediction = await service.judge(picture, caller, request.headers)
        timing = responses.timing(prediction, carried.started)
        body = responses.prediction(request_id, prediction, timing)
        metrics.predicted(body.model_version, body.route)
        log["release"], log["route"], log["label"] = body.model_version, body.route, body.label
        log["timing_ms"] = timing
        if picture.url is not None:
            log["fetch_ms"] = round(prediction.fetch_s * 1e3, 3)
        if prediction.answer.passed_over:
            log["passed_over"] = str(prediction.answer.passed_over)
        headers = {"Server-Timing": responses.server_timing(timing)}
        # Starlette runs it once the answer was sent.
        compare = BackgroundTask(service.compare, prediction, request_id)
        return Response(body.model_dump_json(), 200, headers, "application/json", compare)

    @app.post(
        "/v1/predict/batch",
        summary="Judge several pictures",
        response_model=schemas.BatchResponse,
        responses=openapi_responses(*_READ, "overloaded", "rate_limited"),
        openapi_extra={
            "requestBody": OPENAPI_BATCH_BODY,
            "parameters": [TIMEOUT_PARAMETER],
            "security": OPENAPI_SECURITY,
        },
        operation_id="predict_batch",
    )
    async def batch_route(request: Request) -> Response:
        carried = Carried.of(request.scope)
        request_id, client = carried.request_id, carried.client
        deadline = deadline_of(request, settings)
        with service.predicting, memory.share() as share:
            service.rates.spend(client.name, client.rate)

            def counted(items: int) -> None:
                service.rates.lend(client.name, client.rate, items - 1)

            items = await read_batch(request, settings, deadline, share, counted)
            deadline = deadline_of(request, settings)

            async def result(i: int, item: Picture | Failure) -> schemas.BatchAnswer | schemas.BatchProblem:
                caller = RequestInfo(f"{request_id}-{i}", client.name, deadline)
                try:
                    if isinstance(item, Failure):
                        raise item
                    prediction = await service.judge(item, caller, request.headers)
                except Failure as failure:
                    return schemas.BatchProblem(problem=Problem.of(failure, caller.request_id, settings.root_path))
                answer = responses.prediction(
                    caller.request_id, prediction, responses.timing(prediction, carried.started)
                )
                metrics.predicted(answer.model_version, answer.route)
                return schemas.BatchAnswer(answer=answer)

            with Bounded(request):
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(result(i, item)) for i, item in enumerate(items)]
        results = [task.result() for task in tasks]
        failed = [result.problem.code for result in results if isinstance(result, schemas.BatchProblem)]
        carried.log["items"], carried.log["failed"] = len(results), dict(Counter(failed))
        body = schemas.BatchResponse(request_id=request_id, results=results)
        total = round((time.monotonic() - carried.started) * 1e3, 3)
        headers = {"Server-Timing": responses.server_timing({"total": total})}
        return Response(body.model_dump_json(), 200, headers, "application/json")

    @app.get(
        "/v1/releases",
        summary="Every release, and what it is used for",
        responses=openapi_responses(*_ACCESS),
        openapi_extra={"security": OPENAPI_SECURITY},
        operation_id="releases",
    )
    async def releases_route() -> schemas.Releases:
        return responses.releases(service)

    @app.get(
        "/v1/releases/{name}/report",
        summary="How a release compares with the stable one",
        responses=openapi_responses("unknown_release", "retired_release", *_ACCESS),
        openapi_extra={"security": OPENAPI_SECURITY},
        operation_id="report",
    )
    async def report_route(name: str) -> schemas.Report:
        if service.releases.find(name) is None:
            raise service.router.not_there(name)
        return service.comparisons.report(name)

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        return RedirectResponse(f"{Carried.of(request.scope).root}/docs")  # without a host: the client's own

    @app.get("/health/live", summary="Does the process run?", operation_id="live")
    async def live() -> schemas.Live:
        return schemas.Live()

    @app.get(
        "/health/ready",
        summary="Would a prediction be answered now?",
        responses=openapi_responses("shutting_down", "triton_unavailable", "no_release"),
        operation_id="ready",
    )
    @app.get("/health", include_in_schema=False)
    async def ready() -> schemas.Health:
        if draining and draining.has_begun:
            raise Failure("shutting_down", "requests are still answered; send new ones elsewhere")
        release = await service.ready()
        return schemas.Health(model_version=release.name, triton=service.releases.triton_version)

    @app.get("/version", summary="Everything that has a version", operation_id="version")
    async def version_route() -> schemas.Version:
        return responses.version(service)

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
        return pages.errors() if pages.wants_html(request) else [responses.error(code) for code in PROBLEMS]

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
        return pages.error(code) if pages.wants_html(request) else responses.error(code)

    predictions = [
        route for route in app.routes if isinstance(route, APIRoute) and route.endpoint in (predict_route, batch_route)
    ]
    app.add_middleware(FastPath, routes=predictions)  # the innermost
    app.add_middleware(Access, keys=keys)
    app.add_middleware(RequestContext, metrics=metrics, root=settings.root_path)  # the outermost but for the next
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.strip() for origin in settings.cors_origins.split(",")],
            allow_methods=["GET", "HEAD", "POST", "PUT"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After", "Server-Timing"],
        )
    _complete_openapi(app, settings)
    return app


_HEADERS = {
    "RequestID": {"schema": {"type": "string"}, "description": "The request's own X-Request-ID, or one made for it."},
    "Timing": {"schema": {"type": "string"}, "description": "Where the time went, in milliseconds: read;dur=1.2, ..."},
}


def _complete_openapi(app: FastAPI, settings: Settings) -> None:
    """Add the schemas that routes refer to by name, and drop FastAPI's own error format, which is never sent."""
    generate = app.openapi

    def openapi() -> dict:
        if app.openapi_schema is None:
            document = generate()
            components = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (Problem, schemas.PredictRequest, schemas.BatchRequest):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                components.update(schema.pop("$defs", {}))
                components[model.__name__] = schema
            # Anything is taken as an item, and what is no request for one picture is told in its place.
            item = {"anyOf": [{"$ref": "#/components/schemas/PredictRequest"}, {}]}
            components["BatchRequest"]["properties"]["items"] |= {"items": item, "maxItems": settings.max_items}
            for name in ("HTTPValidationError", "ValidationError"):
                components.pop(name, None)
            for path in document["paths"].values():
                for operation in path.values():
                    responses = operation["responses"]
                    if "HTTPValidationError" in str(responses.get("422", "")):
                        del responses["422"]
                    for response in responses.values():
                        response.setdefault("headers", {})["X-Request-ID"] = {"$ref": "#/components/headers/RequestID"}
                    if operation["operationId"].startswith("predict"):
                        responses["200"]["headers"]["Server-Timing"] = {"$ref": "#/components/headers/Timing"}
            document["components"]["headers"] = _HEADERS
            document["components"]["securitySchemes"] = OPENAPI_SCHEMES
            if settings.root_path:
                document["servers"] = [{"url": settings.root_path}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
