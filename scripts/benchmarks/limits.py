"""Limits of the network's speed on this machine: its convolutions alone.

(a) multiply-adds over the rate of a large matrix product; (b) the sum of the best times measured of
each convolution by itself, forward, and both of its gradients: channels-last memory, its input warm
in the cache, as a matrix product where that is faster and, forward, with weights that oneDNN has
put into its own order beforehand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irv2.network.accelerate import accelerate
from irv2.network.model import inception_resnet_v2
from irv2.training.ceiling import matrix_rate
from scripts.benchmarks.alternation import best_time

MATRIX = 4096  # rows and columns of the product that gives the matrix rate


class Shape(NamedTuple):
    """A convolution, and the images it is applied to."""

    input: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


def convolutions(batch: int, image_size: int) -> Counter[Shape]:
    """Count the network's convolutions by shape, with parallel 1x1 convolutions merged."""
    counts: Counter[Shape] = Counter()

    def note(conv: nn.Conv2d, inputs: tuple[Tensor], _output: Tensor) -> None:
        shape = tuple(inputs[0].shape)
        counts[Shape(shape, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)] += 1

    with torch.device("meta"):
        model = accelerate(inception_resnet_v2())
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(batch, 3, image_size, image_size))
    return counts


def measure(
    batch: int, image_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Multiply-adds of the convolutions, the matrix rate, and seconds of (a) and (b)."""
    macs, forward, backward = 0, 0.0, 0.0
    for shape, count in convolutions(batch, image_size).items():
        ways = _ways(shape, dtype, device)
        macs += count * ways.macs
        forward += count * _best(ways.forward, device)
        backward += count * (_best(ways.grad_weight, device) + _best(ways.grad_input, device))
    rate = matrix_rate(dtype, device, MATRIX)
    return {
        "multiply_adds": macs,
        "multiply_adds_per_s": rate,
        "a_forward_s": macs / rate,
        "a_train_s": 3 * macs / rate,
        "b_forward_s": forward,
        "b_train_s": forward + backward,
    }


def images_per_s(figures: dict[str, float], batch: int, what: str) -> dict[str, float]:
    """Limits (a) and (b) as rates; `what`: "forward" or "train"."""
    return {limit: batch / figures[f"{limit}_{what}_s"] for limit in ("a", "b")}


def _best(ways: list[Callable[[], object]], device: torch.device) -> float:
    return min(best_time(way, device) for way in ways)


class _Ways(NamedTuple):
    macs: int
    forward: list[Callable[[], object]]
    grad_weight: list[Callable[[], object]]
    grad_input: list[Callable[[], object]]


def _ways(shape: Shape, dtype: torch.dtype, device: torch.device) -> _Ways:
    """List the ways to compute one convolution and its gradients."""
    layout = {"dtype": dtype, "device": device, "memory_format": torch.channels_last}
    x = torch.randn(shape.input, device=device).to(**layout)
    kernel = (shape.out_channels, shape.input[1], *shape.kernel)
    weight = torch.randn(kernel, device=device).to(**layout)
    y = F.conv2d(x, weight, None, shape.stride, shape.padding)
    grad = torch.randn(y.shape, device=device).to(**layout)

    def backward(mask: tuple[bool, bool, bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, weight, None, shape.stride, shape.padding, (1, 1), False, (0, 0), 1, mask
        )

    ways = _Ways(
        macs=y.numel() * weight[0].numel(),
        forward=[lambda: F.conv2d(x, weight, None, shape.stride, shape.padding)],
        grad_weight=[backward((False, True, False))],
        grad_input=[backward((True, False, False))],
    )
    if device.type == "cpu":
        options = (shape.padding, shape.stride, (1, 1), 1)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *options, list(x.shape))
        ways.forward.append(
            lambda: torch.ops.mkldnn._convolution_pointwise(
                x, packed, None, *options, "none", [], None
            )
        )
    if shape.kernel == (1, 1):
        rows, out, matrix = _matrix(x), _matrix(grad), weight.flatten(1)
        ways.forward.append(lambda: rows @ matrix.t())
        ways.grad_weight.append(lambda: out.t() @ rows)
        ways.grad_input.append(lambda: out @ matrix)
    return ways


def _matrix(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)
