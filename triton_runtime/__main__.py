"""`python -m triton_runtime`: run the embedded Triton on a model repository, in the foreground."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from triton_runtime.installation import Missing
from triton_runtime.server import Endpoint, TritonFailed, TritonServer
from triton_runtime.signals import Stopped, unwind_on_signals

_EPILOG = """environment:
  TRITON_ADDRESS        where to listen (default: 127.0.0.1)
  TRITON_HTTP_PORT      default: 8000
  TRITON_GRPC_PORT      default: 8001
  TRITON_METRICS_PORT   default: 8002

Prints 'ready: ...' once the newest release answers. SIGTERM or Ctrl-C lets requests in flight finish.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run until a signal comes or Triton ends; the exit status is 0 after a signal, else Triton's or 1."""
    parse = argparse.ArgumentParser(
        prog="python -m triton_runtime",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parse.add_argument("--ready-timeout", type=float, default=120, help="seconds (default: %(default)s)")
    parse.add_argument(
        "--poll-seconds", type=int, default=2, help="how often to look for changes (default: %(default)s)"
    )
    parse.add_argument("--grace-seconds", type=int, default=30, help="for requests in flight (default: %(default)s)")
    parse.add_argument("--verbose", action="store_true", help="Triton's whole log, not only warnings")
    options = parse.parse_args(arguments)
    unwind_on_signals()
    try:
        with TritonServer(
            options.repository,
            Endpoint.from_environment(),
            poll_seconds=options.poll_seconds,
            grace_seconds=options.grace_seconds,
            verbose=options.verbose,
        ) as triton:
            releases = triton.wait_until_ready(options.ready_timeout)
            print(
                f"ready: {', '.join(releases)} at {triton.endpoint.address}:{triton.endpoint.grpc} (gRPC)", flush=True
            )
            while (status := triton.poll()) is None:
                time.sleep(0.2)
            print(f"triton: ended by itself with status {status}", file=sys.stderr)
            return status if status > 0 else 1
    except Stopped:
        return 0
    except (Missing, TritonFailed) as error:
        print(f"triton: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
