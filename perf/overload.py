"""`python -m perf.overload`: what is still answered in time when far more is asked than can be.

First the capacity, with clients that wait for each answer; then multiples of it from clients that do not wait, each
request with a deadline. Goodput is what is answered within it. Making the load takes a share of the machine, which
clients elsewhere do not: that is set off before goodputs are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from perf.generator import Generator, Load
from triton_runtime.installation import Missing
from triton_runtime.ports import free_endpoint, free_port
from triton_runtime.server import TritonFailed, TritonServer
from triton_runtime.signals import Stopped, unwind_on_signals
from triton_runtime.stack import ROOT, SAMPLE, Gateway

LEAST = 0.9
"""Of the best goodput, what has to be left at the highest load."""
_WARM_UP_S = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the figures; 1 where goodput fell below `LEAST`, or nothing could be measured."""
    parse = argparse.ArgumentParser(prog="python -m perf.overload", description=__doc__)
    parse.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="default: model_repository")
    parse.add_argument("--pictures", type=Path, default=ROOT / "examples", help="folder of JPEGs (default: examples)")
    parse.add_argument("--seconds", type=float, default=10.0, help="of each load (default: %(default)s)")
    parse.add_argument("--deadline", type=float, default=1.0, metavar="SECONDS", help="default: %(default)s")
    parse.add_argument("--connections", type=int, default=32, help="that find the capacity (default: %(default)s)")
    parse.add_argument("--loads", type=float, nargs="+", default=[1, 2, 5], help="times the capacity (default: 1 2 5)")
    parse.add_argument("--json", type=Path, default=ROOT / "perf/results/overload.json", help="default: perf/results/")
    options = parse.parse_args(arguments)
    unwind_on_signals()
    pictures = [path.read_bytes() for path in sorted(options.pictures.rglob("*.jpg"))[:64]]
    console = Console()
    try:
        if not pictures:
            raise TritonFailed(f"{options.pictures} holds no JPEGs")
        endpoint, port = free_endpoint(), free_port()
        with console.status("starting Triton") as status, TritonServer(options.repository, endpoint) as triton:
            triton.wait_until_ready()
            with Gateway(endpoint, "127.0.0.1", port, log_level="error") as gateway:
                gateway.predict(SAMPLE, timeout=60)
                generator = Generator("127.0.0.1", port, pictures, options.deadline)
                status.update("warming up")
                generator.closed(options.connections, _WARM_UP_S)
                status.update("finding the capacity")
                loads = {"capacity": generator.closed(options.connections, options.seconds)}
                for times in options.loads:
                    status.update(f"{times:g} times the capacity")
                    loads[f"{times:g}x"] = generator.open(times * loads["capacity"].goodput, options.seconds)
    except (Missing, TritonFailed, OSError) as error:
        print(f"overload: {error}", file=sys.stderr)
        return 1
    except Stopped:
        return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({name: vars(load) for name, load in loads.items()}) + "\n")
    console.print(table(loads, options.deadline))
    kept, raw = share_kept(loads), share_kept(loads, cores=math.inf)
    print(
        f"goodput at {list(loads)[-1]}: {kept:.0%} of the best, {LEAST:.0%} is asked for "
        f"({raw:.0%} if what the generator takes is not set off)"
    )
    return 0 if kept >= LEAST else 1


def share_kept(loads: dict[str, Load], cores: float = os.cpu_count() or 1) -> float:
    """Goodput of the last load as a share of the best, each for what the generator left of the machine."""
    goodputs = [load.goodput / (1 - load.generator_s / load.seconds / cores) for load in loads.values()]
    return goodputs[-1] / (max(goodputs) or 1.0)


def table(loads: dict[str, Load], deadline_s: float) -> Table:
    """One row a load."""
    result = Table(title=f"answers within {deadline_s:g} s", title_justify="left", caption_justify="left")
    for header in ("", "offered/s", "in time/s", "late", "p50 ms", "p99 ms", "refused/s", "p50 ms", "p99 ms"):
        result.add_column(header, justify="right" if header else "left")
    result.add_column("problems")
    result.add_column("cores for it", justify="right")
    for name, load in loads.items():
        result.add_row(
            name,
            f"{load.offered / load.seconds:.0f}",
            f"{load.goodput:.1f}",
            str(load.late),
            *_percentiles(load.answered_s),
            f"{len(load.refused_s) / load.seconds:.0f}",
            *_percentiles(load.refused_s),
            ", ".join(f"{code} {count}" for code, count in load.codes.most_common()),
            f"{load.generator_s / load.seconds:.2f}",
        )
    return result


def _percentiles(seconds: list[float]) -> tuple[str, str]:
    if len(seconds) < 2:
        return "", ""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return f"{cuts[49] * 1e3:.1f}", f"{cuts[98] * 1e3:.1f}"


if __name__ == "__main__":
    sys.exit(main())
