"""uint8 batches -> the network's input on the device: flip, colour and normalisation in one pass.

On CPUs that pass is a compiled loop; elsewhere PyTorch's operations, of which `torch.compile`
makes one kernel. Both give the same numbers, without colour to the bit.
"""

from __future__ import annotations

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
    timm's (pixel / 255 - mean) / std. compiled: whether to torch.compile what runs on a GPU.
    """

    def __init__(
        self, mean: list[float], std: list[float], device: torch.device, compiled: bool = False
    ) -> None:
        self.device = device
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        levels = torch.arange(LEVELS).view(-1, 1)
        self._table = ((levels / 255 - self.mean) / self.std).numpy()  # what each level becomes
        self._on_device = self.mean.to(device), self.std.to(device)
        self._transform = torch.compile(transform) if compiled else transform

    def __call__(self, images: Tensor, flips: Tensor, colours: Tensor | None) -> Tensor:
        """flips: bool [B], mirrored left to right; colours: float32 [B, 3], rows of `Colour`."""
        if images.device.type != "cpu":
            return self._transform(images, flips, colours, *self._on_device)
        result = torch.empty(images.shape)
        if colours is None:
            _look_up(images.numpy(), flips.numpy(), self._table, result.numpy())
        else:
            scale, shift = (1 / self.std).numpy(), (-self.mean / self.std).numpy()
            _change_colour(
                images.numpy(), flips.numpy(), colours.numpy(), scale, shift, result.numpy()
            )
        return result.permute(0, 3, 1, 2)


def transform(
    images: Tensor, flips: Tensor, colours: Tensor | None, mean: Tensor, std: Tensor
) -> Tensor:
    """What `ToInput` does, in PyTorch's operations, for any device."""
    images = torch.where(flips.view(-1, 1, 1, 1), images.flip(2), images)
    x = images.permute(0, 3, 1, 2).float() / 255
    if colours is not None:
        x = apply_colour(x, colours)
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
    """Without colour a pixel can have 256 values: table is float32 [256, 3]."""
    count, height, width, _ = images.shape
    for i in range(count):
        for y in range(height):
            row, out = images[i, y], result[i, y]
            if flips[i]:
                for x in range(width):
                    mirrored = width - 1 - x
                    for channel in range(3):
                        out[mirrored, channel] = table[row[x, channel], channel]
            else:
                for x in range(width):
                    for channel in range(3):
                        out[x, channel] = table[row[x, channel], channel]


@native
def _change_colour(images, flips, colours, scale, shift, result):
    """`apply_colour`, a row at a time with its channels apart, so that it becomes vector code."""
    count, height, width, _ = images.shape
    zero, one, tiny = np.float32(0), np.float32(1), np.float32(1e-12)
    level = np.float32(1 / 255)
    planes = np.empty((3, width), np.float32)
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(count):
        brightness, saturation, saturation_first = colours[i]
        before = brightness * (one - saturation_first)
        after = brightness * saturation_first
        for y in range(height):
            row, out = images[i, y], result[i, y]
            for x in range(width):
                red[x], green[x], blue[x] = row[x, 0], row[x, 1], row[x, 2]
            for x in range(width):
                r, g, b = (
                    red[x] * level + before,
                    green[x] * level + before,
                    blue[x] * level + before,
                )
                value = r if r > g else g
                value = value if value > b else b
                least = r if r < g else g
                least = least if least < b else b
                spread = value - least
                limit = (value if value > tiny else tiny) / (spread if spread > tiny else tiny)
                factor = saturation if saturation < limit else limit
                r = value - (value - r) * factor + after
                g = value - (value - g) * factor + after
                b = value - (value - b) * factor + after
                r = one if r > one else (r if r > zero else zero)
                g = one if g > one else (g if g > zero else zero)
                b = one if b > one else (b if b > zero else zero)
                red[x] = r * scale[0] + shift[0]
                green[x] = g * scale[1] + shift[1]
                blue[x] = b * scale[2] + shift[2]
            if flips[i]:
                for x in range(width):
                    mirrored = width - 1 - x
                    out[mirrored, 0], out[mirrored, 1], out[mirrored, 2] = red[x], green[x], blue[x]
            else:
                for x in range(width):
                    out[x, 0], out[x, 1], out[x, 2] = red[x], green[x], blue[x]
