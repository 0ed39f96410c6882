"""Who answers one request: the routing in force, applied to the releases that may answer now."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from contract import Manifest, parse_release_name
from contract.routing import LATEST, Routing
from gateway.api.schemas import Metadata, Role
from gateway.problems import Failure
from gateway.routing.routing_file import RoutingFile

if TYPE_CHECKING:  # what it is made of asks Triton, and loads gRPC for it
    from gateway.routing.catalogue import Catalogue

logger = logging.getLogger("gateway.routing")

Route = Literal["stable", "canary", "pinned", "fallback"]
"""Why a release answers."""


@dataclass(frozen=True)
class Choice:
    """A release that may answer, and why it would be this one."""

    release: Manifest
    route: Route


@dataclass(frozen=True)
class InForce:
    """Who plays which role now, and the others that may answer, the one to be asked first in front.

    `warning` says what the routing file asks for and cannot have.
    """

    stable: Manifest | None
    canary: Manifest | None
    shadow: Manifest | None
    others: tuple[Manifest, ...]
    warning: str

    def roles(self, name: str) -> list[Role]:
        """The roles of a release."""
        parts: dict[Role, Manifest | None] = {"stable": self.stable, "canary": self.canary, "shadow": self.shadow}
        return [role for role, release in parts.items() if release and release.name == name]


class Router:
    """Combines the file's routing with the releases that may answer."""

    def __init__(self, file: RoutingFile, releases: Catalogue) -> None:
        self.file = file
        self._releases = releases
        self._from: tuple[Routing, list[Manifest], bool] | None = None
        """What `_in_force` was made from: most requests find it as it was."""
        self._in_force: InForce
        self._warned = self._stable_name = ""

    def in_force(self) -> InForce:
        """The roles, as they can be filled now."""
        routing, active = self.file.routing, self._releases.active()
        found = routing, active, not self._stable_name and self._is_better_coming(routing, active)
        if found != self._from:
            self._from, self._in_force = found, self._fill(*found)
        return self._in_force

    def _is_better_coming(self, routing: Routing, active: list[Manifest]) -> bool:
        """Whether the stable release is still being tried, and another would answer in its place for a moment."""
        coming = [release for release in self._releases.coming() if release.name not in routing.on_trial]
        if routing.stable != LATEST:
            return any(release.name == routing.stable for release in coming)
        newest = max((release.number for release in active if release.name not in routing.on_trial), default=0)
        return any(release.number > newest for release in coming)

    def _fill(self, routing: Routing, active: list[Manifest], is_better_coming: bool) -> InForce:
        if is_better_coming:
            return InForce(None, None, None, (), "")
        by_name = {release.name: release for release in active}
        shadow = routing.shadow.release if routing.shadow else None
        # A canary answers already, so it may answer more; a shadow never does.
        able = [release for release in active if release.name != shadow]
        proven = [release for release in able if release.name not in routing.on_trial]
        latest = next(iter(proven or able), None)
        if routing.stable == LATEST:
            stable = latest
        else:
            stable = by_name.get(routing.stable) or _before(routing.stable, proven) or latest
        warnings = []
        if stable and routing.stable not in (LATEST, stable.name):
            warnings.append(f"stable {routing.stable} is not active: {stable.name} answers")
        if stable is None and active:
            warnings.append(f"{active[0].name} is the shadow, which never answers: no other release is active")
        trials: dict[str, Manifest | None] = {}
        for role, rule in (("canary", routing.canary), ("shadow", routing.shadow)):
            trials[role] = by_name.get(rule.release) if rule else None
            if rule and trials[role] is None:
                warnings.append(f"{role} {rule.release} is not active: it gets no requests")
            elif rule and trials[role] is stable:
                trials[role] = None
                warnings.append(f"{role} {rule.release} is also the stable release")
        warning = "; ".join(warnings)
        if warning != self._warned and (active or self._warned):
            self._warned = warning
            if warning:
                logger.warning("routing cannot be met", extra={"fields": {"warning": warning}})
            else:
                logger.info("routing is met")
        name = stable.name if stable else ""
        if name != self._stable_name:
            self._stable_name = name
            logger.info("stable release", extra={"fields": {"release": name, "asked_for": routing.stable}})
        canary = trials["canary"]
        # Should stable fail: what answered before it, and only then what is newer.
        others = [release for release in able if release not in (stable, canary)]
        others.sort(key=lambda each: (stable is not None and each.number < stable.number, each.number), reverse=True)
        return InForce(stable, canary, trials["shadow"], tuple(others), warning)

    def stable(self) -> Manifest:
        """The release that answers what is neither pinned nor the canary's.

        Raises:
            Failure: triton_unavailable or no_release.
        """
        return self._stable(self.in_force())

    def share(self, name: str) -> float:
        """The percentage of the requests without a pin that a release is chosen for now."""
        in_force = self.in_force()
        to_canary = self.file.routing.canary.percent if self.file.routing.canary and in_force.canary else 0.0
        shares = {"stable": 100.0 - to_canary, "canary": to_canary}
        return sum(shares.get(role, 0.0) for role in in_force.roles(name))

    def choose(self, pin: str | None, metadata: Metadata, headers: Mapping[str, str]) -> list[Choice]:
        """Who may answer a request, in this order.

        Raises:
            Failure: the pinned release cannot answer, or none can.
        """
        if pin is not None:
            return [Choice(self._pinned(pin), "pinned")]
        in_force = self.in_force()
        stable = self._stable(in_force)
        rest = [Choice(release, "fallback") for release in in_force.others]
        rule = self.file.routing.canary
        if in_force.canary and rule and draw(_sticky(rule.sticky, metadata, headers)) < rule.percent:
            return [Choice(in_force.canary, "canary"), Choice(stable, "fallback"), *rest]
        return [Choice(stable, "stable"), *rest]

    def _pinned(self, name: str) -> Manifest:
        known = self._releases.find(name)
        if known and known.manifest and not known.reason:
            return known.manifest
        if known:
            raise Failure("release_unavailable", f"{name} may not answer now: /version says why", cause=known.reason)
        if not self._releases.known:
            raise self._nobody()
        raise self.not_there(name)

    def not_there(self, name: str) -> Failure:
        """What to say of a release that is not known."""
        there = f"there are {', '.join(release.name for release in self._releases.known) or 'none'}"
        parsed = parse_release_name(name)
        if parsed and parsed[0] == self._releases.pipeline and parsed[1] <= self._releases.newest_number:
            return Failure("retired_release", f"{name} is not there any more; {there}")
        return Failure("unknown_release", f"{name[:64]!r} is no release; {there}")

    def _stable(self, in_force: InForce) -> Manifest:
        if in_force.stable is None:
            raise self._nobody()
        return in_force.stable

    def _nobody(self) -> Failure:
        if self._releases.triton_version is None:
            return Failure("triton_unavailable", "Triton has not been reached yet")
        known = [f"{release.name}: {release.reason}" for release in self._releases.known if release.reason]
        pipeline = self._releases.pipeline
        if known:
            said = "each has a reason in /version"
        elif self._releases.known:
            said = "what is left is the shadow, which never does"
        else:
            said = "Triton has none of it, or shows none"
        return Failure("no_release", f"no release of {pipeline} may answer: {said}", cause="; ".join(known))


def _before(name: str, proven: list[Manifest]) -> Manifest | None:
    """The newest release before the one that is named and not there: what is newer may be why that was named."""
    parsed = parse_release_name(name)
    return next((release for release in proven if parsed and release.number < parsed[1]), None)


def draw(key: str | None) -> float:
    """A number in [0, 100): the same for the same key, by chance without one.

    A share takes the numbers below it, so a key that is in stays in as the share grows.
    """
    if key is None:
        return random.random() * 100  # noqa: S311 - a share of traffic, no secret
    digest = hashlib.blake2b(key.encode(), digest_size=6, person=b"canary").digest()
    return int.from_bytes(digest) / 2**48 * 100


def _sticky(rule: str | None, metadata: Metadata, headers: Mapping[str, str]) -> str | None:
    """The value that a request has where `sticky` points to; None where it has none."""
    kind, _, name = (rule or "").partition(":")
    value = metadata.get(name) if kind == "metadata" else headers.get(name) if kind == "header" else None
    return str(value) if value not in (None, "") else None
