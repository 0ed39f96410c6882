"""Triton's side of the postprocessing step: tensors in, tensors out. The work is in `decision.py`.

For n pictures and c labels:

    PROBABILITIES FP32  [n, c]   of the classifier
    DIGEST        UINT8 [n, 32]  SHA-256 of the classifier's content, a constant of its graph
    ERROR         BYTES [n, 1]   of preprocessing; where it is set, there is no answer (below)
    TIMES         INT64 [n, 2]   of preprocessing: start and end, nanoseconds

    LABEL         BYTES [n, 1]   the decision; empty where there is no answer
    CONFIDENCE    FP32  [n, 1]   its probability; NaN where there is no answer
    LABELS        BYTES [n, c]   all labels, most probable first; empty where there is no answer
    SCORES        FP32  [n, c]   their probabilities; NaN where there is no answer
    DIGEST        BYTES [n, 1]   as 64 hexadecimal digits: proof of which classifier ran
    ERROR         BYTES [n, 1]   handed through
    TIMES         INT64 [n, 4]   the above, then start and end of this step
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from decision import Policy


class TritonPythonModel:
    """One instance of the step, alone in its process."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the labels and thresholds that this version of the step was published with."""
        self.policy = Policy.read(Path(args["model_repository"], args["model_version"], "settings.json"))

    def execute(self, requests: list) -> list:
        """Answer each request of a batch on its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            return self._respond(request)
        except Exception as error:  # which would fail every request of the batch
            traceback.print_exc()
            return pb_utils.InferenceResponse([], pb_utils.TritonError(f"postprocessing: {error!r}"))

    def _respond(self, request):
        start = time.monotonic_ns()
        probabilities, digest, error, times = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("PROBABILITIES", "DIGEST", "ERROR", "TIMES")
        )
        failed = np.array([bool(message) for message in error.reshape(-1)])
        decision = self.policy.decide(probabilities)
        decision.label[failed] = decision.ranked[failed] = b""
        decision.confidence[failed] = decision.scores[failed] = np.nan
        digests = np.array([[row.tobytes().hex().encode()] for row in digest], np.object_)
        own = np.tile(np.array([start, time.monotonic_ns()], np.int64), (len(error), 1))
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("LABEL", decision.label.reshape(-1, 1)),
                pb_utils.Tensor("CONFIDENCE", decision.confidence.reshape(-1, 1)),
                pb_utils.Tensor("LABELS", decision.ranked),
                pb_utils.Tensor("SCORES", decision.scores),
                pb_utils.Tensor("DIGEST", digests),
                pb_utils.Tensor("ERROR", error),
                pb_utils.Tensor("TIMES", np.hstack([times, own])),
            ]
        )
