"""`python -m export retire`: take releases back.

The ensemble goes first, then the versions that no other release pins leave Triton's sight. They stay on disk, since
they may not be buildable again, and the number of a release is never given to another one.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import contract
from contract.routing import LATEST, Routing
from export.repository import Repository, RepositoryError
from export.steps import REPOSITORY

ROUTING = REPOSITORY.parent / "routing" / "routing.toml"
"""The routing file of this checkout."""


def read_routing(path: Path) -> Routing:
    """The routing in force, as far as the file says; the default where there is none.

    Raises:
        ValueError: the file is not a routing.
    """
    return Routing.read(path) if path.is_file() else Routing()


def main(arguments: list[str] | None = None) -> int:
    """Retire each release that is named; 1 where one may not be."""
    parse = argparse.ArgumentParser(
        prog="python -m export retire", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("release", nargs="+", help="such as defect-v3")
    parse.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help="default: model_repository")
    parse.add_argument("--routing", type=Path, default=ROUTING, metavar="FILE", help="what it names is not retired")
    options = parse.parse_args(arguments)
    repository = Repository(options.repository)
    try:
        routing = read_routing(options.routing)
        for name in options.release:
            repository.retire(name, partial(_require_unrouted, repository, name, routing))
            print(f"retired {name}")
    except (RepositoryError, ValueError, OSError) as error:
        print(f"not retired: {error}", file=sys.stderr)
        return 1
    return 0


def _require_unrouted(repository: Repository, name: str, routing: Routing) -> None:
    if role := routing.releases().get(name):
        raise RepositoryError(f"{name} is routed to ({role}): change the routing first")
    parsed = contract.parse_release_name(name)
    if routing.stable == LATEST and parsed and (releases := repository.releases(parsed[0])):
        proven = [r.name for r in releases if not repository.lacks(r) and r.name not in routing.on_trial]
        if proven[-1:] == [name]:
            raise RepositoryError(f"{name} is the latest, which answers: set stable to another one first")
