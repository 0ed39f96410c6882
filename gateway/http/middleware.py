"""What holds for every request: an id in and out, one log line, one count, security headers, and no error that is
not a problem.

Plain ASGI, so that streaming and client disconnects pass through untouched.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.carried import Carried
from gateway.metrics import Metrics
from gateway.problems import MEDIA_TYPE, PROBLEMS, Failure, Problem

REQUEST_ID = "x-request-id"
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),  # pages.py has its own
]
_HSTS = (b"strict-transport-security", b"max-age=31536000")
logger = logging.getLogger("gateway.request")


def problem_response(request: Request, failure: Failure) -> Response:
    """The response for a failure; its code goes into the log line, with what is not the client's also the detail."""
    carried = Carried.of(request.scope)
    kind, problem = PROBLEMS[failure.code], Problem.of(failure, carried.request_id, carried.root)
    carried.log["code"] = failure.code
    if kind.fault != "client":
        carried.log["detail"] = failure.detail
        if failure.cause:
            carried.log["cause"] = failure.cause
    headers = {}
    if kind.step == "connection" or kind.status in (408, 413):
        headers["Connection"] = "close"  # what else comes is not read
    if kind.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if kind.status == 415:
        headers["Accept-Encoding"] = "gzip"  # of a request's body (RFC 7694)
    if retry_after := failure.retry_after or kind.retry_after:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return Response(problem.model_dump_json(), kind.status, headers, MEDIA_TYPE)


class RequestContext:
    """Fills what each request carries (carried.py): its id, when it began, its log line's fields, the root path."""

    def __init__(self, app: ASGIApp, metrics: Metrics, root: str = "") -> None:
        self.app = app
        self.metrics = metrics
        self.root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})
        request, carried = Request(scope), Carried.of(scope)
        # HEAD is answered as GET; what is below leaves the body out.
        inner: Scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        sent = request.headers.get(REQUEST_ID, "")
        request_id = sent if _ACCEPTED_ID.fullmatch(sent) else secrets.token_hex(16)
        started = time.monotonic()
        log: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"][:200]}
        carried.request_id, carried.started, carried.log, carried.root = request_id, started, log, self.root

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                there = {name for name, _ in headers}
                headers += [header for header in _HEADERS if header[0] not in there]
                headers.append((REQUEST_ID.encode(), request_id.encode()))
                if scope["scheme"] == "https":
                    headers.append(_HSTS)
                log["status"] = message["status"]
            await send(message)

        def refuse_if_broken() -> None:
            # Taken out: kept there, it would be part of a reference cycle, as in `deadline.Bounded`.
            refusal, carried.refusal = carried.refusal, None
            if refusal:
                try:
                    raise refusal
                finally:
                    del refusal

        async def receive_unless_broken() -> Message:
            message = await receive()
            refuse_if_broken()
            return message

        try:
            refuse_if_broken()
            await self.app(inner, receive_unless_broken, send_with_headers)
        except Failure as refusal:
            await problem_response(request, refusal)(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            if "status" in log:
                raise
            failure = Failure("shutting_down", "the time for what was in flight is over")
            await problem_response(request, failure)(scope, receive, send_with_headers)
        except Exception:
            logger.exception("unexpected failure", extra={"fields": {"request_id": request_id}})
            if "status" in log:  # half of a response is out: only closing the connection can say that it is bad
                raise
            failure = Failure("internal_error", "an unexpected failure was logged under this request id")
            await problem_response(request, failure)(scope, receive, send_with_headers)
        finally:
            seconds = time.monotonic() - started
            log["total_ms"] = round(seconds * 1000, 3)
            template = _template(inner)
            self.metrics.request(template, str(log.get("status", "none")), log.get("code", ""), seconds)
            quiet = scope["path"].startswith(("/health", "/metrics")) and log.get("status") == 200
            logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": log})


def _template(scope: Scope) -> str:
    """The route's template, which the router left in the scope: a path is whatever a client likes."""
    if (route := scope.get("route")) is not None:
        return str(getattr(route, "path", "unknown"))
    # Starlette's own routes leave no more than this. Those here have no parameters, so the path is the template.
    return str(scope["path"]) if "endpoint" in scope and not scope.get("path_params") else "unknown"
