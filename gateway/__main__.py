"""`python -m gateway`: the public API in front of Triton, in the foreground."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import signal
import sys

import uvicorn

from gateway import __version__, logs
from gateway.app import create_app
from gateway.auth.api_keys import ApiKeys
from gateway.auth.middleware import require_safe
from gateway.http.connection import bounded, reserve_files
from gateway.http.draining import Draining, Server
from gateway.metrics import Metrics
from gateway.settings import Settings

logger = logging.getLogger("gateway")


def _settings_table() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        rows.append(f"  GATEWAY_{name.upper():<22} {field.description} [{default}]")
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
    for name, meant in Settings.unknown().items():
        logger.warning("no such setting", extra={"fields": {"variable": name, "did_you_mean": meant}})
    try:
        keys = ApiKeys.of(settings)
        require_safe(settings, keys)
        reserve_files(settings)
    except ValueError as error:
        raise SystemExit(f"gateway: {error}") from None
    metrics, draining = Metrics(), Draining()
    config = uvicorn.Config(
        create_app(settings, metrics, keys, draining),
        host=settings.host,
        port=settings.port,
        http=bounded(settings, metrics, draining),
        ws="none",
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]  # it is only ever waited for
        timeout_graceful_shutdown=int(settings.grace_s),
    )
    try:
        config.load()
    except (OSError, AssertionError) as error:
        reason = f"{settings.tls_certificate}, {settings.tls_key}: {error}"
        raise SystemExit(f"gateway: GATEWAY_TLS_CERTIFICATE, GATEWAY_TLS_KEY: {reason}") from None
    fields: dict[str, object] = {"host": settings.host, "port": settings.port, "triton": ",".join(settings.triton_urls)}
    fields |= {"tls": config.is_ssl, "keys": keys.are_needed}
    # What is there now stays: the garbage collector need not look at it over and over.
    gc.collect()
    gc.freeze()
    server = Server(config, draining, settings.drain_s)

    def stop(*_: object) -> None:
        """Before uvicorn takes the signals over, and once it has shut down, when it raises them once more."""
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    logger.info("starting", extra={"fields": fields})
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
