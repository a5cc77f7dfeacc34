"""The pace that a device's matrix rate would allow, which that of a run is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SIZES = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product that is timed
REPEATS = 4


def training_multiply_adds(model: nn.Module, image_size: int) -> int:
    """Count the multiply-adds of an image's forward and backward, by shapes alone.

    model: on the meta device. What is frozen has no backward; what is recomputed counts once.
    """
    images = 2  # batch norm needs more than one value per channel
    with FlopCounterMode(display=False) as counter:
        output = model.train()(torch.empty(images, 3, image_size, image_size, device="meta"))
        outputs = output if isinstance(output, tuple) else (output,)
        sum(each.sum() for each in outputs).backward()
    return counter.get_total_flops() // 2 // images


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Measure the multiply-adds a second of a matrix product, large for the device or of `size`
    rows and columns, the best of a few."""
    size = size or SIZES[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()
    return size**3 / min(_seconds(product) for _ in range(REPEATS))


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
