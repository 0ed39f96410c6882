"""Real parts for every test: a repository that was exported, the embedded Triton on it, the gateway on a socket."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import onnx
import psutil
import pytest

from export import build
from export.__main__ import main as export_main
from export.config import Serving
from export.exam import Rules
from export.publish import Examiner
from export.repository import Repository
from harness import ROOT as ROOT
from harness import waiting
from harness.gateway import GatewayProcess
from harness.ports import free_endpoint as free_endpoint
from harness.ports import free_port as free_port
from tests import drops
from tests.offline import Offline
from tests.two_releases import publish_contrary
from triton_runtime.server import Endpoint, TritonServer

EXAMPLES = sorted((ROOT / "examples").glob("*.jpg"))
http = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0))
"""As `httpx` itself, a connection for each request, without reading all the authorities first: 70 ms of processor."""
wait_for = partial(waiting.wait_for, meanwhile=httpx.TransportError)
"""Until a condition holds, which may ask what does not listen yet."""
PARCELS = Path(os.environ.get("PARCELS", ROOT.parent / "shared" / "data" / "parcels"))


def process_of(triton: Endpoint) -> psutil.Process:
    """The server that listens there."""
    (server,) = [
        process for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "tritonserver" and f"--grpc-port={triton.grpc}" in (process.info["cmdline"] or ())
    ]  # fmt: skip
    return server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one of them when the others are done."""
    longest = ("test_release_cycles.py", "test_drops.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout's repository, exported completely. Shared: copy it before changing it."""
    root = tmp_path_factory.mktemp("pristine") / "model_repository"
    shutil.copytree(ROOT / "model_repository", root)
    assert export_main(["--repository", str(root)]) == 0
    return root


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Only what nothing refers to is freed, at once: reference cycles stay."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def repository(pristine: Path, tmp_path: Path) -> Path:
    """A repository of the test's own."""
    return Path(shutil.copytree(pristine, tmp_path / "model_repository"))


@pytest.fixture(scope="session")
def release(pristine: Path) -> str:
    """The name of the release that answers."""
    return Repository(pristine).releases("defect")[-1].name


@pytest.fixture(scope="session")
def triton(pristine: Path) -> Iterator[Endpoint]:
    """A real Triton on the pristine repository."""
    with TritonServer(pristine, free_endpoint(), poll_seconds=1) as server:
        server.wait_until_ready()
        yield server.endpoint


@pytest.fixture(scope="session")
def gateway(triton: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A real gateway in front of that Triton, with a short limit on bodies so that it can be tested."""
    log = tmp_path_factory.mktemp("gateway") / "log.jsonl"
    # A long deadline: the machine that tests run on may be slow, and deadlines have tests of their own.
    with GatewayProcess(triton, log, max_body_bytes=8 * 2**20, deadline_s=60, log_level="debug") as process:
        wait_for(process.is_ready)
        yield process


@pytest.fixture(scope="session")
def pristine_pair(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with defect-v1 and defect-v2, which answer differently. Shared: copy it before changing it."""
    root = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("pair") / "model_repository"))
    assert publish_contrary(root) == "defect-v2"
    return root


@pytest.fixture
def pair(pristine_pair: Path, tmp_path: Path) -> Path:
    """Both releases, in a repository of the test's own."""
    return Path(shutil.copytree(pristine_pair, tmp_path / "model_repository"))


@pytest.fixture(scope="session")
def pair_triton(pristine_pair: Path) -> Iterator[Endpoint]:
    """A real Triton with both releases."""
    with TritonServer(pristine_pair, free_endpoint(), poll_seconds=1) as server:
        server.wait_until_ready()
        yield server.endpoint


@pytest.fixture(scope="session")
def tiny_only(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one small pipeline, `tiny`, published as a user would. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny")
    root = Path(shutil.copytree(pristine, folder / "model_repository"))
    onnx.save(drops.network(0.0), folder / "tiny.onnx")
    built = build.from_onnx(folder / "tiny.onnx", drops.SPEC, Repository(root), lambda _: None)
    Examiner(Repository(root), Serving.read(ROOT / "export/serving.toml"), Rules(nice=0)).publish(built, lambda _: None)
    for path in root.glob("defect*"):
        shutil.rmtree(path)
    return root


@pytest.fixture
def tiny(tiny_only: Path, tmp_path: Path) -> Repository:
    return Repository(Path(shutil.copytree(tiny_only, tmp_path / "model_repository")))


@pytest.fixture(scope="session")
def client(gateway: GatewayProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=90) as http:
        yield http


@pytest.fixture(scope="session")
def offline(pristine: Path) -> Offline:
    return Offline(pristine)


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """The validation photographs; the project's own drawings where the data is absent."""
    return sorted((PARCELS / "valid").glob("*/*.jpg")) or EXAMPLES


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    """One good picture."""
    return EXAMPLES[0].read_bytes()
