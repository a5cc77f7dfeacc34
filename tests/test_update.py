"""Clipping, RMSProp and the running average in one pass, against timm's three."""

from __future__ import annotations

import pytest
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from irv2 import engine, optim, update
from irv2.native import threads
from irv2.native import update as native

pytestmark = pytest.mark.skipif(not threads.available(), reason="PyTorch's threads: none we know")


def network(seed: int = 0) -> nn.Sequential:
    """Layers of sizes that do and do not fill vectors, one in channels-last memory, one frozen."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 17, 3), nn.BatchNorm2d(17), nn.Linear(64, 65), nn.Linear(3, 1)
    )
    model[0].to(memory_format=torch.channels_last)
    model[3].requires_grad_(False)
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def distances(ours: nn.Module, theirs: nn.Module) -> dict[str, float]:
    reference = theirs.state_dict()
    return {
        name: ((value - reference[name]).double().norm() / reference[name].double().norm()).item()
        for name, value in ours.state_dict().items()
        if value.is_floating_point()
    }


@pytest.mark.parametrize("clip_norm", [None, 2.0, 1e6])
@pytest.mark.parametrize("one_pass", [True, False])
def test_five_steps_equal_timms(monkeypatch, clip_norm, one_pass):
    if not one_pass:
        monkeypatch.setattr(native, "fits", lambda slots: False)
    ours, theirs = network(), network()
    state = engine.TrainState(
        ours,
        engine.running_average(ours, 0.999),
        optim.RMSpropTF(optim.parameter_groups(ours, 0.01), lr=0.045),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    groups = optim.parameter_groups(theirs, 0.01)
    for group in groups:
        group.pop("lr_scale")
    peer = timm.optim.RMSpropTF(groups, lr=0.045, alpha=0.9, eps=1.0, momentum=0.9)
    average = ModelEmaV3(theirs, 0.999, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
    for step in range(5):
        for model in (ours, theirs):
            set_gradients(model, step)
            model[1].running_mean += step
        norm = update.gradient_norm(ours.parameters())
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or float("inf"))
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        update.apply(state, torch.tensor(True), norm, clip_norm, [], [])
        peer.step()
        average.update(theirs, step=step + 2)
        state.step += 1
    for found in (distances(ours, theirs), distances(state.ema.module, average.module)):
        assert max(found.values()) < 1e-6, found
    assert distances(ours, network())["2.weight"] > 1e-3


def test_pytorch_learns_of_the_changes():
    """Else a graph that was recorded before would compute with other numbers than it was given."""
    p, weight = torch.ones(5), torch.ones(5, requires_grad=True)
    loss = (weight * p).sum()
    native.rmsprop(slots(p, *torch.ones(4, 5)), native.Rates(1, 0, 0.9, 1, 0.9, 0.1, 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norm_tells_of_one_number_that_is_not_finite(value):
    tensors = [torch.ones(5), torch.ones(10_000)]
    assert native.norm(tensors).item() == pytest.approx(10_005**0.5, rel=1e-7)
    tensors[1][7_777] = value
    assert not native.norm(tensors).isfinite()


def slots(*layouts: Tensor) -> list[native.Slots]:
    return [native.Slots(*layouts)]


def test_what_does_not_lie_alike_in_memory_is_left_to_pytorchs_operations():
    plain = torch.zeros(4, 3, 2, 2)
    turned = plain.contiguous(memory_format=torch.channels_last)
    assert native.fits(slots(*[plain] * 5)) and native.fits(slots(*[turned] * 5))
    assert not native.fits(slots(plain, turned, plain, plain, plain))
    assert not native.fits(slots(*[plain.double()] * 5))
    assert not native.fits(slots(*[plain[:, :2]] * 5))
    assert native.fits(slots(plain[:, :, :1, :1].contiguous(), *[torch.zeros(4, 3, 1, 1)] * 4))
