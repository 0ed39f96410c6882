"""What a classifier's probabilities are worth: accuracy, AUC, calibration, temperature, decision thresholds.

Plain numpy, so that training, the export and the tests judge by the same formulas. Throughout, `logits` and
`probabilities` are float arrays of shape (pictures, labels) and `truth` is an int array of label indices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


def softmax(logits: Floats) -> Floats:
    """Probabilities of each row of logits, computed without overflow."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))


def negative_log_likelihood(probabilities: Floats, truth: Ints) -> float:
    """Mean of -log p(true label), in nats."""
    chosen = probabilities[np.arange(len(truth)), truth]
    return float(-np.log(np.clip(chosen, 1e-12, None)).mean())


def decide(probabilities: Floats, thresholds: Floats) -> Ints:
    """Index of the label whose probability is highest relative to its threshold.

    For two labels with thresholds t and 1 - t this is "the first label from probability t on"; equal
    thresholds give the most probable label.
    """
    return np.asarray((probabilities / thresholds).argmax(axis=1))


def confusion_matrix(predicted: Ints, truth: Ints, labels: int) -> list[list[int]]:
    """Counts by [true label][predicted label]."""
    counts = np.zeros((labels, labels), dtype=int)
    np.add.at(counts, (truth, predicted), 1)
    return [[int(count) for count in row] for row in counts]


def auc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    NaN where only one of the two kinds is present. Source: Mann-Whitney U, by midranks.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    midranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((midranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def expected_calibration_error(probabilities: Floats, truth: Ints, bins: int = 10) -> float:
    """Mean gap between the confidence in the top label and its accuracy, over equal-width bins.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == truth
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(truth))


def fit_temperature(logits: Floats, truth: Ints) -> float:
    """The T that minimises the likelihood loss of softmax(logits / T), searched over 0.05 to 20.

    The loss is unimodal in 1/T, so a golden-section search on log T finds it.
    """
    ratio = (np.sqrt(5) - 1) / 2
    low, high = np.log(0.05), np.log(20.0)
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        losses = [negative_log_likelihood(softmax(logits / np.exp(point)), truth) for point in (left, right)]
        low, high = (low, right) if losses[0] < losses[1] else (left, high)
    return float(np.exp((low + high) / 2))


def choose_thresholds(probabilities: Floats, truth: Ints) -> list[float]:
    """Decision thresholds for `decide`, chosen for accuracy, one per label, summing to one.

    For two labels: of all thresholds on a grid of 0.01 whose accuracy is within one standard error of the
    best, the one nearest to 0.5, so that the noise of a small validation set moves nothing. For more
    labels: equal thresholds.
    """
    labels = probabilities.shape[1]
    if labels != 2:
        return [1.0 / labels] * labels
    grid = np.round(np.arange(0.05, 0.951, 0.01), 2)
    accuracy = np.array([np.mean(decide(probabilities, np.array([t, 1 - t])) == truth) for t in grid])
    best = accuracy.max()
    allowed = grid[accuracy >= best - np.sqrt(best * (1 - best) / len(truth))]
    nearest = float(allowed[np.abs(allowed - 0.5).argmin()])
    return [nearest, round(1 - nearest, 2)]


def evaluate(probabilities: Floats, truth: Ints, labels: list[str], thresholds: list[float]) -> dict[str, object]:
    """The figures of a model card, ready for JSON: counts, accuracy, AUC per label, confusion, ECE, loss."""
    predicted = decide(probabilities, np.asarray(thresholds))
    return {
        "pictures": len(truth),
        "accuracy": round(float(np.mean(predicted == truth)), 4),
        "auc": {label: round(auc(probabilities[:, i], truth == i), 4) for i, label in enumerate(labels)},
        "expected_calibration_error": round(expected_calibration_error(probabilities, truth), 4),
        "negative_log_likelihood": round(negative_log_likelihood(probabilities, truth), 4),
        "confusion_matrix": {
            true_label: dict(zip(labels, row, strict=True))
            for true_label, row in zip(labels, confusion_matrix(predicted, truth, len(labels)), strict=True)
        },
    }
