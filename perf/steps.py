"""What each step of a release is fed with on its own: real pictures, taken through the release's own steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import contract
from contract import Manifest
from export import config
from export.backend import Pipeline
from export.repository import Repository
from perf.analyzer import PerfError

Rows = list[dict[str, np.ndarray]]
"""A request each: tensors without the batch axis, by name."""

_MOST_PICTURES = 64


def pictures_in(folder: Path) -> list[Path]:
    """At most 64 of a folder's pictures, evenly chosen.

    Raises:
        PerfError: it holds none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not found:
        raise PerfError(f"{folder} holds no pictures (jpg, png, webp)")
    return found[:: -(-len(found) // _MOST_PICTURES)]


def inputs(repository: Repository, release: Manifest, pictures: Sequence[Path]) -> Mapping[str, Rows]:
    """The inputs of the ensemble and of each step, one row a picture.

    Raises:
        PerfError: the release is not complete on disk, or cannot use a picture: refusing one is quicker than answering,
            so it would flatter the figures.
    """
    if lacks := repository.lacks(release):
        what = ", ".join(f"{model} {how}" for model, how in lacks.items())
        raise PerfError(f"{release.name} is not complete ({what}): run 'make export'")
    pins = {step: release.steps[step].version for step in contract.STEPS}
    folders = {step: repository.step_folder(release.pipeline, step, version) for step, version in pins.items()}
    configs = {step: config.parse((path.parent / "config.pbtxt").read_text()) for step, path in folders.items()}
    pipeline = Pipeline(folders, configs)
    rows: dict[str, Rows] = {"ensemble": [], **{step: [] for step in contract.STEPS}}
    for path in pictures:
        known = pipeline.tensors([path.read_bytes()])
        if error := known[contract.ERROR][0, 0]:
            raise PerfError(f"{path} is nothing that {release.name} can use ({error.decode()}): take it out")
        rows["ensemble"].append({contract.IMAGE: known[contract.IMAGE][0]})
        for step in contract.STEPS:
            taken, _ = config.WIRING[step]
            rows[step].append({name: known[of][0] for name, of in taken.items()})
    return rows
