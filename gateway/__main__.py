"""`python -m gateway`: the public API in front of Triton, in the foreground."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys

import uvicorn

from gateway import __version__, logs
from gateway.app import create_app
from gateway.protocol import ProblemProtocol
from gateway.settings import Settings


def _settings_table() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        rows.append(f"  GATEWAY_{name.upper():<20} {field.description} [{field.default}]")
    return "environment:\n" + "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was admitted."""
    parse = argparse.ArgumentParser(
        prog="python -m gateway",
        description=__doc__,
        epilog=_settings_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--version", action="version", version=__version__)
    parse.add_argument("--openapi", action="store_true", help="print the OpenAPI document and end")
    options = parse.parse_args(arguments)
    settings = Settings.read()
    if options.openapi:
        print(json.dumps(create_app(settings).openapi(), indent=2, ensure_ascii=False))
        return 0
    logs.configure(settings.log_level)
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        http=ProblemProtocol,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.grace_s),
    )
    fields = {"host": settings.host, "port": settings.port, "triton": settings.triton_url}
    logging.getLogger("gateway").info("starting", extra={"fields": fields})
    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn raises the signal once more when it has shut down; an orderly end is no failure.
        signal.signal(number, lambda *_: None)
    server = uvicorn.Server(config)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
