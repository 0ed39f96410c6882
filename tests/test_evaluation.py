"""The figures on a model card, held against values worked out by hand or by definition."""

from __future__ import annotations

import json

import numpy as np
import pytest

from export import evaluation
from tests.conftest import ROOT


def test_auc_is_the_chance_that_a_positive_ranks_above_a_negative() -> None:
    chance = np.random.default_rng(3)
    scores = chance.integers(0, 10, 60).astype(float)
    positive = chance.random(60) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert evaluation.auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(evaluation.auc(scores, np.ones(60, bool)))


def test_calibration_error_of_a_worked_example() -> None:
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.35, 0.65]])
    truth = np.array([0, 1, 0, 0])  # at 0.95 half are right; at 0.65 half are right
    assert evaluation.expected_calibration_error(probabilities, truth) == pytest.approx((0.45 + 0.15) / 2)


def test_temperature_is_found_again() -> None:
    """Labels drawn from softmax(logits / 2.5) must give back a temperature near 2.5."""
    chance = np.random.default_rng(0)
    logits = chance.normal(0, 4, (20_000, 3))
    probabilities = evaluation.softmax(logits / 2.5)
    truth = (chance.random((20_000, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    assert evaluation.fit_temperature(logits, truth) == pytest.approx(2.5, rel=0.05)


def test_thresholds_follow_a_clear_signal_and_ignore_noise() -> None:
    scores = np.linspace(0.01, 0.99, 400)
    probabilities = np.stack([scores, 1 - scores], axis=1)
    first, second = evaluation.choose_thresholds(probabilities, (scores < 0.2).astype(int))
    assert 0.19 <= first <= 0.25
    assert first + second == pytest.approx(1)
    noisy = np.random.default_rng(0).random(400) > scores
    assert evaluation.choose_thresholds(probabilities, noisy.astype(int)) == [0.5, 0.5]
    assert evaluation.choose_thresholds(np.ones((4, 4)) / 4, np.zeros(4, int)) == [0.25] * 4


def test_softmax_survives_large_logits() -> None:
    assert evaluation.softmax(np.array([[1e4, -1e4]])).tolist() == [[1.0, 0.0]]


def test_the_card_says_what_was_trained_on_what() -> None:
    card = json.loads((ROOT / "export/checkpoints/defect/card.json").read_text())
    assert card["labels"] == ["damaged", "intact"]
    assert set(card["thresholds"]) == set(card["labels"])
    assert len(card["data"]["digest"]) == 64
    assert "CC BY 4.0" in card["data"]["description"]
    assert "Apache-2.0" in card["pretrained"]
    figures = card["valid"]
    assert {"accuracy", "auc", "confusion_matrix", "expected_calibration_error"} <= set(figures)
    counts = [count for row in figures["confusion_matrix"].values() for count in row.values()]
    right = sum(figures["confusion_matrix"][label][label] for label in card["labels"])
    assert sum(counts) == figures["pictures"] == card["data"]["valid"]
    assert right / sum(counts) == pytest.approx(figures["accuracy"], abs=1e-4)
    # Loose bounds on noisy labels; the point is that a broken checkpoint cannot be committed unnoticed.
    assert figures["accuracy"] > 0.75
    assert figures["expected_calibration_error"] < 0.06
