"""Clipping, RMSProp and the running average beside timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import RMSpropTF
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from irv2 import engine, optim, update
from scripts.benchmarks import network
from scripts.benchmarks.alternation import alternate, rate
from scripts.benchmarks.network import CLIP, DECAY, RECIPE, WEIGHT_DECAY

TOLERANCE = 1e-4  # of three steps' changes, which are small beside the weights they are read from
GOALS = {"cpu": "≥ 1.5", "cuda": "≥ 5"}


def measure(device: torch.device, rounds: int) -> dict[str, Any]:
    """Updates of the whole network with gradients that stay."""
    ours, peer = network.networks(device)
    ways = (rate(1, work, device) for work in (our_update(ours), timms_update(peer)))
    return {"row": alternate(*ways, rounds), "device_type": device.type, "rounds": rounds}


def our_update(model: nn.Module) -> Callable[[], None]:
    """What a step of train.py ends with."""
    _set_gradients(model)
    state = engine.TrainState(
        model,
        engine.running_average(model, DECAY),
        optim.RMSpropTF(optim.parameter_groups(model, WEIGHT_DECAY), **RECIPE),
        torch.amp.GradScaler("cpu", enabled=False),
    )

    def work() -> None:
        norm = update.gradient_norm(model.parameters())
        update.apply(state, torch.isfinite(norm), norm, CLIP, [], [])
        state.step += 1

    return work


def timms_update(model: nn.Module) -> Callable[[], None]:
    """The same with PyTorch's clipping, timm's optimizer and timm's average."""
    _set_gradients(model)
    optimizer = RMSpropTF(network.parameter_groups(model), **RECIPE)
    average = ModelEmaV3(model, DECAY, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
    step = 0

    def work() -> None:
        nonlocal step
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        step += 1
        average.update(model, step=step + 1)

    return work


def _set_gradients(model: nn.Module) -> None:
    """The same for both networks, whose parameters are cut differently but have equal values."""
    for p in model.parameters():
        p.grad = (p.detach() * 1e4).sin() / 1e5  # below the threshold of clipping


def check(device: torch.device) -> None:
    """Raises DisagreementError unless three updates change weights and averages as timm's do."""
    ours, peer = network.networks(device)
    start = _weights(peer).clone()
    works = our_update(ours), timms_update(peer)
    for _ in range(3):
        for work in works:
            work()
    changes = (_weights(model) - start for model in (ours, peer))
    network.agree("changes of weights", *changes, TOLERANCE)


def _weights(model: nn.Module) -> Tensor:
    """All of them in a row, in the order of timm's names."""
    state = model.state_dict()
    return torch.cat(
        [state[name].flatten() for name in sorted(state) if name.endswith(("weight", "bias"))]
    )


def table(found: dict[str, Any]) -> str:
    row = found["row"]
    low, high = row["ratio_range"]
    return "\n".join(
        [
            "| measured | ours, ms | timm, ms | ratio (range) | goal |",
            "|---|---|---|---|---|",
            f"| clipping, RMSProp, running average | {1e3 / row['ours_per_s']:.3g} | "
            f"{1e3 / row['peer_per_s']:.3g} | **{row['ratio']:.2f}** ({low:.2f} to {high:.2f}) | "
            f"{GOALS[found['device_type']]} |",
        ]
    )
