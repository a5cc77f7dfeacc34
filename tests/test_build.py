"""From a config to a network that begins the same each time."""

from __future__ import annotations

import pytest
import timm.optim
import torch

from irv2 import build, config_file
from irv2.network.blocks import Block
from irv2.network.merged import MergedBlock
from irv2.training.state import TrainState


def first_state(seed: int = 0, optim: dict | None = None, **train) -> TrainState:
    sections = {
        "data": {"train": "synthetic:8x4", "val": "synthetic:8x4"},
        "model": {"blocks": [1, 1, 1], "aux_logits": True},
        "run": {"seed": seed},
        "train": train,
        "optim": optim or {},
    }
    return build.new_state(config_file.from_tree(sections), 4, torch.device("cpu"))


def first_weights(seed: int) -> dict[str, torch.Tensor]:
    return first_state(seed).tensors()["model"]


def test_the_first_weights_follow_from_the_seed():
    weights, again, others = first_weights(3), first_weights(3), first_weights(4)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["classif.weight"], others["classif.weight"])


def test_a_seed_means_the_weights_that_it_has_always_meant():
    """Numbers of the first version; whoever draws in another order starts other runs."""
    weights = first_weights(0)
    for name, first, total in (
        ("conv2d_1a.conv.weight", 0.13585318624973297, -1.3761595487594604),
        ("repeat.0.branch1.0.conv.weight", 0.018811412155628204, 4.700675010681152),
        ("repeat_1.0.branch1.1.conv.weight", -0.022976122796535492, 4.862412929534912),
    ):
        assert weights[name].flatten()[0].item() == first, name
        assert weights[name].sum().item() == pytest.approx(total, abs=1e-3), name


def test_one_key_leaves_the_network_plain_with_the_same_weights():
    fast, plain = first_state(), first_state(accelerate=False)
    assert type(fast.model.repeat[0]) is not Block and isinstance(fast.model.repeat[0], MergedBlock)
    assert type(plain.model.repeat[0]) is Block
    ours, theirs = (state.model.state_dict() for state in (fast, plain))
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "kind, expected, own",
    [
        ("sgd", torch.optim.SGD, {"nesterov": True, "momentum": 0.9}),
        ("adamw", torch.optim.AdamW, {"betas": [0.8, 0.99], "eps": 1e-8}),
        ("lamb", timm.optim.Lamb, {"betas": [0.9, 0.999], "eps": 1e-3}),
    ],
)
def test_other_optimizers_are_the_libraries_own_in_the_same_groups(kind, expected, own):
    decays = {"lr": 0.01, "weight_decay": 0.05, "layer_decay": 0.5}
    optimizer = first_state(optim={"kind": kind, **decays, **own}).optimizer
    assert type(optimizer) is expected
    paper = first_state(optim=decays).optimizer
    for group, same in zip(optimizer.param_groups, paper.param_groups, strict=True):
        assert [p.shape for p in group["params"]] == [p.shape for p in same["params"]]
        for key in ("weight_decay", "lr_scale", "lr"):
            assert group[key] == same[key], key
        for key, value in own.items():
            assert group[key] == (tuple(value) if isinstance(group[key], tuple) else value), key
        assert group.get("max_grad_norm") is None  # clip_norm clips
