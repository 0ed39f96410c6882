"""Who may ask: everything but the open paths needs a key, once there are keys."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.auth.api_keys import ApiKeys
from gateway.carried import ANONYMOUS, Carried, Client
from gateway.problems import Failure
from gateway.settings import Settings

_OPEN = ("/health", "/version", "/metrics", "/errors", "/docs", "/openapi.json", "/static-offline-docs")
OPENAPI_SCHEMES = {
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer"},
}
OPENAPI_SECURITY: list[dict[str, list[str]]] = [{}, {"X-API-Key": []}, {"Bearer": []}]


def is_open(path: str) -> bool:
    """Whether a path answers without a key, and when there are too many connections."""
    return any(path == start or path.startswith(f"{start}/") for start in _OPEN)


class Access:
    """Finds out the client of each request, or refuses it before anything of its body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        needs_key = self.keys.are_needed and not is_open(scope["path"])
        Carried.of(scope).client = self._client(Request(scope)) if needs_key else ANONYMOUS
        await self.app(scope, receive, send)

    def _client(self, request: Request) -> Client:
        presented = set(request.headers.getlist("X-API-Key"))
        for value in request.headers.getlist("Authorization"):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer":
                presented.add(token.strip())
        if not presented:
            raise Failure("missing_api_key", "neither X-API-Key nor Authorization: Bearer was sent")
        if len(presented) > 1:
            raise Failure("invalid_api_key", "two different keys were sent")
        key = self.keys.owner(presented.pop())
        Carried.of(request.scope).log["client"] = key.client
        return Client(key.client, key.rate)


def require_safe(settings: Settings, keys: ApiKeys) -> None:
    """Refuse to answer everybody on a network.

    Raises:
        ValueError: others than this machine can reach the gateway, there are no keys, and nobody said that this is
            meant.
    """
    reached_at = settings.published_on or settings.host
    if keys.are_needed or settings.allow_anonymous or _is_loopback(reached_at):
        return
    raise ValueError(
        f"{reached_at} can be reached from other machines, and there are no API keys: set GATEWAY_API_KEYS_FILE "
        "('make key NAME=scanner' makes one), or GATEWAY_ALLOW_ANONYMOUS=true to answer everybody"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
