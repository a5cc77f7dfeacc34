"""Exact counts against a plain sort, scikit-learn and torch.topk; the pace of a run by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import Tensor

from irv2 import metrics
from irv2.metrics import (
    UNRANKED,
    Collector,
    Pace,
    Predictions,
    Scored,
    best_answers,
    label_ranks,
)


def plain_rank(logits: list[float], label: int) -> int:
    """Place of a label sorted by logit, then by class index; a non-finite one has none."""
    if not math.isfinite(logits[label]):
        return UNRANKED
    rivals = [i for i, value in enumerate(logits) if not math.isnan(value)]
    return sorted(rivals, key=lambda i: (-logits[i], i)).index(label)


def collected(logits: Tensor, labels: Tensor, batch: int = 7) -> Predictions:
    collector = Collector()
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        indices = list(range(len(labels)))[part]
        collector.add(Scored(logits[part], labels[part], indices))
    return Predictions.merged(collector.predictions())


def counts(found: Predictions) -> list[int]:
    return [found.top1_correct, found.top5_correct, found.images]


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_ranks_equal_a_plain_sort_with_ties_by_class_index(levels):
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(levels, (200, 9), generator=generator).float()
    labels = torch.randint(9, (200,), generator=generator)
    expected = [plain_rank(row, label) for row, label in zip(logits.tolist(), labels.tolist())]
    assert label_ranks(logits, labels).tolist() == expected


def test_ranks_of_logits_that_are_not_finite():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(4, (300, 6), generator=generator).float()
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    chosen = torch.randint(3, logits.shape, generator=generator)
    logits = torch.where(torch.rand(300, 6, generator=generator) < 0.3, special[chosen], logits)
    labels = torch.randint(6, (300,), generator=generator)
    expected = [plain_rank(row, label) for row, label in zip(logits.tolist(), labels.tolist())]
    assert label_ranks(logits, labels).tolist() == expected


def test_all_equal_logits_do_not_make_every_label_first():
    labels = torch.arange(8)
    assert label_ranks(torch.zeros(8, 8), labels).tolist() == list(range(8))


@pytest.mark.parametrize("classes", [2, 10])
def test_a_network_of_nans_gets_nothing_right(classes):
    found = collected(torch.full((20, classes), float("nan")), torch.arange(20) % classes)
    assert counts(found) == [0, 0, 20]


def test_half_precision_logits_one_bit_apart_are_no_tie():
    logits = torch.tensor([[1.0, 1.0009765625, 1.0]]).half()
    assert label_ranks(logits, torch.tensor([0])).tolist() == [1]
    assert label_ranks(logits, torch.tensor([2])).tolist() == [2]


def test_counts_equal_scikit_learns_and_topks_on_random_logits():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(523, 20, generator=generator)
    labels = torch.randint(20, (523,), generator=generator)
    found = collected(logits, labels)
    theirs = [
        sklearn.metrics.top_k_accuracy_score(
            labels.numpy(), logits.numpy(), k=k, labels=np.arange(20), normalize=False
        )
        for k in (1, 5)
    ]
    assert counts(found) == [*theirs, 523]
    in_top5 = (logits.topk(5).indices == labels[:, None]).any(1).sum().item()
    assert found.top5_correct == in_top5
    assert found.loss.sum() == pytest.approx(
        F.cross_entropy(logits.double(), labels, reduction="sum").item(), rel=1e-6
    )


def test_the_loss_is_free_of_label_smoothing_and_in_float32_at_least():
    logits = torch.tensor([[2.0, 0.0, -1.0]]).bfloat16()
    found = collected(logits, torch.tensor([0]))
    expected = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(-1)))
    assert found.loss.sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_with_five_classes_or_fewer_everything_is_among_the_five_best(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(50, classes, generator=generator)
    labels = torch.randint(classes, (50,), generator=generator)
    top1, top5, images = counts(collected(logits, labels))
    assert top1 == (logits.argmax(1) == labels).sum().item()
    assert (top5, images) == (50, 50)


def test_the_counts_do_not_depend_on_the_batches():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 10, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    results = [counts(collected(logits, labels, batch)) for batch in (1, 5, 64)]
    assert results[0] == results[1] == results[2]


def test_a_result_divides_by_the_images():
    rank = np.full(50_000, 9)
    rank[:47_656], rank[:40_217] = 4, 0
    zeros = np.zeros((50_000, 5))
    found = Predictions(np.arange(50_000), rank % 7, rank, rank * 0 + 0.5, zeros, zeros)
    assert (found.top1, found.top5, found.mean_loss) == (80.434, 95.312, 0.5)


def test_the_mean_over_classes_is_scikit_learns_balanced_accuracy():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(300, 7, generator=generator)
    labels = torch.randint(5, (300,), generator=generator) ** 2 % 7  # of unequal frequency
    theirs = sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(1))
    assert collected(logits, labels).mean_per_class == pytest.approx(100 * theirs)


def test_first_places_and_their_probabilities_are_a_stable_sorts():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randint(4, (60, 9), generator=generator).float()
    labels = torch.randint(9, (60,), generator=generator)
    found = collected(logits, labels)
    expected = [sorted(range(9), key=lambda i: (-row[i], i))[:5] for row in logits.tolist()]
    assert found.top.tolist() == expected
    probability = logits.double().softmax(1).gather(1, torch.tensor(expected))
    assert found.probability == pytest.approx(probability.numpy(), rel=1e-5)
    assert ((found.top[:, 0] == found.label) == (found.rank == 0)).all()


def test_confusions_and_mistakes_are_scikit_learns_and_a_plain_sorts():
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(200, 6, generator=generator)
    labels = torch.randint(6, (200,), generator=generator)
    found = collected(logits, labels)
    theirs = sklearn.metrics.confusion_matrix(labels, logits.argmax(1), labels=range(6))
    assert np.array_equal(found.confusion_matrix(6), theirs)
    wrong = [i for i in range(200) if logits[i].argmax() != labels[i]]
    sure = logits.softmax(1).amax(1).tolist()
    assert found.mistakes().tolist() == sorted(wrong, key=lambda i: -sure[i])


def test_of_several_right_answers_the_best_placed_counts():
    generator = torch.Generator().manual_seed(5)
    scores = torch.randint(4, (200, 9), generator=generator).float()
    answers = torch.randint(9, (200, 3), generator=generator)
    rows = zip(scores.tolist(), answers.tolist())
    expected = [min(row, key=lambda i: (-score[i], i)) for score, row in rows]
    assert best_answers(scores, answers).tolist() == expected
    assert collected(scores, answers).rank.tolist() == [
        min(plain_rank(score, i) for i in row)
        for score, row in zip(scores.tolist(), answers.tolist())
    ]


def test_what_ranks_found_is_put_together_in_the_order_of_images():
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(10, 6, generator=generator)
    labels = torch.randint(6, (10,), generator=generator)
    whole = collected(logits, labels)
    parts = [
        Predictions(*(getattr(whole, f.name)[rows] for f in dataclasses.fields(whole)))
        for rows in (slice(6, 10), slice(0, 6))
    ]
    merged = Predictions.merged(parts)
    for f in dataclasses.fields(whole):
        assert np.array_equal(getattr(merged, f.name), getattr(whole, f.name))


def test_pace_counts_images_and_waiting_between_two_readings(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    pace = Pace()
    for _ in range(2):
        with pace.waiting(torch.device("cpu")):
            now[0] += 0.5
        now[0] += 1.5
        pace.trained(64)
    assert pace.read() == {"images_per_s": 32.0, "data_wait": 0.25}
    now[0] += 2.0
    assert pace.read() == {"images_per_s": 0.0, "data_wait": 0.0}


def test_pace_leaves_out_what_came_before_a_restart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    pace = Pace()
    pace.trained(1000)
    with pace.waiting(torch.device("cpu")):
        now[0] += 60.0
    pace.restart()
    pace.trained(10)
    now[0] += 1.0
    assert pace.read() == {"images_per_s": 10.0, "data_wait": 0.0}
