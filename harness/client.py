"""Asking one thing after the other over HTTP, with nothing but the standard library. `load.py` asks many at once."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any


def get(url: str, timeout: float = 10.0) -> bytes:
    """What is under a URL.

    Raises:
        OSError: nothing answers, or not with status 200.
    """
    with urllib.request.urlopen(url, timeout=timeout) as response:
        return bytes(response.read())


def answers(url: str) -> bool:
    """Whether a URL can be had."""
    try:
        get(url)
    except OSError:
        return False
    return True


def predict(url: str, picture: bytes, media_type: str = "image/jpeg", timeout: float = 10.0) -> Any:
    """The JSON that a picture is answered with.

    Raises:
        OSError: nothing answers, or not with status 200; the message has the begin of the answer.
    """
    request = urllib.request.Request(url, picture, {"Content-Type": media_type})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise OSError(f"{url} answers {error.code} {error.read(300)!r}") from None
