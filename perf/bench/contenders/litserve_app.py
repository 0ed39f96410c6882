"""LitServe, as its guide to fast CPU serving has it: a worker a core, and as many processes that speak HTTP.

`python -m perf.bench.contenders.litserve_app PORT`, in the contenders' environment.
"""
# No postponed annotations: LitServe reads the request's type from the signature.

import sys
from typing import Annotated

import litserve
from fastapi import Depends, Request

from perf.bench.contenders.work import CORES, Work, picture_of


async def _picture(request: Request) -> bytes:
    return picture_of(await request.body(), request.headers["content-type"])


class Contender(litserve.LitAPI):
    """One worker, which takes what waits as one batch."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self.work = Work.from_environment()

    def decode_request(self, request: Annotated[bytes, Depends(_picture)]) -> bytes:
        """The bytes of the picture."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """Pictures stay apart until they are prepared."""
        return inputs

    def predict(self, pictures: list[bytes]) -> list[dict]:
        """One batch."""
        return self.work.answers(pictures)

    def unbatch(self, output: list[dict]) -> list[dict]:
        """They are apart already."""
        return output


def main() -> None:
    """Serve on a port of the loopback interface."""
    api = Contender(api_path="/v1/predict", max_batch_size=4, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=CORES, fast_queue=True)
    server.run("127.0.0.1", int(sys.argv[1]), log_level="error", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main()
