"""Triton's side of the preprocessing step: tensors in, tensors out. The work is in `preprocessing.py`.

A picture that cannot be used is data, not a failed request: its ERROR is `<code>: <what is wrong>`, its PIXELS
are black, and the other pictures of the call are answered as if it were not there. So is one for which something fails
that should not: an exception out of here would fail every request of the batch.

    IMAGE  BYTES [n, 1]               the picture files
    PIXELS UINT8 [n, size, size, 3]   decoded, resized, RGB
    ERROR  BYTES [n, 1]               empty where all is well
    TIMES  INT64 [n, 2]               start and end of this step, nanoseconds of the host's monotonic clock
"""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from preprocessing import PictureError, preprocess


class TritonPythonModel:
    """One instance of the step, alone in its process."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the size that this version of the step was published with."""
        settings = Path(args["model_repository"], args["model_version"], "settings.json")
        self.size: int = json.loads(settings.read_text())["size"]

    def execute(self, requests: list) -> list:
        """Answer each request of a batch on its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            return self._respond(request)
        except Exception as error:  # no memory for the pixels of all its pictures, say
            traceback.print_exc()
            return pb_utils.InferenceResponse([], pb_utils.TritonError(f"preprocessing: {error!r}"))

    def _respond(self, request):
        start = time.monotonic_ns()
        pictures = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy().reshape(-1)
        pixels = np.zeros((len(pictures), self.size, self.size, 3), np.uint8)
        errors = np.full((len(pictures), 1), b"", np.object_)
        for i, picture in enumerate(pictures):
            try:
                pixels[i] = preprocess(picture, self.size)
            except PictureError as error:
                errors[i] = str(error).encode()
            except Exception:
                traceback.print_exc()  # a fault of this step's: its log is where that is looked for
                errors[i] = b"image_corrupt: the picture cannot be prepared"
        times = np.tile(np.array([start, time.monotonic_ns()], np.int64), (len(pictures), 1))
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("PIXELS", pixels),
                pb_utils.Tensor("ERROR", errors),
                pb_utils.Tensor("TIMES", times),
            ]
        )
