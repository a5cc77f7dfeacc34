"""The learning rate against closed forms, exactly where it changes."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from itertools import pairwise

import pytest

from irv2.training.schedule import Schedule

IMAGENET = 1_281_167


def staircase(**changes) -> Schedule:
    values = {"kind": "staircase", "base_lr": 0.045, "images_per_epoch": 1000, "total_epochs": 200}
    return Schedule(**{"global_batch": 1, **values, **changes})


def cosine(**changes) -> Schedule:
    values = {"kind": "cosine", "base_lr": 0.4, "images_per_epoch": 1000, "total_epochs": 100}
    return Schedule(**{"global_batch": 1, **values, **changes})


def test_the_papers_staircase_by_default():
    schedule = staircase(images_per_epoch=IMAGENET)
    two_epochs = 2 * IMAGENET
    assert schedule.learning_rate(0) == 0.045
    assert schedule.learning_rate(two_epochs - 1) == 0.045
    assert schedule.learning_rate(two_epochs) == pytest.approx(0.0423, rel=1e-12)
    assert schedule.learning_rate(2 * two_epochs - 1) == pytest.approx(0.0423, rel=1e-12)
    assert schedule.learning_rate(2 * two_epochs) == pytest.approx(0.039762, rel=1e-12)
    assert schedule.learning_rate(99 * two_epochs) == pytest.approx(0.045 * 0.94**99, rel=1e-12)


def test_a_stair_begins_at_the_first_whole_image_of_it():
    for images_per_epoch, decay_epochs in (
        (IMAGENET, "2"),
        (IMAGENET, "2.4"),  # timm's stairs; the edges fall between images
        (IMAGENET, "0.7"),
        (60_000, "0.1"),
        (1437, "0.1"),  # as floats, 0.1 * 1437 is above 143.7 and 1437 images are a stair short
        (1797, "1.1"),
        (7, "3"),
    ):
        stairs = {"images_per_epoch": images_per_epoch, "decay_epochs": float(decay_epochs)}
        schedule = staircase(base_lr=1.0, decay_rate=0.5, **stairs)
        stair = Fraction(decay_epochs) * images_per_epoch
        for k in range(1, 101):
            edge = math.ceil(k * stair)
            for images in (edge - 1, edge):
                assert schedule.learning_rate(images) == 0.5 ** (images // stair), (stairs, images)


def test_cosine_starts_at_the_base_passes_the_middle_and_ends_at_the_minimum():
    schedule = cosine(min_lr=0.1)
    assert schedule.learning_rate(0) == pytest.approx(0.4, rel=1e-12)
    assert schedule.learning_rate(25_000) == pytest.approx(0.25 + 0.15 / math.sqrt(2), rel=1e-12)
    assert schedule.learning_rate(50_000) == pytest.approx(0.25, rel=1e-12)
    assert schedule.learning_rate(100_000) == pytest.approx(0.1, rel=1e-12)


def test_cosine_stays_at_the_minimum_after_its_end():
    assert cosine(min_lr=0.1).learning_rate(150_000) == pytest.approx(0.1, rel=1e-12)
    assert cosine().learning_rate(100_001) == pytest.approx(0.0, abs=1e-15)


def test_cosine_falls_all_the_way():
    rates = [cosine().learning_rate(images) for images in range(0, 100_001, 500)]
    assert all(a > b for a, b in pairwise(rates))


def test_warmup_scales_the_rate_linearly_from_zero():
    for make in (staircase, cosine):
        plain, warm = make(), make(warmup_epochs=3.0)
        assert warm.learning_rate(0) == 0.0
        for images in (1, 500, 1500, 2000, 2999):
            expected = plain.learning_rate(images) * images / 3000
            assert warm.learning_rate(images) == pytest.approx(expected, rel=1e-12)
        for images in (3000, 3001, 50_000):
            assert warm.learning_rate(images) == plain.learning_rate(images)


def test_a_fraction_of_an_epoch_of_warmup_is_counted_in_images():
    warm = staircase(warmup_epochs=0.5)
    assert warm.learning_rate(250) == pytest.approx(0.045 / 2, rel=1e-12)
    assert warm.learning_rate(500) == 0.045


def test_the_rate_depends_on_nothing_but_the_images_seen():
    schedule = cosine(warmup_epochs=2.0)
    forward = [schedule.learning_rate(images) for images in range(0, 100_000, 777)]
    backward = [schedule.learning_rate(images) for images in reversed(range(0, 100_000, 777))]
    assert forward == backward[::-1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.base_lr = 1.0


def test_a_staircase_does_not_depend_on_how_long_the_run_is():
    short, long = staircase(total_epochs=10), staircase(total_epochs=400)
    images = range(0, 10_001, 500)
    assert [short.learning_rate(i) for i in images] == [long.learning_rate(i) for i in images]


def test_a_period_ends_with_the_step_that_reaches_or_passes_it():
    """10 images an epoch, in batches of 4: half epochs end at 5, 10, 15, 20 images."""
    schedule = staircase(images_per_epoch=10, global_batch=4)
    ended = [seen for seen in range(0, 24, 4) if schedule.period_ended(seen, 0.5)]
    assert ended == [8, 12, 16, 20]
    assert not schedule.period_ended(0, 0.5)
    assert [seen for seen in range(0, 24, 4) if schedule.period_ended(seen, 1.0)] == [12, 20]


def test_a_run_has_as_many_steps_as_its_epochs_or_its_limit_allow():
    assert staircase(total_epochs=1.7, global_batch=4, images_per_epoch=14).total_steps == 6
    assert staircase(total_epochs=2, global_batch=1000, max_steps=1).total_steps == 1
    assert staircase(total_epochs=2, global_batch=1000, max_steps=9).total_steps == 2
