"""`python -m perf.drops`: how long it takes from a dropped version to its first answer, and what takes how long.

Runs the whole stack on a copy of the repository, drops slightly different weights of the project's own model one
after the other, and reads the clock where each part hands over to the next.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.table import Table
from safetensors.numpy import load_file

from export import graph
from export.printing import wide_console
from export.repository import Repository
from harness import ROOT, SAMPLE
from harness.client import answers
from harness.commands import command, parser
from harness.gateway import GatewayProcess, whole_stack
from harness.waiting import wait_for
from triton_runtime.child import Child
from triton_runtime.server import Endpoint, TritonFailed

CHECKPOINT = ROOT / "export" / "checkpoints" / "defect"
PARTS = {
    "settle": "stands still, is noticed",
    "exam": "is examined, published",
    "poll": "is loaded by Triton",
    "activation": "is tried by the gateway",
    "answer": "answers a request",
}
_PATIENCE_S = 120.0
_BAR = 12
"""Characters that the whole is long."""


@dataclass
class Watching:
    """The watcher's events, by name and drop, as they come: seconds since the epoch."""

    at: dict[tuple[str, str], float] = field(default_factory=dict)
    causes: dict[str, str] = field(default_factory=dict)

    def read(self, lines: Iterable[bytes]) -> None:
        """Take in JSON lines until there are no more."""
        for line in lines:
            event = json.loads(line)
            if "drop" in event:
                self.at[event["event"], event["drop"]] = datetime.fromisoformat(event["time"]).timestamp()
                self.causes[event["drop"]] = event.get("cause", "")


@dataclass(frozen=True)
class WatchedStack:
    """What runs for a measurement."""

    repository: Repository
    triton: Endpoint
    gateway: GatewayProcess
    watching: Watching

    def drop(self, nudge: float) -> dict[str, float]:
        """Drop a version and wait for its first answer; the seconds that each of `PARTS` took.

        Raises:
            TritonFailed: it was refused, or did not answer in time.
        """
        picture = SAMPLE.read_bytes()
        number = 1 + max(self.repository.versions("defect", "classifier"))
        release = f"defect-v{1 + self.repository.releases('defect')[-1].number}"
        name = f"defect_classifier/{number}"
        staged = Path(tempfile.mkdtemp(dir=self.repository.root.parent)) / str(number)
        staged.mkdir()
        (staged / "model.onnx").write_bytes(_model(nudge))
        times = [time.time()]
        staged.rename(self.repository.root / name)
        judged = {("published", name), ("refused", name)}
        wait_for(lambda: any(each in self.watching.at for each in judged), _PATIENCE_S, pause=0.02)
        if ("refused", name) in self.watching.at:
            raise TritonFailed(f"{name} was refused: {self.watching.causes[name]}")
        times += [self.watching.at["examining", name], self.watching.at["published", name]]
        for condition in (
            lambda: answers(self.triton.url(f"/v2/models/{release}/ready")),
            lambda: self.gateway.releases().get(release) == "ready",
            lambda: self.gateway.predict(picture)["model_version"] == release,
        ):
            wait_for(condition, _PATIENCE_S, pause=0.02, meanwhile=OSError)
            times.append(time.time())
        return {part: after - before for part, (before, after) in zip(PARTS, pairwise(times), strict=True)}


@contextmanager
def running(repository: Path, settle_s: float) -> Iterator[WatchedStack]:
    """The whole stack and a watcher, on a copy of `repository`."""
    with tempfile.TemporaryDirectory(prefix="drops-") as folder:
        root = Path(shutil.copytree(repository, Path(folder, "model_repository")))
        watch = ["export", "watch", "--repository", str(root), "--settle-s", str(settle_s)]
        with (
            whole_stack(root, log_level="error") as (triton, gateway),
            Child(*watch, stdout=subprocess.PIPE) as watcher,
        ):
            watching = Watching()
            assert watcher.process.stdout is not None
            threading.Thread(target=watching.read, args=(watcher.process.stdout,), daemon=True).start()
            yield WatchedStack(Repository(root), triton.endpoint, gateway, watching)


def _model(nudge: float) -> bytes:
    card = json.loads((CHECKPOINT / "card.json").read_text())
    weights = load_file(CHECKPOINT / "model.safetensors")
    weights["_fc.bias"] = weights["_fc.bias"] + np.array([nudge, 0], np.float16)
    return graph.from_checkpoint(weights, card["labels"], card["temperature"]).SerializeToString()


def table(measured: list[dict[str, float]]) -> Table:
    """Mean and range of each part, and of the whole."""
    result = Table(title=f"from a drop to its first answer, {len(measured)} drops (seconds)", title_justify="left")
    for header in ("part", "mean", "range"):
        result.add_column(header, justify="left" if header == "part" else "right")
    result.add_column("", min_width=_BAR)
    result.add_column("the drop ...")
    totals = [sum(each.values()) for each in measured]
    for name, values in ({part: [each[part] for each in measured] for part in PARTS} | {"all": totals}).items():
        mean = statistics.mean(values)
        bar = "█" * round(_BAR * mean / statistics.mean(totals)) if name in PARTS else ""
        result.add_row(name, f"{mean:.2f}", f"{min(values):.2f} to {max(values):.2f}", bar, PARTS.get(name, ""))
    return result


@command("perf", 1)
def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table; 1 where it could not be measured."""
    parse = parser("perf.drops", __doc__)
    parse.add_argument("--drops", type=int, default=5, metavar="N", help="how many (default: 5)")
    parse.add_argument("--settle-s", type=float, default=3.0, metavar="S", help="as of export watch (default: 3)")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parse.parse_args(arguments)
    console = wide_console()
    with console.status("starting the stack") as status, running(options.repository, options.settle_s) as stack:
        measured = []
        for i in range(options.drops):
            status.update(f"drop {i + 1} of {options.drops}")
            measured.append(stack.drop(0.05 * (i + 1)))
    if options.json:
        options.json.write_text(json.dumps({"settle_s": options.settle_s, "drops": measured}, indent=2) + "\n")
    console.print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
