"""Folded batch norm against timm's network, whose batch norm is not folded."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from irv2.folding import fold_batch_norm
from irv2.model import InceptionResnetV2, inception_resnet_v2


def randomised(model: nn.Module) -> nn.Module:
    """Random statistics, gammas and betas instead of 0 and 1, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.1, 0.4),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def small() -> InceptionResnetV2:
    torch.manual_seed(0)
    return randomised(inception_resnet_v2(3, blocks=(1, 1, 1)))


@torch.inference_mode()
def test_folded_logits_are_those_of_timms_network():
    torch.manual_seed(0)
    theirs = randomised(timm.create_model("inception_resnet_v2", num_classes=5))
    ours = inception_resnet_v2(5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 75, 75) * 2 - 1
    expected = theirs(x)
    assert expected.std(0).max() > 1e-2 * expected.abs().max()  # the images make a difference
    assert relative_error(fold_batch_norm(ours)(x), expected) <= 1e-5
    doubled = fold_batch_norm(ours.double())(x.double())
    assert relative_error(doubled, theirs.double()(x.double())) <= 1e-12


@torch.inference_mode()
def test_no_batch_norm_is_left_and_the_original_is_as_it_was(small):
    small = copy.deepcopy(small).train()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    folded = fold_batch_norm(small)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not folded.training
    assert small.training
    nn.init.zeros_(folded.conv2d_1a.conv.weight)  # shares no memory
    assert before.keys() == small.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())


@torch.inference_mode()
def test_state_dict_has_timms_names_with_biases_and_loads_into_another_folded_network(small):
    folded = fold_batch_norm(small)
    state = folded.state_dict()
    expected = set()
    for name in small.state_dict():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".bn"):
            expected.add(name)
        elif last == "bias":
            expected.add(f"{stem.removesuffix('.bn')}.conv.bias")
    assert set(state) == expected
    other = fold_batch_norm(inception_resnet_v2(3, blocks=(1, 1, 1)))
    x = torch.rand(2, 3, 75, 75) * 2 - 1
    assert not torch.equal(other(x), folded(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), folded(x))
    with pytest.raises(RuntimeError, match=r"conv2d_1a\.bn"):
        inception_resnet_v2(3, blocks=(1, 1, 1)).load_state_dict(state)
