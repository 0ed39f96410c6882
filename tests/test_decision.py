"""Postprocessing: labels, thresholds and ranking."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.evaluation import decide
from tests.offline import DECISION


def policy(folder: Path, labels: list[str], thresholds: dict[str, float]) -> object:
    path = folder / "settings.json"
    path.write_text(json.dumps({"labels": labels, "thresholds": thresholds}))
    return DECISION.Policy.read(path)


def test_the_first_label_counts_from_its_threshold_on(tmp_path: Path) -> None:
    careful = policy(tmp_path, ["damaged", "intact"], {"damaged": 0.3, "intact": 0.7})
    decision = careful.decide(np.array([[0.31, 0.69], [0.29, 0.71], [0.9, 0.1]], np.float32))
    assert decision.label.tolist() == [b"damaged", b"intact", b"damaged"]
    np.testing.assert_allclose(decision.confidence, [0.31, 0.71, 0.9], rtol=1e-6)


def test_scores_are_ranked_by_probability_whatever_the_decision(tmp_path: Path) -> None:
    careful = policy(tmp_path, ["a", "b", "c"], {"a": 0.2, "b": 0.5, "c": 0.3})
    decision = careful.decide(np.array([[0.3, 0.5, 0.2]], np.float32))
    assert decision.label.tolist() == [b"a"]
    assert decision.ranked.tolist() == [[b"b", b"a", b"c"]]
    np.testing.assert_allclose(decision.scores, [[0.5, 0.3, 0.2]], rtol=1e-6)


def test_ties_go_to_the_label_listed_first(tmp_path: Path) -> None:
    even = policy(tmp_path, ["x", "y"], {"x": 0.5, "y": 0.5})
    decision = even.decide(np.array([[0.5, 0.5]], np.float32))
    assert decision.label.tolist() == [b"x"]
    assert decision.ranked.tolist() == [[b"x", b"y"]]


def test_training_and_serving_decide_alike(tmp_path: Path) -> None:
    """The card's figures are worth nothing unless the served rule is the one they were computed with."""
    thresholds = {"damaged": 0.37, "intact": 0.63}
    rows = np.random.default_rng(0).dirichlet([1, 1], 500).astype(np.float32)
    served = policy(tmp_path, ["damaged", "intact"], thresholds).decide(rows)
    expected = decide(rows, np.array(list(thresholds.values()), np.float32))
    assert served.label.tolist() == [[b"damaged", b"intact"][i] for i in expected]


@pytest.mark.parametrize("thresholds", [{"a": 0.5}, {"a": 0.5, "b": 0.0}, {"a": 1.0, "b": 0.5}])
def test_bad_thresholds_are_refused_when_the_step_loads(tmp_path: Path, thresholds: dict[str, float]) -> None:
    with pytest.raises((KeyError, ValueError)):
        policy(tmp_path, ["a", "b"], thresholds)
