"""`python -m perf.soak`: does the whole stack stay as large as it is?

Sends requests of every kind - good pictures in several formats and sizes, broken ones, things that are none, clients
that do not wait - and watches memory, shared memory, file descriptors and threads of each part. What still grows over
the second half, when everything is warm, is a leak.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from export.printing import wide_console
from harness import ROOT
from harness.commands import command, parser
from perf import plots
from perf.analyzer import PerfError
from perf.bench import pictures
from perf.bench.services import Service, stack
from triton_runtime.server import TritonServer

TOLERANCE = {"memory, MiB": 8.0, "shared memory, MiB": 8.0, "file descriptors": 4.0, "threads": 2.0}
"""By figure, what a part may gain over the second half: allocators and connection pools breathe."""
_SAMPLES = 120
_CONNECTIONS = 8
_ABANDONED = "client gone"


@dataclass(frozen=True)
class Kind:
    """A request: its body, and the status that it must be answered with. `patience_s`: when the client gives up."""

    name: str
    media_type: str
    body: bytes
    status: int = 200
    patience_s: float = 60.0


@dataclass
class Soak:
    """What was sent and seen: answers by kind and status, and each part's figures by name, with requests across."""

    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unexpected: list[str] = field(default_factory=list)
    series: dict[str, dict[str, list[tuple[float, float]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )


@dataclass(frozen=True)
class Growth:
    """How one figure of one part moved over the second half, and what it may."""

    figure: str
    part: str
    middle: float
    end: float
    growth: float
    tolerance: float
    grows: bool


def kinds(paths: list[Path]) -> list[Kind]:
    """Every kind of request, made from JPEG files of any sizes."""
    result = []
    for number, path in enumerate(paths):
        data = path.read_bytes()
        wrapped = json.dumps({"image": base64.b64encode(data).decode(), "metadata": {"number": number}}).encode()
        result += [Kind("jpeg", "image/jpeg", data), Kind("jpeg in json", "application/json", wrapped)]
    with Image.open(paths[0]) as picture:
        for form, mode in (
            ("PNG", "RGBA"),
            ("PNG", "L"),
            ("WEBP", "RGB"),
            ("GIF", "P"),
            ("TIFF", "CMYK"),
            ("BMP", "RGB"),
        ):
            out = io.BytesIO()
            picture.convert(mode).save(out, form)
            result.append(Kind(f"{form.lower()}, {mode}", f"image/{form.lower()}", out.getvalue()))
    data = paths[0].read_bytes()
    huge = io.BytesIO()
    Image.new("1", (8000, 8000)).save(huge, "PNG")
    return [
        *result,
        Kind("ends early", "image/jpeg", data[: len(data) // 2], 422),
        Kind("damaged", "image/png", b"\x89PNG\r\n\x1a\n" + bytes(500), 422),
        Kind("no picture", "image/jpeg", b"not a picture" * 50, 422),
        Kind("too many pixels", "image/png", huge.getvalue(), 422),
        Kind("not base64", "application/json", b'{"image": "?"}', 400),
        Kind("not json", "application/json", b"{", 400),
        Kind("no body", "image/jpeg", b"", 400),
        Kind("unknown type", "text/plain", b"hello", 415),
        Kind(_ABANDONED, "image/jpeg", data, patience_s=0.005),
    ]


async def soak(
    service: Service, triton: TritonServer, mix: Sequence[Kind], count: int, tick: Callable[[], None]
) -> Soak:
    """Send `count` requests of a mix in turns, and take samples on the way. `tick` is told each answer."""
    result = Soak()
    numbers = iter(range(count))
    every = max(1, count // _SAMPLES)

    async def send() -> None:
        for number in numbers:
            kind = mix[number % len(mix)]
            status = await _ask(client, service.url, kind)
            result.answers[kind.name][status] += 1
            if status != str(kind.status) and not (kind.name == _ABANDONED and status == _ABANDONED):
                result.unexpected.append(f"{kind.name}: {status} instead of {kind.status}")
            tick()
            if number % every == 0:
                for figure, by_part in (await asyncio.to_thread(sample, service, triton)).items():
                    for part, value in by_part.items():
                        result.series[figure][part].append((number, value))

    async with httpx.AsyncClient() as client:
        await asyncio.gather(*(send() for _ in range(_CONNECTIONS)))
    return result


async def _ask(client: httpx.AsyncClient, url: str, kind: Kind) -> str:
    """The status of the answer, or what became of the request instead."""
    headers = {"Content-Type": kind.media_type}
    try:
        answer = await client.post(url, content=kind.body, headers=headers, timeout=kind.patience_s)
    except httpx.TimeoutException:
        return _ABANDONED
    except httpx.TransportError as error:
        return type(error).__name__
    return str(answer.status_code)


def sample(service: Service, triton: TritonServer) -> dict[str, dict[str, float]]:
    """The figures of `TOLERANCE` now, by part."""
    figures: dict[str, dict[str, float]] = {figure: defaultdict(float) for figure in TOLERANCE}
    for part, process in service.parts():
        with contextlib.suppress(psutil.Error):
            figures["memory, MiB"][part] += process.memory_full_info().uss / 2**20
            figures["file descriptors"][part] += process.num_fds()
            figures["threads"][part] += process.num_threads()
    for segment in triton.shared_memory():
        with contextlib.suppress(FileNotFoundError):
            figures["shared memory, MiB"]["triton"] += segment.stat().st_blocks * 512 / 2**20
    return figures


def judge(figure: str, part: str, points: Sequence[tuple[float, float]]) -> Growth:
    """Whether a series still grows over its second half: the median of that half's last quarter against its first.

    A line through all points would take one late step, such as an allocator's next arena, for a slope.

    Raises:
        PerfError: there are too few points to say.
    """
    points = sorted(points)
    half = [y for x, y in points if x >= points[-1][0] / 2]
    if len(half) < 8:
        raise PerfError(f"{len(points)} samples are too few for a verdict: send more requests")
    quarter = len(half) // 4
    middle, end = statistics.median(half[:quarter]), statistics.median(half[-quarter:])
    return Growth(figure, part, middle, end, end - middle, TOLERANCE[figure], end - middle > TOLERANCE[figure])


def table(judged: Sequence[Growth]) -> Table:
    """A row a figure and part."""
    result = Table(title="over the second half of the requests", title_justify="left")
    for header in ("", "part", "middle", "end", "growth", "may", ""):
        result.add_column(header, justify="right" if header in ("middle", "end", "growth", "may") else "left")
    for g in judged:
        values = (f"{value:.1f}" for value in (g.middle, g.end, g.growth, g.tolerance))
        result.add_row(g.figure, g.part, *values, "grows" if g.grows else "flat")
    return result


@command("soak", 1, PerfError)
def main(arguments: list[str] | None = None) -> int:
    """Send, print the table, write the figures; 1 where something grows or was answered wrongly."""
    parse = parser("perf.soak", __doc__)
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", help="folder of JPEGs (default: examples)")
    parse.add_argument("--requests", type=int, default=50_000, metavar="N", help="default: 50000")
    parse.add_argument("--results", type=Path, default=ROOT / "perf/results/soak", help="default: perf/results/soak")
    options = parse.parse_args(arguments)
    console = wide_console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    found = sorted(options.pictures.rglob("*.jpg"))[:10]
    if not found:
        raise PerfError(f"{options.pictures} holds no JPEGs")
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as progress:
        mix = kinds(pictures.mixed(found, Path(folder)))
        task = progress.add_task("requests", total=options.requests)
        with stack(options.repository) as (service, triton):
            began = time.monotonic()
            result = asyncio.run(soak(service, triton, mix, options.requests, lambda: progress.advance(task)))
            seconds = time.monotonic() - began
    judged = [judge(figure, part, points) for figure, by_part in result.series.items()
              for part, points in by_part.items()]  # fmt: skip
    flat = not any(growth.grows for growth in judged)
    figures = {
        "requests": options.requests,
        "seconds": seconds,
        "flat": flat,
        "unexpected": result.unexpected,
        "answers": result.answers,
        "growth": [asdict(growth) for growth in judged],
        "series": result.series,
    }
    charts = [plots.Chart(figure, "requests", lines) for figure, lines in result.series.items()]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    written, drawn = (options.results.with_suffix(suffix) for suffix in (".json", ".svg"))
    written.write_text(json.dumps(figures, indent=1) + "\n")
    plots.write(drawn, plots.charts(charts))
    console.print(table(judged))
    for line, times in Counter(result.unexpected).most_common(10):
        console.print(f"unexpected, {times} times: {line}", markup=False)
    console.print(f"{options.requests} requests in {seconds:.0f} s: {'flat' if flat else 'it grows'}")
    console.print(f"figures: {written}, {drawn}", markup=False, soft_wrap=True)
    return 0 if flat and not result.unexpected else 1


if __name__ == "__main__":
    sys.exit(main())
