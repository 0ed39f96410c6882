"""`python -m export status`: the releases in a repository, what each pins, and what no release pins."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import contract
from export.repository import Repository, RepositoryError
from export.steps import REPOSITORY


def table(repository: Repository, pipeline: str) -> Table:
    """One row a release, newest first: the number of each step, whether it is on disk, figures and origin.

    Raises:
        RepositoryError: a release cannot be read.
    """
    result = Table(title=pipeline, title_justify="left")
    for header in ("release", *contract.STEPS, "on disk", "accuracy", "built at", "built from"):
        result.add_column(header)
    for release in reversed(repository.releases(pipeline)):
        lacks = [f"{model} {how}" for model, how in repository.lacks(release).items()]
        result.add_row(
            release.name,
            *(f"{pin.version} ({pin.digest[:8]})" for pin in release.steps.values()),
            ", ".join(lacks) or "complete",
            str(release.evaluation.get("accuracy", "-")),
            release.built_at,
            release.built_from,
        )
    return result


def unpinned(repository: Repository, pipeline: str) -> list[Path]:
    """The numbered folders that no release pins: drops, and what retired releases left. Triton does not see them."""
    releases = repository.releases(pipeline)
    return [
        repository.step_folder(pipeline, step, version)
        for step in contract.STEPS
        for version in repository.versions(pipeline, step)
        if version not in {release.steps[step].version for release in releases}
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each pipeline; 1 where a release cannot be read."""
    parse = argparse.ArgumentParser(prog="python -m export status", description=__doc__)
    parse.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help="default: model_repository")
    options = parse.parse_args(arguments)
    console, repository = Console(), Repository(options.repository)
    pipelines = repository.pipelines()
    if not pipelines:
        console.print(f"{options.repository} holds no release: run 'make export'", markup=False)
        return 1
    try:
        for pipeline in pipelines:
            console.print(table(repository, pipeline))
            for folder in unpinned(repository, pipeline):
                console.print(f"not in a release: {folder.relative_to(options.repository)}", markup=False)
    except RepositoryError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    return 0
