"""One JSON object a line on stdout. A request is one line, written by the middleware; pictures never are.

Extra fields are given as `extra={"fields": {...}}`.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

_encode = json.JSONEncoder(default=str).encode


class JsonFormatter(logging.Formatter):
    """Time (ISO 8601, UTC), level, logger, message, and whatever fields the call gave."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for one record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


def configure(level: str) -> None:
    """Send every logger of the process through `JsonFormatter`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What no line shows need not be found out for each: where the call stands, and in which thread and process.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    # Its other lines say nothing that ours do not.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
