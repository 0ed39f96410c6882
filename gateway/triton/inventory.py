"""Which releases a Triton has, learnt over gRPC alone, and which of them may answer.

It is looked at again and again; activation reports here what it found. While Triton is away the last known releases
are kept, so that the first request after its return is answered, not refused.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import grpc

import contract
from contract import Manifest
from gateway.triton.client import ModelState, TritonClient, TritonError

CHECKING = "its golden pictures are being tried"
NOT_YET_ON = "not yet on "
"""Which servers lack what others are ready to answer with."""
_MOVING = "Triton does not have it, or is loading or unloading it"
logger = logging.getLogger("gateway.releases")


@dataclass(eq=False)
class Known:
    """A release of the pipeline as Triton holds it; another object each time that it is loaded.

    `reason` says why it may not answer; empty, it may. `is_tried` is false until its golden pictures were answered
    since it was loaded. The manifest is None where it could not be read. A call may have up to `max_batch` pictures.
    """

    name: str
    number: int
    manifest: Manifest | None
    reason: str
    is_loaded: bool = True
    is_tried: bool = True
    max_batch: int = 1

    @property
    def is_coming(self) -> bool:
        """Whether it may answer in a moment, unless something is wrong with it."""
        return self.reason.endswith(CHECKING) or self.reason.startswith(NOT_YET_ON)


class Inventory:
    """The releases of one pipeline on one Triton, kept current by calling `refresh`."""

    def __init__(self, triton: TritonClient, pipeline: str, probe_timeout: float) -> None:
        self._triton = triton
        self._timeout = probe_timeout
        self.pipeline = pipeline
        self.known: tuple[Known, ...] = ()
        """Oldest first."""
        self.newest_number = 0
        """The highest that was ever seen: up to there, what is not here was retired."""
        self.triton_version: str | None = None
        """None while Triton cannot be reached."""
        self.judgements = 0
        """How often one of `known` was given its reason since it was put there."""
        self.refreshed = asyncio.Event()
        """Set after each look at Triton."""

    def active(self) -> list[Manifest]:
        """The releases that may answer, newest first."""
        return [known.manifest for known in reversed(self.known) if known.manifest and not known.reason]

    def find(self, name: str) -> Known | None:
        """The release of this name, whether or not it may answer."""
        return next((known for known in self.known if known.name == name), None)

    def untried(self) -> list[Known]:
        """The releases whose golden pictures have still to be answered, newest first."""
        return [known for known in reversed(self.known) if not known.is_tried]

    def judge(self, release: Known, reason: str) -> None:
        """Let a release answer, or for a reason not."""
        release.is_tried, release.reason = True, reason
        self.judgements += 1
        _log(release)

    def postpone(self, release: Known, reason: str) -> None:
        """A release could not be tried now. One that answered before Triton went away goes on answering."""
        if release.reason:
            release.reason = f"{CHECKING}: {reason}"
            self.judgements += 1

    async def refresh(self) -> None:
        """Ask Triton once; what is known stays where that fails.

        Raises:
            TritonError: Triton gave no answer.
        """
        is_back = self.triton_version is None  # first contact, or a restart: what was known may be stale
        version = self.triton_version or await self._triton.version(self._timeout)
        known = await self._ask(is_back)
        if is_back:
            logger.info("triton reached", extra={"fields": {"triton": version}})
        before = {(release.name, release.reason) for release in self.known}
        for release in known:
            if (release.name, release.reason) not in before:
                _log(release)
        for name in {name for name, _ in before} - {release.name for release in known}:
            logger.info("release gone", extra={"fields": {"release": name}})
        self.triton_version, self.known = version, known
        self.newest_number = max([self.newest_number, *(release.number for release in known)])
        self.refreshed.set()

    async def _ask(self, is_back: bool) -> tuple[Known, ...]:
        before = {release.name: release for release in self.known}
        known = []
        for state in await self._triton.index(self._timeout):
            parsed = contract.parse_release_name(state.name)
            if parsed and parsed[0] == self.pipeline:
                known.append(await self._look_at(state, parsed[1], before.get(state.name), is_back))
        return tuple(sorted(known, key=lambda release: release.number))

    async def _look_at(self, state: ModelState, number: int, before: Known | None, is_back: bool) -> Known:
        if not state.is_ready:
            manifest = before.manifest if before else None
            reason = state.reason
            if not reason:
                # It is being loaded again and the old one serves until then, or it is not there at all: nothing in the
                # index tells which.
                is_there = before and manifest and await self._is_ready(state.name)
                reason = before.reason if before and is_there else _MOVING
            max_batch = before.max_batch if before else 1
            return Known(state.name, number, manifest, reason, is_loaded=False, max_batch=max_batch)
        stays = before is not None and before.is_loaded and not is_back
        is_refused = before is not None and before.is_tried and before.reason
        if before and stays and not is_refused:
            return before
        # A refused release is read again each time: it may have been replaced between two looks at the index.
        try:
            parameters, max_batch = await self._triton.config(state.name, self._timeout)
            manifest = Manifest.from_parameters(state.name, parameters)
        except ValueError as error:
            return Known(state.name, number, None, str(error))
        except TritonError as error:
            if error.status is grpc.StatusCode.UNAVAILABLE:
                raise
            if error.status is grpc.StatusCode.NOT_FOUND:
                return Known(state.name, number, None, "it was just unloaded", is_loaded=False)
            # The index was answered, so the server is fine: the other releases are not affected.
            return before or Known(state.name, number, None, str(error), is_loaded=False)
        if before and manifest == before.manifest:
            if stays:
                return before
            if not before.reason:  # it answered before it was loaded again: goes on while it is tried again
                return Known(state.name, number, manifest, "", is_tried=False, max_batch=max_batch)
        return Known(state.name, number, manifest, CHECKING, is_tried=False, max_batch=max_batch)

    async def _is_ready(self, name: str) -> bool:
        try:
            return await self._triton.is_ready(name, self._timeout)
        except TritonError:
            return False


def _log(release: Known) -> None:
    is_passing = not release.is_tried or release.reason in ("", _MOVING)  # each good release goes through it
    level = logging.INFO if is_passing else logging.WARNING
    fields = {"release": release.name, "active": not release.reason, "reason": release.reason}
    logger.log(level, "release changed", extra={"fields": fields})
