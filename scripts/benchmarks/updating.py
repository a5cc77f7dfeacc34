"""Clipping, RMSProp and the running average beside timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.optim import RMSpropTF
from timm.utils import ModelEmaV3
from torch import nn

from irv2.report import markdown
from irv2.training import step
from irv2.training import update as end_of_step
from irv2.training.step import StepOptions
from scripts.benchmarks import network
from scripts.benchmarks.alternation import alternate, rate, table_row
from scripts.benchmarks.network import CLIP, DECAY, RECIPE

TOLERANCE = 1e-4  # of three steps' changes, which are small beside the weights they are read from
GOALS = {"cpu": "≥ 1.5", "cuda": "≥ 5"}


class Update(NamedTuple):
    """An update of a network, and the average that it moves."""

    work: Callable[[], None]
    average: nn.Module


def measure(device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure updates of the whole network with constant gradients."""
    ours, peer = network.networks(device)
    updates = our_update(ours), timms_update(peer)
    ways = (rate(1, update.work, device) for update in updates)
    return {"row": alternate(*ways, rounds), "device_type": device.type, "rounds": rounds}


def our_update(model: nn.Module) -> Update:
    """Make the update that ends a step of train.py."""
    _set_gradients(model)
    state = network.our_state(model, torch.device("cpu"))
    step.lay_out(state, StepOptions(compiled=True))  # on a GPU

    def work() -> None:
        if state.flat is not None:
            loss = torch.zeros((), device=state.flat.groups[0].weights.device)
            state.flat.update(loss, CLIP, *step.rates(state))
            state.step += 1
            return
        norm = end_of_step.gradient_norm(model.parameters())
        end_of_step.apply(state, torch.isfinite(norm), norm, CLIP, [], [])
        state.step += 1

    return Update(work, state.ema.module)


def timms_update(model: nn.Module) -> Update:
    """Make that update with PyTorch's clipping, timm's optimizer and timm's average."""
    _set_gradients(model)
    optimizer = RMSpropTF(network.parameter_groups(model), **RECIPE)
    average = ModelEmaV3(model, DECAY, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
    steps = 0

    def work() -> None:
        nonlocal steps
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        steps += 1
        average.update(model, step=steps + 1)

    return Update(work, average.module)


def _set_gradients(model: nn.Module) -> None:
    """Set equal gradients in both networks, whose parameters are equal but cut differently."""
    for p in model.parameters():
        p.grad = (p.detach() * 1e4).sin() / 1e3  # a norm of 5: clipping has something to do


def check(device: torch.device) -> None:
    """Raise DisagreementError unless three updates change weights and averages as timm's do."""
    networks = network.networks(device)
    start = network.weights_in_a_row(networks[1]).clone()
    updates = [make(model) for make, model in zip((our_update, timms_update), networks)]
    for _ in range(3):
        for update in updates:
            update.work()
    averages = [update.average for update in updates]
    for what, models in (("weights", networks), ("averages", averages)):
        changes = (network.weights_in_a_row(model) - start for model in models)
        network.agree(f"changes of {what}", *changes, TOLERANCE)


def table(figures: dict[str, Any]) -> str:
    row = dict(figures["row"])
    times = {name: 1e3 / row[name] for name in ("ours_per_s", "peer_per_s")}  # ms in their place
    words, goal = "clipping, RMSProp, running average", GOALS[figures["device_type"]]
    head = "measured | ours, ms | timm, ms | ratio (range) | goal"
    return markdown.table(head, [table_row(words, row | times, goal, digits=3)])
