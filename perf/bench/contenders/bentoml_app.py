"""BentoML, as its guide has it for the processor: a worker a core, and adaptive batching in each.

`python -m bentoml serve perf.bench.contenders.bentoml_app:Contender --port PORT`, in the contenders' environment. As
every batchable API of BentoML it answers with a list.
"""

from __future__ import annotations

from typing import Any, Self

import bentoml
from starlette.requests import Request

from perf.bench.contenders.work import Work, picture_of


class Pictures(bentoml.IODescriptor):
    """A request: one picture, in the two forms that the others take. BentoML makes batches of such lists."""

    pictures: list[bytes]

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Self:
        """Read the body."""
        return cls(pictures=[picture_of(await request.body(), request.headers["content-type"])])


@bentoml.service(workers="cpu_count", logging={"access": {"enabled": False}})
class Contender:
    """One worker."""

    def __init__(self) -> None:
        self.work = Work.from_environment()

    @bentoml.api(route="/v1/predict", input_spec=Pictures, batchable=True, max_batch_size=4)
    def predict(self, pictures: list[bytes]) -> list[dict]:
        """One batch."""
        return self.work.answers(pictures)
