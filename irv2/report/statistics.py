"""Uncertainty of counts: intervals, paired comparison, calibration."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Bounds of a percentage."""

    low: float
    high: float


def wilson(correct: int, images: int) -> Interval:
    """95 % interval of the percentage that `correct` of `images` stands for (Wilson's score)."""
    from scipy.stats import binomtest  # here, as it takes half a second that a start has not

    bounds = binomtest(correct, images).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(100.0 * float(bounds.low), 100.0 * float(bounds.high))


class Paired(NamedTuple):
    """Two networks on the same images: on how many only one of them is right."""

    only_first: int
    only_second: int
    p_value: float  # of so uneven a split if both were equally good


def mcnemar(first: np.ndarray, second: np.ndarray) -> Paired:
    """McNemar's exact test of two bool [N], whether each network got each image right."""
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return Paired(only_first, only_second, p_value)


class Bin(NamedTuple):
    """Images whose confidence lies in one part of [0, 1]."""

    images: int
    confidence: float  # mean, in [0, 1]
    accuracy: float  # in [0, 1]


def calibration(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 15
) -> tuple[list[Bin], float]:
    """Non-empty bins of equal width, and the expected calibration error in [0, 1].

    confidence: float [N] in [0, 1]; correct: bool [N]. The error is the mean over images of
    |accuracy - mean confidence| of their bin (Guo et al., 2017, arXiv:1706.04599, eq. 3).
    """
    confidence = confidence.astype(np.float64)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    filled = []
    for number in range(bins):
        mine = place == number
        if mine.any():
            mean, accuracy = float(confidence[mine].mean()), float(correct[mine].mean())
            filled.append(Bin(int(mine.sum()), mean, accuracy))
    error = sum(b.images * abs(b.accuracy - b.confidence) for b in filled) / len(confidence)
    return filled, error


def bootstrap_difference(
    first: np.ndarray, second: np.ndarray, draws: int = 2000, seed: int = 0
) -> Interval:
    """95 % interval of the second's accuracy less the first's, in percentage points.

    first, second: bool [S, N], whether each of S runs of a config got each of the same N images
    right. Images are drawn for both together, runs for each by itself, with replacement (percentile
    bootstrap, Efron and Tibshirani, 1993, chapter 13).
    """
    rng = np.random.default_rng(seed)
    images = first.shape[1]
    differences = np.empty(draws)
    for draw in range(draws):
        weights = rng.multinomial(images, np.full(images, 1 / images)) / images
        means = [_drawn(runs, rng) @ weights for runs in (first, second)]
        differences[draw] = 100.0 * (means[1] - means[0])
    tail = 50.0 * (1 - CONFIDENCE)
    return Interval(*map(float, np.percentile(differences, [tail, 100 - tail])))


def _drawn(runs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean over runs drawn with replacement, [N]; that of a single run is the run.

    S runs drawn of S spread by a factor of (S - 1) / S too little about their mean, which matters
    for the few that there are (Efron and Tibshirani, chapter 5.3).
    """
    count, mean = len(runs), runs.mean(0)
    drawn = runs[rng.integers(count, size=count)].mean(0)
    return mean + (drawn - mean) * math.sqrt(count / max(1, count - 1))
