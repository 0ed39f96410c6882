"""What the core knows, as the public JSON shows it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import contract
from gateway import __version__
from gateway.api import schemas
from gateway.problems import PROBLEMS

if TYPE_CHECKING:  # what is shown
    from gateway.routing.router import Router
    from gateway.service import Prediction, Service
    from gateway.triton.inventory import Known

CONTRACT = "v1"


def timing(prediction: Prediction, started: float) -> dict[str, float]:
    """Where the time of a request went that started then (monotonic seconds): milliseconds, as `schemas.Timing`."""
    began, prepared, decided, ended = prediction.answer.inference.times_ns
    sent = prediction.answer.sent
    return {
        "read": round((prediction.began - started) * 1e3, 3),
        "admit": round((sent - prediction.began) * 1e3, 3),
        "queue": round(max(0.0, (prediction.ended - sent) * 1e3 - (ended - began) / 1e6), 3),
        "preprocess": round((prepared - began) / 1e6, 3),
        "infer": round((decided - prepared) / 1e6, 3),
        "postprocess": round((ended - decided) / 1e6, 3),
        "total": round((prediction.ended - started) * 1e3, 3),
    }


def prediction(request_id: str, prediction: Prediction, timing: dict[str, float]) -> schemas.PredictResponse:
    """The answer to one picture."""
    answer, inference = prediction.answer, prediction.answer.inference
    return schemas.PredictResponse(
        request_id=request_id,
        model_version=answer.release.name,
        route=answer.route,
        label=inference.label,
        confidence=_probability(inference.confidence),
        scores=[schemas.Score(label=name, confidence=_probability(p)) for name, p in inference.scores],
        metadata=prediction.metadata,
        timing_ms=schemas.Timing(**timing),
    )


def server_timing(timing: dict[str, float]) -> str:
    """The same as `timing`, as the header Server-Timing."""
    return ", ".join([f"{name};dur={value}" for name, value in timing.items()])


def version(service: Service) -> schemas.Version:
    """Everything that has a version."""
    stable = service.router.in_force().stable
    return schemas.Version(
        gateway=__version__,
        contract=CONTRACT,
        triton=service.releases.triton_version,
        pipeline=schemas.Pipeline(
            name=service.settings.pipeline,
            stable=stable.name if stable else None,
            releases=[_release(known) for known in _known(service)],
            routing=_routing(service.router),
        ),
        access=schemas.Access(required=service.keys.are_needed, error=service.keys.error),
    )


def error(code: str) -> schemas.ErrorKind:
    """A row of the table of errors."""
    return schemas.ErrorKind(code=code, **asdict(PROBLEMS[code]))


def releases(service: Service) -> schemas.Releases:
    """Every release, and what it is used for now."""
    in_force = service.router.in_force()
    return schemas.Releases(
        pipeline=service.settings.pipeline,
        stable=in_force.stable.name if in_force.stable else None,
        releases=[
            schemas.RoutedRelease(
                name=known.name,
                state=_state(known),
                reason=known.reason,
                share=service.router.share(known.name),
                roles=in_force.roles(known.name),
            )
            for known in _known(service)
        ],
        routing=_routing(service.router),
    )


def _known(service: Service) -> list[Known]:
    """Every release, oldest first; one that does not answer now is unavailable, whatever was known of it."""

    def reason(known: Known) -> str:
        if not known.reason and not service.fleet.available():
            return "no Triton answers"
        if not known.reason and service.fleet.is_down(known.name):
            return f"it failed: {service.fleet.suspicions(known.name)}"
        return known.reason

    return [replace(known, reason=reason(known)) for known in service.releases.known]


def _routing(router: Router) -> schemas.Routing:
    file = router.file
    return schemas.Routing(
        stable=file.routing.stable,
        canary=file.routing.canary,
        shadow=file.routing.shadow,
        since=file.since,
        error=file.error,
        warning=router.in_force().warning,
    )


def _release(known: Known) -> schemas.Release:
    manifest = known.manifest
    description = schemas.Release(name=known.name, state=_state(known), reason=known.reason)
    if manifest is None:
        return description
    return description.model_copy(
        update={
            "labels": list(manifest.labels),
            "steps": {
                step: schemas.StepVersion(
                    model=contract.step_model(manifest.pipeline, step), version=pin.version, digest=pin.digest
                )
                for step, pin in manifest.steps.items()
            },
            "built_from": manifest.built_from,
            "built_at": manifest.built_at,
            "evaluation": dict(manifest.evaluation),
            "exam": dict(manifest.exam),
        }
    )


def _state(known: Known) -> schemas.State:
    return "unavailable" if known.reason else "ready"


def _probability(value: float) -> float:
    """float32 carries seven digits; rounding may lie a hair outside of [0, 1]."""
    return min(1.0, max(0.0, round(value, 7)))
