"""A load that must never notice what happens to the stack meanwhile."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx

from tests.conftest import wait_for


class Asking:
    """Connections that post a picture again and again, from entering the context to leaving it.

    `answers` is all that came back, as status and JSON; where nothing came, the status is 0.
    """

    def __init__(self, url: str, picture: bytes, connections: int = 16, pause_s: float = 0.0) -> None:
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self._url, self._picture, self._pause_s = url, picture, pause_s
        self._on = [url] * connections
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(connections)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [answer for status, answer in list(self.answers) if status != 200]

    def move(self, url: str) -> None:
        """Send everything elsewhere; returns when nobody waits for an answer from the old place."""
        self._url = url
        wait_for(lambda: set(self._on) == {url}, 60)

    def wait_for_more(self, count: int) -> None:
        enough = len(self.answers) + count
        wait_for(lambda: len(self.answers) >= enough or bool(self.failures), 60)

    def _ask(self, i: int) -> None:
        while not self._ending.is_set():
            url = self._on[i] = self._url
            with httpx.Client(base_url=url, timeout=60) as client:
                while not self._ending.is_set() and self._url == url:
                    try:
                        response = client.post(
                            "/v1/predict", content=self._picture, headers={"Content-Type": "image/jpeg"}
                        )
                        self.answers.append((response.status_code, response.json()))
                    except Exception as error:
                        self.answers.append((0, {"error": repr(error)}))
                    time.sleep(self._pause_s)
