"""`python -m export status`: the releases in a repository, what each pins, what routes where, and what was refused."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

import contract
from contract.routing import LATEST, Routing
from export import publish
from export.printing import wide_console
from export.repository import Repository, told
from export.retire import ROUTING, read_routing
from export.steps import REPOSITORY


def table(repository: Repository, pipeline: str, routing: Routing) -> Table:
    """One row a release, newest first: the number of each step, whether it is on disk, figures and origin.

    Raises:
        RepositoryError: a release cannot be read.
    """
    result = Table(title=pipeline, title_justify="left")
    for header in ("release", "routing", *contract.STEPS, "on disk", "exam", "accuracy", "built at", "built from"):
        result.add_column(header)
    roles, stable_is_open = routing.releases(), routing.stable == LATEST
    for release in reversed(repository.releases(pipeline)):
        lacks = [f"{model} {how}" for model, how in repository.lacks(release).items()]
        if stable_is_open and not lacks and release.name not in routing.on_trial:
            roles[release.name], stable_is_open = "stable (latest)", False
        result.add_row(
            release.name,
            roles.get(release.name, ""),
            *(f"{pin.version} ({pin.digest[:8]})" for pin in release.steps.values()),
            ", ".join(lacks) or "complete",
            "forced" if release.exam.get("forced") else "passed",
            str(release.evaluation.get("accuracy", "-")),
            release.built_at,
            release.built_from,
        )
    return result


def unpinned(repository: Repository, pipeline: str) -> dict[Path, str]:
    """The numbered folders that no release pins, and what they are. Triton does not see them."""
    found = {}
    for step in contract.STEPS:
        for version, owners in repository.unpinned(pipeline, step).items():
            folder = repository.step_folder(pipeline, step, version)
            if owners:
                found[folder] = f"of {', '.join(owners)}, which is not there any more"
            elif (verdict := publish.verdict_of(folder)) and verdict.is_open:
                found[folder] = f"dropped, in an exam since {verdict.at}"
            elif verdict:
                found[folder] = f"refused at {verdict.at}: {verdict.cause}"
            else:
                found[folder] = "dropped, not examined"
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each pipeline; 1 where one cannot be read."""
    parse = argparse.ArgumentParser(prog="python -m export status", description=__doc__)
    parse.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help="default: model_repository")
    parse.add_argument("--routing", type=Path, default=ROUTING, metavar="FILE", help="default: routing/routing.toml")
    options = parse.parse_args(arguments)
    console, repository = wide_console(), Repository(options.repository)
    pipelines = repository.pipelines()
    if not pipelines:
        console.print(f"{options.repository} holds no release: run 'make export'", markup=False)
        return 1
    try:
        routing = read_routing(options.routing)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    troubles = 0
    for pipeline in pipelines:
        try:
            console.print(table(repository, pipeline, routing))
            for folder, what in unpinned(repository, pipeline).items():
                place = folder.relative_to(options.repository)
                console.print(f"not in a release: {place}: {what}", markup=False, soft_wrap=True)
            repository.require_servable(pipeline)
        except Exception as error:  # whatever it is: the other pipelines are shown
            troubles += 1
            console.print(f"error: {pipeline}: {told(error)}", markup=False, soft_wrap=True)
    return 1 if troubles else 0
