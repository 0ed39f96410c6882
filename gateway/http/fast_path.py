"""A short way to the predictions: FastAPI's layers in front of a route cost as much as everything that is done in it.

The routes stay FastAPI's, with their place in the OpenAPI document. Only the way there is shorter, for endpoints that
need none of what the layers do: that take the request, return the response, and raise nothing but a `Failure`, which
the middleware around them answers.
"""

from __future__ import annotations

from collections.abc import Collection

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send


class FastPath:
    """Middleware: requests for `routes`, by their exact path, go to their endpoints; the others go on as usual."""

    def __init__(self, app: ASGIApp, routes: Collection[APIRoute]) -> None:
        self.app = app
        self._routes = {(method, route.path): route for route in routes for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        response = await route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
