"""A release may answer only after it answered its golden pictures here, on this server, as its export recorded.

Runs beside everything else. The replays are no requests of users: they appear in no log line and no metric.
"""

from __future__ import annotations

import asyncio

import grpc

from contract import Manifest
from gateway.problems import Failure
from gateway.supervision import failed
from gateway.triton.client import Inference, MalformedAnswer, TritonClient, TritonError
from gateway.triton.inventory import Inventory, Known
from gateway.triton.verification import verify

_ATTEMPTS = 4
_PATIENCE_S = 5.0
"""For one picture: as long as a busy server may need, so that load cannot keep a new release out."""


async def replay(triton: TritonClient, release: Manifest) -> str:
    """What is wrong with the running release: which picture, and by how much. Empty where every answer agrees.

    Raises:
        TritonError: Triton gave no answer. That is no verdict: try again.
    """
    if not release.golden:
        return "it was published without golden pictures, so nothing shows that it runs as it should: publish it again"
    for golden in release.golden:
        try:
            inference = await _ask(triton, release.name, golden.image)
            verify(inference, release)
        except MalformedAnswer as error:
            return f"{golden.name}: not the tensors of a release: {error}"
        except Failure as failure:
            return f"{golden.name}: {failure}"
        if difference := golden.difference(inference.label, dict(inference.scores), release.tolerance):
            return difference
    return ""


async def _ask(triton: TritonClient, release: str, picture: bytes) -> Inference:
    """Ask until one process of a step that lost others is met: what is tried is the release, not each process."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return (await triton.infer(release, [picture], f"{release}:golden", _PATIENCE_S))[0]
        except TritonError as error:
            if error.status is not grpc.StatusCode.INTERNAL:
                raise
    return (await triton.infer(release, [picture], f"{release}:golden", _PATIENCE_S))[0]


async def follow(triton: TritonClient, releases: Inventory) -> None:
    """Try what has not been tried, after the next refresh; one release that hangs holds up no other."""
    await releases.refreshed.wait()
    releases.refreshed.clear()
    await asyncio.gather(*(_try(triton, releases, release) for release in releases.untried()))


async def _try(triton: TritonClient, releases: Inventory, release: Known) -> None:
    if release.manifest is None:
        return
    try:
        releases.judge(release, await replay(triton, release.manifest))
    except TritonError as error:
        releases.postpone(release, str(error))
    except Exception:
        failed(f"try {release.name}")
