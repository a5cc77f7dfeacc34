"""uint8 batches -> the network's input on the device: flip, colour and normalisation in one pass.

On CPUs that pass is a compiled loop; elsewhere PyTorch's operations, of which `torch.compile`
makes one kernel. Without colour both look the numbers up in one table, so that they are the same to
the bit on every device; with colour they agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.native import native

LEVELS = 256


class Colour(NamedTuple):
    """Colour change of one image."""

    brightness: float  # added to pixels in [0, 1]
    saturation: float  # multiplies saturation, value kept
    saturation_first: float  # 1: saturation, then brightness; 0: the other way round


class ToInput:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in channels-last memory, on the same device.

    mean, std: of each channel, for pixels in [0, 1]; where no colour changes, the result is exactly
    timm's (pixel / 255 - mean) / std. compiler: of what runs on a GPU, as torch.compile.
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        device: torch.device,
        compiler: Callable[[Callable], Callable] | None = None,
    ) -> None:
        self.device = device
        means, stds = torch.tensor(mean), torch.tensor(std)
        levels = torch.arange(LEVELS).view(-1, 1)
        table = (levels / 255 - means) / stds  # what each level becomes
        self._table = table.numpy()
        self._scale = tuple(np.float32(1 / s) for s in std)
        self._shift = tuple(np.float32(-m / s) for m, s in zip(mean, std))
        self._constants = [tensor.to(device) for tensor in (table, means, stds)]
        self._transform = transform if compiler is None else compiler(transform)

    def __call__(self, images: Tensor, flips: Tensor, colours: Tensor | None) -> Tensor:
        """flips: bool [B], mirrored left to right; colours: float32 [B, 3], rows of `Colour`."""
        if images.device.type != "cpu":
            return self._transform(images, flips, colours, *self._constants)
        result = torch.empty(images.shape)
        if colours is None:
            _look_up(images.numpy(), flips.numpy(), self._table, result.numpy())
        else:
            numpy = (tensor.numpy() for tensor in (images, flips, colours, result))
            _change_colour(*numpy, self._scale, self._shift)
        return result.permute(0, 3, 1, 2)


def transform(
    images: Tensor,
    flips: Tensor,
    colours: Tensor | None,
    table: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Do what `ToInput` does in PyTorch's operations, for any device. table: float32 [256, 3]."""
    images = torch.where(flips.view(-1, 1, 1, 1), images.flip(2), images)
    if colours is None:  # looked up: devices divide in different ways
        channels = torch.arange(3, device=images.device)
        return table[images.int(), channels].permute(0, 3, 1, 2)
    x = apply_colour(images.permute(0, 3, 1, 2).float() / 255, colours)
    return (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def apply_colour(images: Tensor, colours: Tensor) -> Tensor:
    """Apply the change of each image: float [B, 3, H, W] in [0, 1], [B, 3] -> the same, in [0, 1].

    As TensorFlow's adjust_brightness and adjust_saturation: saturation is HSV's, with value kept;
    pixels are clipped once, at the end.
    """
    brightness, saturation, saturation_first = colours.view(-1, 3, 1, 1, 1).unbind(1)
    x = images + brightness * (1 - saturation_first)
    value = x.amax(1, keepdim=True)
    # s = (value - min) / value becomes min(s * factor, 1): every channel's distance from value
    # shrinks or grows by min(factor, 1 / s).
    limit = value.clamp_min(1e-12) / (value - x.amin(1, keepdim=True))
    x = value - (value - x) * torch.minimum(saturation, limit)
    return (x + brightness * saturation_first).clamp(0, 1)


@native
def _look_up(images, flips, table, result):
    """Look up pixels, which without colour have 256 values: table is float32 [256, 3]."""
    count, height, width, _ = images.shape
    for i in range(count):
        for y in range(height):
            row, out = images[i, y].reshape(3 * width), result[i, y].reshape(3 * width)
            for x in range(width):
                at = width - 1 - x if flips[i] else x
                for channel in range(3):
                    out[3 * at + channel] = table[row[3 * x + channel], channel]


@native
def _change_colour(images, flips, colours, result, scale, shift):
    """Do `apply_colour` by rows with their channels apart, so that it becomes vector code."""
    count, height, width, _ = images.shape
    zero, one, tiny = np.float32(0), np.float32(1), np.float32(1e-12)
    level = np.float32(1 / 255)
    planes, mirrored = np.empty((3, width), np.float32), np.empty((3, width), np.float32)
    red, green, blue = planes[0], planes[1], planes[2]
    (red_scale, green_scale, blue_scale), (red_shift, green_shift, blue_shift) = scale, shift
    for i in range(count):
        brightness, saturation, saturation_first = colours[i]
        before = brightness * (one - saturation_first)
        after = brightness * saturation_first
        for y in range(height):
            row, out = images[i, y].reshape(3 * width), result[i, y].reshape(3 * width)
            for x in range(width):
                red[x], green[x], blue[x] = row[3 * x], row[3 * x + 1], row[3 * x + 2]
            for x in range(width):
                r = red[x] * level + before
                g = green[x] * level + before
                b = blue[x] * level + before
                value, least = max(max(r, g), b), min(min(r, g), b)
                factor = min(saturation, max(value, tiny) / max(value - least, tiny))
                r = value - (value - r) * factor + after
                g = value - (value - g) * factor + after
                b = value - (value - b) * factor + after
                red[x] = min(max(r, zero), one) * red_scale + red_shift
                green[x] = min(max(g, zero), one) * green_scale + green_shift
                blue[x] = min(max(b, zero), one) * blue_scale + blue_shift
            shown = planes
            if flips[i]:
                for channel in range(3):
                    for x in range(width):  # an index without sign cannot count from the end
                        mirrored[channel, x] = planes[channel, np.uint64(width - 1 - x)]
                shown = mirrored
            first, second, third = shown[0], shown[1], shown[2]
            for x in range(width):
                out[3 * x], out[3 * x + 1], out[3 * x + 2] = first[x], second[x], third[x]
