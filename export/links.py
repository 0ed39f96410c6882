"""Links in a repository that harm Triton: removed at first sight.

At each poll Triton dates a model by everything below its folder, through links to folders. With one that leads to a
large tree it answers nothing until the walk is over, and a server that starts does not come up. Two kinds stay: a whole
model may lie elsewhere, and so may a version that a release pins. Somebody moved it.

A link in a model's folder that leads nowhere, or to itself, is worse: Triton cannot tell what it is, and then takes
no notice of the whole model, at a start of none of its versions. Whatever its name is, and be it an editor's lock.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import contract
from export import exam
from export.exam import Verdict
from export.exam_worker import Check
from export.publish import write_verdict
from export.repository import Repository, holds_config, is_version

WHY = "Triton would follow it, or stumble over it, at every poll"


@dataclass(frozen=True)
class Cleared:
    """What was done: the verdicts that are left on versions that no release pins, and where other links led."""

    refused: dict[Path, Verdict] = field(default_factory=dict)
    removed: dict[Path, str] = field(default_factory=dict)


def clear(repository: Repository) -> Cleared:
    """Remove the links that harm. In a version that no release pins, the verdict says where each led.

    Such a version that is itself a link becomes a folder. Where a pipeline's releases cannot be read, so that nobody
    knows what they pin, only links that lead nowhere go.

    Raises:
        OSError: the repository cannot be written.
    """
    cleared = Cleared()
    links = list(_harmful(repository.root))
    if not links:  # nearly always, so what releases pin need not be read at each look
        return cleared
    steps, pinned, unknown = _versions(repository)
    dropped: dict[Path, list[Path]] = defaultdict(list)
    others = []
    for path in links:
        model, *rest = path.relative_to(repository.root).parts
        version = repository.root.joinpath(model, *rest[:1])
        if (model in unknown or path in pinned) and path.exists():
            continue
        if model in steps and rest and is_version(version.name) and version not in pinned:
            dropped[version].append(path)
        else:
            others.append(path)
    for version, paths in dropped.items():
        cleared.refused[version] = _remove_and_refuse(repository, version, paths)
    cleared.removed.update(_remove(others))
    return cleared


def _versions(repository: Repository) -> tuple[set[str], set[Path], set[str]]:
    """The models that are steps, the versions that are pinned, and the steps whose pins are unknown."""
    steps, pinned, unknown = set(), set(), set()
    for pipeline in repository.pipelines():
        models = {step: contract.step_model(pipeline, step) for step in contract.STEPS}
        steps |= set(models.values())
        try:
            releases = repository.releases(pipeline)
        except Exception:  # whatever it is, it is said where the pipeline is looked at
            unknown |= set(models.values())
            continue
        pinned |= {
            repository.step_folder(pipeline, step, release.steps[step].version)
            for release in releases
            for step in contract.STEPS
        }
    return steps, pinned, unknown


def _remove_and_refuse(repository: Repository, version: Path, links: Iterable[Path]) -> Verdict:
    places = [
        f"{path.relative_to(repository.root)} is a link to {target}: copy what it stands for instead"
        for path, target in _remove(links).items()
    ]
    version.mkdir(exist_ok=True)
    check = Check(name="files", passed=False, detail="; ".join(places))
    verdict = Verdict(passed=False, checks=[check], seen=exam.state_of(version))
    write_verdict(repository, version, verdict)
    return verdict


def _harmful(root: Path) -> Iterator[Path]:
    """The links to folders, but for whole models, and those in a model's folder that lead nowhere."""
    for parent, names, files in os.walk(root):  # which names them, and does not follow them
        for path in (Path(parent, name) for name in names if os.path.islink(os.path.join(parent, name))):
            if path.parent != root or not holds_config(path):
                yield path
        if Path(parent).parent == root:
            yield from (path for name in files if (path := Path(parent, name)).is_symlink() and not path.exists())


def _remove(paths: Iterable[Path]) -> dict[Path, str]:
    removed = {path: os.readlink(path) for path in paths}
    for path in removed:
        path.unlink()
    return removed
