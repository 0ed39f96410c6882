"""What a request carries along from its connection to its answer: one object in the state of its ASGI scope."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from gateway.problems import Failure

_KEY = "carried"


@dataclass(frozen=True)
class Client:
    """Who asks. `rate` is what the key allows, in pictures a second; None: as the settings say."""

    name: str
    rate: float | None = None


ANONYMOUS = Client("anonymous")


class Disconnect:
    """Whether the client of a connection has left, and who wants to know at once."""

    def __init__(self) -> None:
        self.has_happened = False
        self.then: Callable[[], None] | None = None

    def happen(self) -> None:
        """The connection is closed."""
        self.has_happened = True
        if self.then:
            self.then()


@dataclass(eq=False)
class Carried:
    """Made by the connection, filled on the way."""

    disconnect: Disconnect = field(default_factory=Disconnect)
    refusal: Failure | None = None
    """What the connection found wrong, for the middleware to answer."""
    request_id: str = ""
    started: float = 0.0
    """When the head was there, in monotonic seconds."""
    root: str = ""
    """The path under which a proxy serves the gateway."""
    client: Client = ANONYMOUS
    log: dict[str, Any] = field(default_factory=dict)
    """Fields of the request's log line."""

    @classmethod
    def of(cls, scope: Mapping[str, object]) -> Carried:
        """What the request of an ASGI scope carries; a new one if it came over no connection of ours."""
        state = cast(dict[str, Any], scope["state"])
        if (carried := state.get(_KEY)) is None:
            carried = state[_KEY] = cls()
        return cast(Carried, carried)

    def put_into(self, scope: Mapping[str, object]) -> None:
        """Have the request of an ASGI scope carry this."""
        cast(dict[str, Any], scope["state"])[_KEY] = self
