"""The service under load with one release and other settings: on a GPU or not, with more or fewer processes."""

from __future__ import annotations

import contextlib
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

import contract
from contract import Manifest
from export import config, graph
from export.repository import Repository
from harness import client
from perf import steps
from perf.analyzer import WINDOWS, Analyzer
from perf.bench.services import Service, stack
from perf.generator import Generator
from perf.gpu.shares import Shares, watched
from perf.load import Load, kind_of
from perf.tuning.rig import lay_out
from triton_runtime.installation import SERVING

_DEADLINE_S = 5.0
GROUP = 16
"""Pictures in a call over gRPC, as the gateway sends them under load."""


@dataclass(frozen=True)
class Setting:
    """How a release is served; `device` as in serving.toml, `instances` of the model per GPU."""

    precision: str
    device: str
    preprocess: int
    instances: int = 1
    threads: int = 2

    def __str__(self) -> str:
        return f"{self.precision} on {self.device}, preprocessing {self.preprocess}, model {self.instances}"

    def serving(self) -> config.Serving:
        """export/serving.toml with these values in it."""
        settings = tomllib.loads(SERVING.read_text())
        settings["preprocess"] = {"instances": self.preprocess}
        settings["classifier"] |= {"device": self.device, "instances": self.instances, "threads": self.threads}
        return config.Serving.model_validate(settings)


@dataclass(frozen=True)
class Row:
    """One load: pictures a second, milliseconds as the client saw them, and what was busy."""

    setting: Setting
    endpoint: str
    """gateway, over HTTP; ensemble or classifier, over gRPC with `GROUP` pictures in a call."""
    in_flight: int
    """Pictures."""
    throughput: float
    p50: float
    p99: float
    failed: Mapping[str, int] = field(default_factory=dict)
    generator: float = 0.0
    """Cores that making the load took, where it was made in this process."""
    shares: Shares = field(default_factory=Shares)


class Running:
    """The service with one setting, loaded."""

    def __init__(
        self,
        setting: Setting,
        service: Service,
        release: Manifest,
        grpc_url: str,
        repository: Repository,
        pictures: Sequence[Path],
        seconds: float,
        analyzer: Path,
    ) -> None:
        self._setting, self._service, self._release = setting, service, release
        self._grpc_url, self._repository, self._analyzer = grpc_url, repository, analyzer
        self._pictures, self._seconds = list(pictures), seconds

    def answers(self, pictures: Sequence[Path]) -> dict[str, dict[str, float]]:
        """The scores of each picture by its name, as the gateway answers."""
        found = {}
        for path in pictures:
            answer = client.predict(self._service.url, path.read_bytes(), kind_of(path), timeout=30)
            found[path.name] = {each["label"]: each["confidence"] for each in answer["scores"]}
        return found

    def over_http(self, connections: int) -> Row:
        """Each connection sends its next picture when it was answered, through the gateway."""
        parts = urlsplit(self._service.url)
        pictures = [path.read_bytes() for path in self._pictures]
        generator = Generator(parts.hostname or "", parts.port or 80, pictures, _DEADLINE_S)
        generator.closed(connections, 2 * self._seconds / 3)  # the gateway learns how many calls are worth it
        with watched(self._service) as shares:
            load = generator.closed(connections, self._seconds)
        latencies = load.answered_s or [float("nan")]
        p50, p99 = (1000 * float(np.percentile(latencies, each)) for each in (50, 99))
        rate, cost = len(load.answered_s) / load.seconds, load.generator_s / load.seconds
        return Row(self._setting, "gateway", connections, rate, p50, p99, dict(load.codes), cost, shares)

    def over_grpc(self, endpoint: str, calls: int) -> Row:
        """So many calls of `GROUP` pictures at once, to the ensemble or to the classifier alone.

        Raises:
            PerfError: perf_analyzer is not there, or did not finish.
        """
        model, version = self._release.name, None
        if endpoint == "classifier":
            model = contract.step_model(self._release.pipeline, endpoint)
            version = self._release.steps[endpoint].version
        with Analyzer(self._grpc_url, self._analyzer) as analyzer:
            # Few rows: perf_analyzer reads them all before it begins.
            rows = steps.inputs(self._repository, self._release, self._pictures[:GROUP])[endpoint]
            inputs = analyzer.store(endpoint, rows)
            interval = round(1000 * self._seconds / WINDOWS)
            with watched(self._service) as shares:
                found = analyzer.run(model, inputs, Load(calls), version=version, interval_ms=interval, group=GROUP)
        return Row(self._setting, endpoint, calls * GROUP, found.throughput, found.p50, found.p99, {}, shares=shares)


@contextlib.contextmanager
def running(
    setting: Setting,
    repository: Repository,
    release: Manifest,
    pictures: Sequence[Path],
    *,
    seconds: float,
    analyzer: Path,
    log: Path,
) -> Iterator[Running]:
    """The service with this setting, in a folder of its own. Triton's log is appended to `log`.

    Raises:
        TritonFailed, Missing, PerfError: it does not serve; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder, log.open("ab") as lines:
        root = Path(folder, "model_repository")
        lay_out(repository, release, setting.serving(), root)
        lines.write(f"--- {setting}\n".encode())
        lines.flush()
        with stack(root, lines) as (service, triton):
            url = triton.endpoint.grpc_url
            yield Running(setting, service, release, url, repository, pictures, seconds, analyzer)


def pixels(repository: Repository, release: Manifest, pictures: Sequence[Path]) -> np.ndarray:
    """The pictures as the classifier gets them: uint8 of shape (pictures, height, width, 3)."""
    rows = steps.inputs(repository, release, pictures)["classifier"]
    return np.stack([row[graph.PIXELS] for row in rows])


def largest_difference(one: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]) -> float:
    """Of a probability, over all pictures that both answered and all labels."""
    return max(
        abs(scores[label] - other[name][label]) for name, scores in one.items() if name in other for label in scores
    )
