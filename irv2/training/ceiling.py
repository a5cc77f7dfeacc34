"""The pace that a device's matrix rate would allow, which that of a run is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZES = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product that is timed
REPEATS = 4


def training_multiply_adds(model: nn.Module, image_size: int) -> int:
    """Count the multiply-adds of an image's forward and backward, by shapes alone.

    model: on the meta device, without gradient checkpointing; it is of no use afterwards. What is
    frozen has no backward.
    """
    images, total = 2, 0  # batch norm needs more than one value per channel

    def count(module: nn.Conv2d | nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        forward = output.numel() // images * module.weight[0].numel()
        total += forward * (1 + module.weight.requires_grad + inputs[0].requires_grad)

    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):  # PyTorch imports its compiler for it there
                setattr(module, name, nn.Identity())
    model.train()(torch.empty(images, 3, image_size, image_size, device="meta"))
    return total


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
