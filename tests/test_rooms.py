"""What may import what: the rooms of the gateway, from the ground up. `docs/code.md` draws the same."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

GROUND = {"carried", "problems", "settings", "metrics", "logs", "supervision", "watched_file"}
ROOMS: dict[str, set[str]] = {
    **{name: set() for name in sorted(GROUND - {"carried"})},
    "carried": {"problems"},
    "api": {"problems"},
    "auth": {"carried", "problems", "settings", "watched_file"},
    "http": {"api", "auth", "carried", "metrics", "problems", "settings"},
    "fetch": {"http", "problems", "settings"},
    "triton": {"problems", "settings", "supervision"},
    "dispatch": {"triton", "metrics", "problems", "settings", "supervision"},
    "routing": {"api", "triton", "problems", "settings", "watched_file"},
    "predict": {"dispatch", "routing", "triton", "problems"},
    "comparison": {"api", "triton"},
    "mirrors": {"comparison", "predict", "dispatch", "routing", "metrics", "problems", "settings", "supervision"},
    "service": {
        "mirrors", "comparison", "predict", "dispatch", "routing", "triton", "fetch", "http", "auth", "api",
        "metrics", "problems", "settings", "supervision",
    },
    "app": {"service", "predict", "http", "auth", "api", "carried", "metrics", "problems", "settings"},
    "__main__": {"app", "http", "auth", "logs", "metrics", "settings"},
}  # fmt: skip
"""Each room with those that it imports, which stand above it. What is imported for types alone does not count."""
PROJECT = {"chaos", "contract", "export", "gateway", "harness", "perf", "tests", "triton_runtime"}
PACKAGES = {
    "contract": set(),
    "triton_runtime": {"contract"},
    "harness": {"triton_runtime"},
    "gateway": {"contract"},
    "export": {"contract", "model_repository"},
}


def imports(file: Path) -> Iterator[str]:
    """The modules that a file imports when it is imported."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room_of(module: str) -> str:
    """gateway.http.body -> http; empty for what is no module of the gateway."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gateway" and parts[1] in ROOMS else ""


def rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "gateway").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module != "gateway":
            assert room_of(module), f"{file} is in no room"
            others = found.setdefault(room_of(module), set())
            others |= {room_of(each) for each in imports(file)} - {"", room_of(module)}
    return found


def test_each_room_imports_what_the_table_says() -> None:
    assert rooms() == ROOMS


def test_imports_point_one_way() -> None:
    order = list(ROOMS)
    assert [(room, other) for room in order for other in ROOMS[room] if order.index(other) > order.index(room)] == []


@pytest.mark.parametrize("package", sorted(PROJECT - {"tests"}))
def test_nothing_imports_the_gateway(package: str) -> None:
    found = {each.split(".")[0] for file in (ROOT / package).rglob("*.py") for each in imports(file)} & PROJECT
    assert "gateway" not in found - {package}
    assert found - {package} <= PACKAGES.get(package, PROJECT)


@pytest.mark.parametrize(
    ("module", "not_loaded"),
    [
        ("gateway.settings", ["dns", "grpc", "fastapi"]),
        ("gateway.routing.rollback", ["dns", "grpc", "fastapi"]),
        ("gateway.routing.router", ["dns", "grpc"]),
        ("gateway.auth.api_keys", ["dns", "grpc"]),
    ],
)
def test_commands_and_values_load_no_more_than_they_need(module: str, not_loaded: list[str]) -> None:
    script = f"import sys, {module}; print(*[name for name in {not_loaded!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
