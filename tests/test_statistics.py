"""Intervals, paired comparison and calibration against closed forms and worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from irv2.statistics import calibration, mcnemar, wilson


@pytest.mark.parametrize(("correct", "images"), [(0, 10), (10, 10), (353, 360), (40_217, 50_000)])
def test_the_interval_solves_wilsons_equation(correct, images):
    z = 1.959963984540054
    share = correct / images
    centre = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images**2))
    half /= 1 + z * z / images
    assert wilson(correct, images) == pytest.approx((100 * (centre - half), 100 * (centre + half)))


def test_mcnemar_is_a_two_sided_sign_test_of_the_images_that_differ():
    first = np.array([True] * 9 + [False] * 2 + [True] * 50 + [False] * 5)
    second = np.array([False] * 9 + [True] * 2 + [True] * 50 + [False] * 5)
    found = mcnemar(first, second)
    tail = sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11
    assert (found.only_first, found.only_second) == (9, 2)
    assert found.p_value == pytest.approx(2 * tail)
    assert mcnemar(first, first).p_value == 1.0


def test_calibration_by_hand():
    confidence = np.array([0.05, 0.15, 0.95, 0.95, 1.0], np.float32)
    correct = np.array([False, True, True, False, True])
    bins, error = calibration(confidence, correct, bins=10)
    assert [b.images for b in bins] == [1, 1, 3]
    assert bins[2].confidence == pytest.approx(2.9 / 3)
    assert bins[2].accuracy == pytest.approx(2 / 3)
    assert error == pytest.approx((0.05 + 0.85 + 0.9) / 5)


def test_a_network_as_sure_as_it_is_right_has_no_calibration_error():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    _, error = calibration(confidence, rng.random(200_000) < confidence)
    assert error < 0.01
