"""What holds for every request: an id in and out, one log line, one count, and no error that is not a problem.

Plain ASGI, so that streaming and client disconnects pass through untouched.
"""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import MEDIA_TYPE, Failure, Problem
from gateway.metrics import Metrics

REQUEST_ID = "X-Request-ID"
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
logger = logging.getLogger("gateway.request")


def problem_response(request: Request, failure: Failure) -> Response:
    """The response for a failure; its code goes into the request's log line."""
    problem = Problem.of(failure, request.state.request_id)
    request.state.log["code"] = failure.code
    headers = {}
    if failure.retry_after is not None or problem.status == 503:
        headers["Retry-After"] = str(max(1, math.ceil(failure.retry_after or 0)))
    if problem.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    return Response(problem.model_dump_json(), problem.status, headers, MEDIA_TYPE)


class RequestContext:
    """Gives each request `state.request_id`, `state.started` (monotonic seconds) and `state.log` (fields)."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        sent = request.headers.get(REQUEST_ID, "")
        request_id = sent if _ACCEPTED_ID.fullmatch(sent) else uuid.uuid4().hex
        started = time.monotonic()
        log: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"][:200]}
        request.state.request_id, request.state.started, request.state.log = request_id, started, log

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
                log["status"] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected failure", extra={"fields": {"request_id": request_id}})
            if "status" in log:  # half of a response is out: only closing the connection can say that it is bad
                raise
            failure = Failure("internal_error", "an unexpected failure was logged under this request id")
            await problem_response(request, failure)(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            log["total_ms"] = round(seconds * 1000, 3)
            # The route's template, which the router left in the scope: a path is whatever a client likes.
            template = getattr(scope.get("route"), "path", "unknown")
            self.metrics.request(template, str(log.get("status", "none")), log.get("code", ""), seconds)
            quiet = scope["path"].startswith(("/health", "/metrics")) and log.get("status") == 200
            logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": log})
