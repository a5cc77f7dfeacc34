"""A step whose loss or gradient is not finite changes nothing, and is counted."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_engine import ALONE, LR, images, new_state, small_network
from torch import Tensor

from irv2 import engine, update
from irv2.engine import StepOptions, TrainState, train_step


def step(state: TrainState, harm: str = "", seed: int = 0) -> tuple[Tensor, Tensor]:
    """One step of 8 images; `harm`: "loss" or "gradient" is made not finite."""
    x, labels = images(8, seed)
    if harm == "loss":
        x[3, 0, 0, 0] = math.nan
    hook = None
    if harm == "gradient":
        hook = state.model[5].weight.register_hook(lambda grad: grad * math.inf)
    result = train_step(state, state.model, iter([(x, labels)]), LR, StepOptions(), ALONE)
    if hook is not None:
        hook.remove()
    return result


def decide_on_the_device(monkeypatch) -> None:
    """Take the way of a GPU on the CPU."""

    def apply(state, good, norm, clip_norm, statistics, before):
        update._apply_where(state, good, norm, clip_norm, statistics, before)

    monkeypatch.setattr(update, "apply", apply)


def everything(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part, tensors in state.tensors().items()
        for name, tensor in tensors.items()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("decided_on", ["host", "device"])
@pytest.mark.parametrize("harm", ["loss", "gradient"])
def test_a_bad_step_changes_no_weight_statistic_average_or_slot(monkeypatch, harm, decided_on):
    if decided_on == "device":
        decide_on_the_device(monkeypatch)
    state = new_state(small_network())
    step(state)
    before = everything(state)
    loss, norm = step(state, harm)
    assert not (torch.isfinite(loss) and torch.isfinite(norm))
    assert_same(everything(state), before)
    assert state.step == 2
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_training_goes_on_after_a_bad_step():
    state = new_state(small_network())
    step(state)
    step(state, "loss")
    before = everything(state)
    step(state)
    after = everything(state)
    assert all(torch.isfinite(tensor.float()).all() for tensor in after.values())
    assert not torch.equal(after["model.0.weight"], before["model.0.weight"])


def test_bad_steps_are_numbered_and_counted():
    state = new_state(small_network())
    for harm in ("", "loss", "", "gradient", "loss"):
        step(state, harm)
    assert engine.read_bad_steps(state) == ([2, 4, 5], 2)
    assert (state.bad_steps, state.bad_steps_in_a_row) == (3, 2)
    step(state, "loss")
    step(state)
    assert engine.read_bad_steps(state) == ([6], 3)  # a row that has ended since counts
    step(state)
    assert engine.read_bad_steps(state) == ([], 0)
    assert (state.bad_steps, state.bad_steps_in_a_row) == (4, 0)
    counters = state.counters()
    assert counters["bad_steps"] == 4 and counters["step"] == 8


@pytest.mark.parametrize("harm", ["", "loss", "gradient"])
def test_the_decision_on_the_device_equals_the_one_on_the_host(monkeypatch, harm):
    """The masks that spare a GPU's host the wait, run on the CPU, against the loop for CPUs."""
    on_host, on_device = (new_state(small_network()) for _ in range(2))
    for seed in range(3):
        step(on_host, harm if seed == 1 else "", seed)
    decide_on_the_device(monkeypatch)
    for seed in range(3):
        step(on_device, harm if seed == 1 else "", seed)
    assert_same(everything(on_device), everything(on_host), tolerance=1e-6)


def test_an_infinite_gradient_is_in_order_where_the_scaler_skips_it():
    state = new_state(small_network())
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = everything(state)
    scale = state.scaler.get_scale()
    step(state, "gradient")
    assert engine.read_bad_steps(state) == ([], 0)
    assert state.scaler.get_scale() < scale
    assert torch.equal(everything(state)["model.0.weight"], before["model.0.weight"])
    step(state, "loss")
    assert engine.read_bad_steps(state) == ([2], 1)


def test_the_caller_learns_when_the_weights_are_about_to_change():
    state = new_state(small_network())
    weights = copy.deepcopy(state.model[0].weight)
    seen = []

    def before_update() -> None:
        seen.append(torch.equal(state.model[0].weight, weights))
        assert state.model[0].weight.grad is not None

    batches = iter([images(8)])
    train_step(state, state.model, batches, LR, StepOptions(), ALONE, before_update)
    assert seen == [True]
    assert not torch.equal(state.model[0].weight, weights)
