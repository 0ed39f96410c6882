"""The routing file: which release answers, which one tries itself on a share, and which one only watches.

The gateway follows it; `export status` and `export retire` read it.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from contract.names import RELEASE_NAME
from contract.tables import Table

LATEST = "latest"
"""As `stable`: the newest release that was verified."""

ReleaseName = Annotated[str, Field(pattern=rf"^{RELEASE_NAME.pattern}$")]
Percent = Annotated[float, Field(ge=0, le=100)]


class Canary(Table):
    """A release that answers a share of the requests.

    `sticky` names what decides which requests: `metadata:<key>` or `header:<name>`. Requests that have the same
    value there go the same way, and stay there as the share grows. Without it, or without a value, chance decides.
    """

    release: ReleaseName
    percent: Percent
    sticky: str | None = Field(default=None, pattern=r"^(metadata|header):.{1,64}$")


class Shadow(Table):
    """A release that gets a copy of a share of the requests; its answers are only compared."""

    release: ReleaseName
    percent: Percent = 100.0


class Routing(Table):
    """The file as a whole. An empty one is valid: the latest release answers."""

    stable: Annotated[str, Field(description="latest, or a release")] = LATEST
    canary: Canary | None = None
    shadow: Shadow | None = None

    @model_validator(mode="after")
    def _stable_is_a_release(self) -> Self:
        if self.stable != LATEST and not RELEASE_NAME.fullmatch(self.stable):
            raise ValueError(f"stable must be {LATEST!r} or the name of a release, such as defect-v1")
        return self

    @model_validator(mode="after")
    def _shadow_is_no_canary(self) -> Self:
        if self.canary and self.shadow and self.canary.release == self.shadow.release:
            raise ValueError(f"{self.shadow.release} is canary and shadow: a shadow never answers, a canary does")
        return self

    @property
    def on_trial(self) -> set[str]:
        """The canary and the shadow: "latest" is none of them, it would answer everything before its trial began."""
        return {rule.release for rule in (self.canary, self.shadow) if rule}

    def releases(self) -> dict[str, str]:
        """What the file says of each release that it names, for people."""
        named = {} if self.stable == LATEST else {self.stable: "stable"}
        for role, rule in (("canary", self.canary), ("shadow", self.shadow)):
            if rule:
                named[rule.release] = ", ".join(filter(None, [named.get(rule.release), f"{role} {rule.percent:g} %"]))
        return named
