"""mosec: a worker a core that takes what waits as one batch, behind mosec's own HTTP server.

`python -m perf.bench.contenders.mosec_app --port PORT`, in the contenders' environment.
"""

from __future__ import annotations

import mosec

from perf.bench.contenders.work import CORES, Work, picture_of


class Contender(mosec.Worker):
    """One worker. Preparing and running in one process: handing pixels on would cost more than it hides."""

    def __init__(self) -> None:
        self.work = Work.from_environment()

    def deserialize(self, data: bytes) -> bytes:
        """A body in either form; mosec does not tell a worker which. No picture begins with a brace."""
        return picture_of(data, "application/json" if data.startswith(b"{") else "")

    def forward(self, data: list[bytes]) -> list[dict]:
        """One batch."""
        return self.work.answers(data)


def main() -> None:
    """Serve where the command line says; mosec reads it itself."""
    server = mosec.Server()
    server.append_worker(Contender, num=CORES, max_batch_size=4, max_wait_time=5, route="/v1/predict")
    server.run()


if __name__ == "__main__":
    main()
