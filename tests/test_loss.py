"""Label smoothing, the auxiliary loss and class weights against closed forms and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from irv2.training.loss import Loss, balanced_weights

COUNTS = [50, 3, 12, 7]
WEIGHTS = sum(COUNTS) / (len(COUNTS) * np.array(COUNTS))


def closed_form(logits: np.ndarray, targets: np.ndarray, smoothing: float) -> np.ndarray:
    """Cross-entropy of each image with targets [B, C] that are smoothed."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    smoothed = targets * (1 - smoothing) + smoothing / logits.shape[1]
    return -(smoothed * log_p).sum(1)


def logits(images: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, len(COUNTS))) * 3


def weighted(smoothing: float = 0.1) -> Loss:
    return Loss(smoothing, class_weights=balanced_weights(COUNTS))


def test_balanced_weights_are_scikit_learns_and_their_mean_over_images_is_one():
    labels = np.repeat(np.arange(len(COUNTS)), COUNTS)
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    ours = balanced_weights(COUNTS).numpy()
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours[labels].mean() == pytest.approx(1, rel=1e-6)


def test_the_loss_is_the_mean_over_images_of_weight_times_loss():
    x, labels = logits(6), np.array([0, 0, 3, 1, 2, 1])
    for smoothing in (0.0, 0.1):
        expected = (WEIGHTS[labels] * closed_form(x, np.eye(4)[labels], smoothing)).mean()
        found = weighted(smoothing)(torch.tensor(x).float(), torch.tensor(labels))
        assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_mixed_image_has_the_weight_expected_of_its_shares():
    x, shares = logits(5), np.random.default_rng(1).dirichlet(np.ones(4), size=5)
    for smoothing in (0.0, 0.1):
        expected = ((shares @ WEIGHTS) * closed_form(x, shares, smoothing)).mean()
        found = weighted(smoothing)(torch.tensor(x).float(), torch.tensor(shares).float())
        assert found.item() == pytest.approx(expected, rel=1e-5)


def test_it_does_not_depend_on_how_the_batch_is_divided():
    x, labels = torch.tensor(logits(8)).float(), torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    whole = weighted()(x, labels)
    parts = [weighted()(a, b) for a, b in zip(x.split(2), labels.split(2))]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_auxiliary_loss_is_weighted_as_well():
    x, aux = (torch.tensor(logits(4, seed)).float() for seed in (0, 1))
    labels, loss = torch.tensor([0, 1, 2, 3]), weighted()
    expected = loss(x, labels) + 0.4 * loss(aux, labels)
    assert loss((x, aux), labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss(x, labels).item() != pytest.approx(Loss()(x, labels).item(), rel=0.01)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_mixes_the_label_with_the_uniform_distribution(smoothing):
    logits = np.random.default_rng(0).normal(size=(5, 7)) * 3
    labels = np.array([0, 6, 3, 3, 1])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.eye(7)[labels] * (1 - smoothing) + smoothing / 7
    expected = -(target * log_p).sum(1).mean()
    loss = Loss(label_smoothing=smoothing)(torch.tensor(logits).float(), torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_auxiliary_loss_is_added_with_its_weight():
    generator = torch.Generator().manual_seed(0)
    logits, aux_logits = (torch.randn(4, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 4])
    for weight in (0.4, 0.0, 1.5):
        loss = Loss(0.1, aux_weight=weight)
        expected = loss(logits, labels) + weight * loss(aux_logits, labels)
        assert loss((logits, aux_logits), labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_computed_in_float32():
    logits = torch.tensor([[10.0, 0.0, -3.0]]).bfloat16()
    loss = Loss(label_smoothing=0.0)(logits, torch.tensor([0]))
    assert loss.dtype == torch.float32
    expected = math.log1p(math.exp(-10) + math.exp(-13))
    assert loss.item() == pytest.approx(expected, rel=1e-2)
