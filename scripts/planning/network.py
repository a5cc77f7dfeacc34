"""What a config's network weighs and asks for, counted without computing anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import recipe
from irv2.config import Config, Model
from scripts.planning.steptime import Gradients, buckets

SENT_BYTES = {"fp32": 4, "bf16": 2}  # of one gradient, by train.reduce_dtype


@dataclass(frozen=True)
class Weight:
    """Counts of one network."""

    parameters: int  # that are trained
    gradients: Gradients
    checkpoint_bytes: int  # tensors of weights, average, and the optimizer's two slots


def weigh(cfg: Config, num_classes: int) -> Weight:
    """Counts of a config's network for so many classes."""
    with torch.device("meta"):
        model = recipe.network(cfg.model, num_classes)
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = [p for p in model.parameters() if p.requires_grad]
    count, size = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    sent = Gradients(count * SENT_BYTES[cfg.train.reduce_dtype], buckets(size))
    return Weight(count, sent, 2 * state + 2 * size)


def multiply_adds(model: Model, num_classes: int, image_size: int) -> int:
    """Multiply-adds of convolutions and classifier for one image of `image_size` px, forward.

    `model`: a config's section; a head that is there in training only is left out.
    """
    with torch.device("meta"), torch.no_grad():
        network = recipe.network(model, num_classes).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2
