"""An evaluation of a network: every image counted once, by one view or several."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from small_network import (
    ALONE,
    LR,
    evaluate,
    images,
    new_state,
    numbered,
    pieces,
    small_network,
    train,
    trainable,
)
from torch import nn

from irv2 import evaluation, scoring
from irv2.report.statistics import wilson
from irv2.scoring import Ensemble, EvalOptions, ScoreError, collect, scored
from irv2.training.step import StepOptions, train_step


def test_an_evaluation_counts_every_image_and_changes_nothing():
    network = small_network(drop_rate=0.5)
    x, labels = images(23)
    before = copy.deepcopy(network.state_dict())
    seen = []
    result = evaluate(
        network, numbered(pieces((x, labels), 5)), on_batch=lambda n, _: seen.append(n)
    )
    with torch.no_grad():
        logits = network.eval()(x)
    best = logits.argsort(1, descending=True)
    assert result.images == 23
    assert result.top1_correct == (best[:, 0] == labels).sum().item()
    assert result.top5_correct == (best[:, :5] == labels[:, None]).any(1).sum().item()
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert result.loss.sum() == pytest.approx(expected, rel=1e-6)
    assert seen == [5, 5, 5, 5, 3]
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_a_step_after_an_evaluation_trains_again():
    straight, interrupted = (new_state(small_network(drop_rate=0.5)) for _ in range(2))
    train(straight, 8, steps=2)
    train(interrupted, 8, steps=1)
    evaluate(interrupted.model, numbered([images(4)]))
    batches = iter([images(8, seed=1)])
    train_step(interrupted, interrupted.model, batches, LR, StepOptions(), ALONE)
    assert torch.equal(trainable(straight.model), trainable(interrupted.model))


def test_several_views_of_an_image_count_as_the_mean_of_their_softmax():
    network = small_network()
    x, labels = images(4)
    views = torch.stack([x, x.roll(1, 2), x.roll(1, 3)], 1)  # [4, 3, 3, 6, 6]
    with torch.no_grad():
        every = torch.stack([network.eval()(views[:, v]).softmax(1) for v in range(3)])
        mirrored = torch.stack([network(views[:, v].flip(3)).softmax(1) for v in range(3)])
    flat = views.flatten(0, 1)
    for is_mirrored, expected in ((False, every.mean(0)), (True, (every + mirrored).mean(0) / 2)):
        for at_once in (None, 5):
            options = EvalOptions(mirrored=is_mirrored, at_once=at_once)
            (batch,) = scored(network, numbered([(flat, labels)]), options)
            assert torch.allclose(batch.scores.exp(), expected, atol=1e-6)


def test_classes_that_do_not_compete_are_never_answers():
    network = small_network()
    x, labels = images(40)
    competing = torch.tensor([True, False, True, True, False, True])
    mine = competing[labels]
    x, labels = x[mine], labels[mine]
    result = evaluate(network, numbered([(x, labels)]), options=EvalOptions(competing=competing))
    places = competing.nonzero().squeeze(1)
    with torch.no_grad():
        logits = network.eval()(x)[:, places]
    expected = [places[i].item() for i in logits.argmax(1)]
    assert result.top[:, 0].tolist() == expected
    assert result.top1_correct == sum(e == label for e, label in zip(expected, labels.tolist()))
    assert result.probability.sum(1) == pytest.approx(1.0)


def test_an_image_whose_scores_are_not_finite_is_wrong_and_named():
    network = small_network()
    x, _ = images(8)
    x[3], x[5] = x[3] * 1e38, float("nan")
    with torch.no_grad():
        labels = network.eval()(x).nan_to_num().argmax(1)
        best = network(x).argmax(1)
    assert best[3] == labels[3]  # +inf would be right
    competing = torch.ones(6, dtype=torch.bool)
    competing[[i for i in range(6) if i not in labels.tolist()][:1]] = False
    for options in (EvalOptions(), EvalOptions(competing=competing), EvalOptions(mirrored=True)):
        result = evaluate(network, numbered([(x, labels)]), options=options)
        assert result.unscored.tolist() == [3, 5]
        assert not (result.rank[[3, 5]] < 5).any()
        message = "^net: its scores of 2 of 8 images are not finite, first of image 3;"
        with pytest.raises(ScoreError, match=message):
            scoring.check_finite(result, "net", lambda index: f"image {index}")
    sound = evaluate(network, numbered([images(8)]))
    scoring.check_finite(sound, "net", str)
    network[5].bias.data[0] = float("nan")  # of one class, beside which all others are finite
    others = torch.where(labels == 0, 1, labels)
    for options in (EvalOptions(), EvalOptions(mirrored=True)):
        result = evaluate(network, numbered([(images(8)[0], others)]), options=options)
        assert len(result.unscored) == 8 and result.top5_correct == 0


def test_an_ensemble_with_scores_that_are_not_finite_gets_them_wrong():
    network, (x, labels) = small_network(), images(4)
    x[1] = float("inf")
    ensemble = Ensemble()
    for model in (network, small_network()):
        collect(ensemble.adding(scored(model, numbered([(x, labels)]), EvalOptions())), ALONE)
    assert collect(ensemble.mean(), ALONE).unscored.tolist() == [1]


def test_the_interval_is_shown_where_images_are_few():
    few, many = (SimpleNamespace(top1_correct=799, images=n) for n in (999, 1000))
    assert evaluation.shown_interval(few) == wilson(799, 999)
    assert evaluation.shown_interval(many) is None
