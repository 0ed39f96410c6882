"""Which releases there are, learnt from Triton over gRPC alone, and which of them answers.

A background task follows Triton. While Triton is away the last known releases are kept, so that the first
request after its return is answered, not refused.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import contract
from contract import Manifest
from gateway.errors import Failure
from gateway.triton import ModelState, TritonClient, TritonError

logger = logging.getLogger("gateway.releases")


@dataclass(frozen=True)
class Known:
    """A release of the pipeline. The manifest is None where it could not be read; then it is not ready."""

    name: str
    number: int
    ready: bool
    reason: str
    manifest: Manifest | None


class Releases:
    """The releases of one pipeline, kept current by `follow`."""

    def __init__(self, triton: TritonClient, pipeline: str, probe_timeout: float) -> None:
        self._triton = triton
        self._pipeline = pipeline
        self._timeout = probe_timeout
        self.known: tuple[Known, ...] = ()
        self.triton_version: str | None = None
        """None while Triton cannot be reached."""

    def stable(self) -> Manifest:
        """The release that answers: the newest that is ready.

        Raises:
            Failure: triton_unavailable or no_release.
        """
        for release in reversed(self.known):
            if release.ready and release.manifest:
                return release.manifest
        if self.triton_version is None:
            raise Failure("triton_unavailable", "Triton has not been reached yet")
        raise Failure("no_release", f"Triton holds no release of {self._pipeline} that is ready")

    async def follow(self, seconds: float) -> None:
        """Refresh for ever, every so many seconds."""
        while True:
            await self.refresh()
            await asyncio.sleep(seconds)

    async def refresh(self) -> None:
        """Ask Triton once. Never raises: what cannot be learnt now is asked again later."""
        try:
            back = self.triton_version is None  # first contact, or a restart: what was known may be stale
            version = self.triton_version or await self._triton.version(self._timeout)
            known = await self._ask(fresh=back)
        except TritonError as error:
            if self.triton_version is not None:
                logger.warning("triton lost", extra={"fields": {"reason": str(error)}})
            self.triton_version = None
            return
        except Exception:
            logger.exception("refreshing the releases failed")
            return
        if back:
            logger.info("triton reached", extra={"fields": {"triton": version}})
        for release in known:
            if release not in self.known:
                fields = {"release": release.name, "ready": release.ready, "reason": release.reason}
                logger.info("release changed", extra={"fields": fields})
        self.triton_version, self.known = version, known

    async def _ask(self, fresh: bool) -> tuple[Known, ...]:
        before = {} if fresh else {release.name: release for release in self.known}
        known = []
        for state in await self._triton.index(self._timeout):
            parsed = contract.parse_release_name(state.name)
            if parsed and parsed[0] == self._pipeline:
                known.append(await self._look_at(state, parsed[1], before.get(state.name)))
        return tuple(sorted(known, key=lambda release: release.number))

    async def _look_at(self, state: ModelState, number: int, before: Known | None) -> Known:
        if not state.ready:
            return Known(state.name, number, False, state.reason, before.manifest if before else None)
        if before and before.ready:
            return before
        try:
            parameters = await self._triton.parameters(state.name, self._timeout)
            return Known(state.name, number, True, "", Manifest.from_parameters(state.name, parameters))
        except ValueError as error:
            return Known(state.name, number, False, str(error), None)
