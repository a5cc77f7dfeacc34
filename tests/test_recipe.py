"""From a config to a network that begins the same each time."""

from __future__ import annotations

import torch

import recipe
from irv2 import config


def first_weights(seed: int) -> dict[str, torch.Tensor]:
    sections = {
        "data": {"train": "synthetic:8x4", "val": "synthetic:8x4"},
        "model": {"blocks": [1, 1, 1]},
        "run": {"seed": seed},
    }
    return recipe.new_state(config.build(sections), 4, torch.device("cpu")).tensors()["model"]


def test_the_first_weights_follow_from_the_seed():
    weights, again, others = first_weights(3), first_weights(3), first_weights(4)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["classif.weight"], others["classif.weight"])
