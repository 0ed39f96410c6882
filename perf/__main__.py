"""`python -m perf`: perf_analyzer on a release, with real pictures, at several levels of load."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from perf.analyzer import Measurement, PerfError, measure
from triton_runtime.installation import Missing
from triton_runtime.server import Endpoint, TritonFailed, TritonServer
from triton_runtime.signals import Stopped, unwind_on_signals

ROOT = Path(__file__).resolve().parent.parent
_EPILOG = """Uses the Triton that listens on TRITON_GRPC_PORT (default 8001), or starts the embedded one for the run.
The load generator shares the machine with the server: compare figures of one run, not of two machines."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and print a table; 1 where it could not be measured."""
    parse = argparse.ArgumentParser(prog="python -m perf", description=__doc__, epilog=_EPILOG)
    parse.add_argument("--release", help="default: the newest in the repository")
    parse.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="default: model_repository")
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", help="folder (default: examples)")
    parse.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    parse.add_argument("--interval-ms", type=int, default=5000, help="of one measurement (default: %(default)s)")
    options = parse.parse_args(arguments)
    unwind_on_signals()
    console = Console()
    pictures = sorted(p for p in options.pictures.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    try:
        if not pictures:
            raise PerfError(f"{options.pictures} holds no pictures (jpg, png, webp)")
        endpoint = Endpoint.from_environment()
        with console.status("starting Triton") as status, triton_at(endpoint, options.repository) as newest:
            release = options.release or newest
            measurements = measure(
                release,
                endpoint.grpc_url,
                pictures,
                options.concurrency,
                interval_ms=options.interval_ms,
                report_level=lambda n: status.update(f"{release}, {n} in flight, {len(pictures)} pictures"),
            )
    except (PerfError, Missing, TritonFailed) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    except Stopped:
        return 1
    console.print(table(release, measurements))
    return 0


@contextlib.contextmanager
def triton_at(endpoint: Endpoint, repository: Path) -> Iterator[str]:
    """The newest release of a Triton that runs at `endpoint`, started for this block where nothing listens."""
    server = TritonServer(repository, endpoint)
    releases = server.releases()
    with socket.socket() as probe:
        is_running = probe.connect_ex((endpoint.address, endpoint.grpc)) == 0
    if is_running:
        yield releases[-1] if releases else ""
        return
    with server:
        yield server.wait_until_ready()[-1]


def table(release: str, measurements: list[Measurement]) -> Table:
    """One row a level of load."""
    result = Table(title=f"{release} over gRPC (milliseconds)")
    headers = ("in flight", "requests/s", "p50", "p90", "p95", "p99")
    for header in headers:
        result.add_column(header, justify="right")
    for m in measurements:
        values = (m.throughput, m.p50, m.p90, m.p95, m.p99)
        result.add_row(str(m.concurrency), *(f"{value:.1f}" for value in values))
    return result


if __name__ == "__main__":
    sys.exit(main())
