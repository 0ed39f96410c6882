"""What was measured on a GPU, as tables for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

from perf.gpu.stack import Row

_PARTS = {"gateway": "gatew.", "triton": "triton", "preprocess": "prep.", "classifier": "model", "postprocess": "post."}
"""Part of the stack -> its column, in cores."""
_ALONE = ("gateway", "postprocess")
"""Parts with one process that can use one core."""


@dataclass
class GpuResults:
    """Everything, filled while it is measured. Whoever is interrupted keeps what was there."""

    machine: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    where: dict[str, list[str]] = field(default_factory=dict)
    """Setting -> what the classifier said of where it runs."""
    bare: dict[str, dict[int, float]] = field(default_factory=dict)
    """Model and device -> pictures a second by pictures in a run of ONNX Runtime."""
    differences: dict[str, float] = field(default_factory=dict)
    """What was compared -> the largest difference of a probability."""
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def busiest(row: Row, cores: int) -> str:
    """The part that was closest to its own end, with its share of it.

    Gateway, postprocessing and the load generator are a process with one core each, preprocessing has as many as it has
    processes, a GPU can be busy all of the time, and the machine has `cores`.
    """
    spent = row.shares.cores
    shares = {part: spent.get(part, 0.0) for part in _ALONE}
    shares["preprocess"] = spent.get("preprocess", 0.0) / row.setting.preprocess
    shares["load generator"] = row.generator
    shares["all cores"] = row.shares.machine / cores
    if row.shares.gpu_percent is not None:
        shares["GPU"] = row.shares.gpu_percent / 100
    name = max(shares, key=shares.__getitem__)
    return f"{name} {shares[name]:.0%}"


def loads(results: GpuResults, cores: int) -> Table:
    """One row a load: the setting (with processes of preprocessing and instances of the model) and what was seen."""
    table = Table(
        title="n pictures in flight: pictures a second, milliseconds, and cores that were busy",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("model")
    table.add_column("device")
    for header in ("prep.", "inst."):
        table.add_column(header, justify="right")
    table.add_column("endpoint")
    for header in ("n", "req/s", "p50", "p99", "failed", *_PARTS.values(), "client", "all", "GPU %"):
        table.add_column(header, justify="right")
    table.add_column("busiest", no_wrap=True)
    for row in results.rows:
        spent, gpu = row.shares.cores, row.shares.gpu_percent
        table.add_row(
            row.setting.precision,
            row.setting.device,
            str(row.setting.preprocess),
            str(row.setting.instances),
            row.endpoint,
            str(row.in_flight),
            *(f"{value:.1f}" for value in (row.throughput, row.p50, row.p99)),
            str(sum(row.failed.values()) or ""),
            *(f"{spent.get(part, 0.0):.1f}" for part in _PARTS),
            f"{row.generator:.1f}",
            f"{row.shares.machine:.1f}",
            "" if gpu is None else f"{gpu:.0f}",
            busiest(row, cores),
        )
    return table


def bare(results: GpuResults) -> Table:
    """The model alone."""
    batches = sorted({batch for rates in results.bare.values() for batch in rates})
    table = Table(title="the model alone in ONNX Runtime, pictures a second", title_justify="left")
    table.add_column("model")
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    for name, rates in results.bare.items():
        table.add_row(name, *(f"{rates[batch]:.0f}" if batch in rates else "" for batch in batches))
    return table


def facts(title: str, found: Mapping[str, object]) -> Table:
    """Two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:.5f}" if isinstance(value, float) else str(value))
    return table
