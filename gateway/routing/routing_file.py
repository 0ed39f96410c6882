"""The routing file, followed. A bad edit keeps the last good routing, and says so."""

from __future__ import annotations

from pathlib import Path

from contract import parse_release_name
from contract.routing import Routing
from gateway.watched_file import FollowedFile


class RoutingFile(FollowedFile[Routing]):
    """The last good routing of a file. No file at the start is the default routing."""

    def __init__(self, path: Path, pipeline: str) -> None:
        def read(path: Path) -> Routing:
            routing = Routing.read(path)
            for name in routing.releases():
                parsed = parse_release_name(name)
                if parsed is None or parsed[0] != pipeline:
                    raise ValueError(f"{path}: {name} is no release of the pipeline {pipeline}")
            return routing

        super().__init__(path, Routing(), read, lambda routing: routing.model_dump(exclude_none=True), "routing")

    @property
    def routing(self) -> Routing:
        """The routing in force."""
        return self.value
