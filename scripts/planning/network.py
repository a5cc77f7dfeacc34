"""What a config's network weighs and asks for, counted without computing anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import recipe
from irv2.config import Config

SENT_BYTES = {"fp32": 4, "bf16": 2}  # of one gradient, by train.reduce_dtype


@dataclass(frozen=True)
class Weight:
    """Counts of one network."""

    parameters: int  # that are trained
    gradient_bytes: int  # of one exchange
    checkpoint_bytes: int  # tensors of weights, average, and the optimizer's two slots


def weigh(cfg: Config, num_classes: int) -> Weight:
    """Counts of a config's network for so many classes."""
    with torch.device("meta"):
        model = recipe.network(cfg.model, num_classes)
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    slots = 2 * sum(p.numel() * p.element_size() for p in trained)
    return Weight(count, count * SENT_BYTES[cfg.train.reduce_dtype], 2 * state + slots)


def multiply_adds(cfg: Config, num_classes: int, image_size: int) -> int:
    """Multiply-adds of convolutions and classifier for one image of `image_size` px, forward."""
    with torch.device("meta"), torch.no_grad():
        model = recipe.network(cfg.model, num_classes).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2
