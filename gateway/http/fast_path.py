"""A short way to the predictions: FastAPI's layers in front of a route cost as much as everything that is done in it.

The routes stay FastAPI's, with their place in the OpenAPI document. Only the way there is shorter, for endpoints that
need none of what the layers do: that take the request, return the response, and raise nothing but a `Failure`, which
the middleware around them answers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send


class Direct:
    """Sends requests for `routes`, by their exact path, to their endpoints, and everything else to the application.

    `middleware` is the application's own, the outermost first: the endpoints get it here, too.
    """

    def __init__(self, app: ASGIApp, routes: Collection[APIRoute], middleware: Sequence[Middleware]) -> None:
        self.app = app
        self._routes = {(method, route.path): route for route in routes for method in route.methods or ()}
        self._endpoints: ASGIApp = self._call
        for layer, args, kwargs in reversed(middleware):
            self._endpoints = layer(self._endpoints, *args, **kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        await self._endpoints(scope, receive, send)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await scope["route"].endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
