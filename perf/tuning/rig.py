"""Where settings are tried: a copy of the release, configured by the export's own renderer, on an embedded Triton.

The present settings run beside it all the time and are measured in turns with it, so what a busy machine does to one
it does to both. What is not being measured is idle.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import contract
from export import config
from export.config import Serving
from export.repository import Repository
from harness.ports import free_endpoint
from perf import analyzer
from perf.analyzer import Measurement
from perf.tuning.choice import Round, Trial
from triton_runtime.server import TritonFailed, TritonServer

_WARM_UP_S, _WARM_UP_CALLS = 1.0, 2


@dataclass(frozen=True)
class Calls:
    """Pictures in flight, and how many of them share one call."""

    pictures: Sequence[Path]
    concurrency: int
    group: int = 1


class Rig:
    """Tries settings on one release. Use as a context manager; Triton is started when the first trial needs it.

    Args:
        repository: where the release is; it is copied, and not touched.
        release: what is served.
        present: the settings that others are measured against.
        load: what is sent.
        log: the file that every Triton's log is appended to.
    """

    def __init__(
        self, repository: Repository, release: contract.Manifest, present: Serving, load: Calls, log: Path
    ) -> None:
        self._repository = repository
        self._release = release
        self._present = present
        self._load = load
        self._log = log
        self._running = contextlib.ExitStack()
        self._present_url = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    def compare(self, serving: Serving, *, rounds: int, seconds: float) -> Trial:
        """Measure settings and the present ones in turns, so many seconds each time.

        Settings that Triton does not start with are no error here: the trial says so.

        Raises:
            PerfError, TritonFailed, Missing: it cannot be measured at all; the message says why.
        """
        if not self._present_url:
            self._present_url = self._running.enter_context(self._serve(self._present))
        calls = max(1, self._load.concurrency // self._load.group)
        try:
            with self._serve(serving) as url:
                found = []
                for number in range(rounds):
                    measured = {}
                    # Whoever comes first changes: what goes before is not the same for both.
                    for each in (url, self._present_url)[:: 1 if number % 2 else -1]:
                        measured[each] = self._measure(each, seconds, calls)
                    found.append(Round(measured[url], measured[self._present_url]))
                return Trial(serving, tuple(found))
        except TritonFailed as failed:
            return Trial(serving, (), str(failed))

    @contextlib.contextmanager
    def _serve(self, serving: Serving) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="tune-") as folder:
            root = Path(folder, "model_repository")
            lay_out(self._repository, self._release, serving, root)
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log, TritonServer(root, free_endpoint(), log=log) as server:
                server.wait_until_ready()
                url = server.endpoint.grpc_url
                self._measure(url, _WARM_UP_S, calls=_WARM_UP_CALLS)
                yield url

    def _measure(self, url: str, seconds: float, calls: int) -> Measurement:
        return analyzer.measure(
            self._release.name,
            url,
            self._load.pictures,
            calls,
            group=self._load.group,
            interval_ms=round(1000 * seconds / analyzer.WINDOWS),
        )


def lay_out(repository: Repository, release: contract.Manifest, serving: Serving, root: Path) -> None:
    """Copy one release into an empty repository, its steps configured by these settings."""
    pipeline, labels, size = release.pipeline, len(release.labels), repository.size(release.pipeline)
    shutil.copytree(repository.root / release.name, root / release.name)
    versions = {step: [pin.version] for step, pin in release.steps.items()}
    configs = {
        "preprocess": config.preprocess(pipeline, versions["preprocess"], size, serving),
        "classifier": config.classifier(pipeline, versions["classifier"], size, labels, serving),
        "postprocess": config.postprocess(pipeline, versions["postprocess"], labels, serving),
    }
    for step, pin in release.steps.items():
        version = repository.step_folder(pipeline, step, pin.version)
        folder = root / version.parent.name
        shutil.copytree(version, folder / version.name)
        (folder / "config.pbtxt").write_bytes(config.render(configs[step]))
