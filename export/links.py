"""Links to folders in a repository: removed at first sight, because Triton follows them.

At each poll Triton dates a model by everything below its folder, through links. With one that leads to a large tree
it answers nothing until the walk is over, and a server that starts does not come up.

Two kinds stay. A whole model may lie elsewhere, and so may a version that a release pins: somebody moved it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import contract
from export import exam, walk
from export.exam import Verdict
from export.exam_worker import Check
from export.publish import write_verdict
from export.repository import Repository, holds_config


def refuse(repository: Repository, pipeline: str) -> dict[Path, Verdict]:
    """Take links to folders out of every version that no release pins. Returns the verdicts that this left there.

    A version that is itself a link becomes a folder. Where a link led is in the verdict.

    Raises:
        OSError: the repository cannot be written.
        RepositoryError: a release cannot be read, so nobody knows what it pins.
    """
    refused = {}
    for step in contract.STEPS:
        for number in repository.unpinned(pipeline, step):
            folder = repository.step_folder(pipeline, step, number)
            if verdict := _refuse(repository, folder):
                refused[folder] = verdict
    return refused


def _refuse(repository: Repository, folder: Path) -> Verdict | None:
    links = _remove([folder] if folder.is_symlink() else _to_folders(folder))
    if not links:
        return None
    folder.mkdir(exist_ok=True)
    places = [
        f"{path.relative_to(repository.root)} is a link to {target}: copy what it stands for instead"
        for path, target in links.items()
    ]
    check = Check(name="files", passed=False, detail="; ".join(places))
    verdict = Verdict(passed=False, checks=[check], seen=exam.state_of(folder))
    write_verdict(repository, folder, verdict)
    return verdict


def sweep(repository: Repository) -> dict[Path, str]:
    """Remove the links to folders that lie anywhere else. Returns where each led.

    In the steps of a pipeline of which a release cannot be read everything stays: nobody knows what it pins.

    Raises:
        OSError: the repository cannot be written.
    """
    pinned, unknown = set(), set()
    for pipeline in repository.pipelines():
        steps = {step: repository.root / contract.step_model(pipeline, step) for step in contract.STEPS}
        try:
            releases = repository.releases(pipeline)
        except Exception:  # whatever it is, it is said where the pipeline is looked at
            unknown |= set(steps.values())
            continue
        pinned |= {steps[step] / str(release.steps[step].version) for release in releases for step in steps}
    return _remove(
        path
        for path in _to_folders(repository.root)
        if path not in pinned
        and unknown.isdisjoint((path, *path.parents))
        and not (path.parent == repository.root and holds_config(path))
    )


def _to_folders(folder: Path) -> Iterator[Path]:
    for path in walk.below(folder):
        with suppress(OSError):  # as `walk.below` says
            if path.is_symlink() and path.is_dir():
                yield path


def _remove(paths: Iterable[Path]) -> dict[Path, str]:
    removed = {path: os.readlink(path) for path in list(paths)}
    for path in removed:
        path.unlink()
    return removed
