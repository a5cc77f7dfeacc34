"""Evaluation protocols by name: which views of an image a network is shown.

The protocols of the papers are defined for 224 px (GoogLeNet, Szegedy et al., arXiv:1409.4842,
section 7); every length is scaled with the input's side, which for 299 px gives shorter sides of
342, 384, 427 and 470 px. What the papers leave open, how images are resized, is antialiased
bilinear here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.loader import View
from data.native import native
from data.resample import Box, resize
from data.transforms import EvalView, SquareView

REFERENCE_SIDE = 224  # px, of the networks for which the crops were described
SHORTER_SIDES = (256, 288, 320, 352)  # px, at REFERENCE_SIDE
SLIM_CENTRAL_FRACTION = 0.875  # TF-slim, inception_preprocessing.py, preprocess_for_eval


@dataclass(frozen=True)
class SlimView(SquareView):
    """TF-slim's evaluation view: the central 87.5 % of each side, squashed to a square.

    Resized as TensorFlow 1's `resize_bilinear` does it, without antialiasing and from pixels'
    corners; TensorFlow keeps fractions, here they are rounded to 8 bits.
    """

    def __call__(
        self, pixels: np.ndarray, epoch: int, index: int, out: np.ndarray
    ) -> tuple[bool, None]:
        """Put the view of uint8 [H, W, 3] into `out`, uint8 [size, size, 3]."""
        height, width, _ = pixels.shape
        top = int((height - height * SLIM_CENTRAL_FRACTION) / 2)  # tf.image.central_crop
        left = int((width - width * SLIM_CENTRAL_FRACTION) / 2)
        _resize_from_corners(pixels[top : height - top, left : width - left], out)
        return False, None


@native
def _resize_from_corners(pixels, out):
    """Take output pixel i at i * input side / output side, between two pixels of the input."""
    height, width, _ = pixels.shape
    size = out.shape[0]
    for i in range(size):
        y = np.float32(i) * (np.float32(height) / np.float32(size))
        top = int(y)
        bottom, down = min(top + 1, height - 1), y - np.float32(top)
        for j in range(size):
            x = np.float32(j) * (np.float32(width) / np.float32(size))
            left = int(x)
            right, across = min(left + 1, width - 1), x - np.float32(left)
            for channel in range(3):
                upper = _mix(pixels[top, left, channel], pixels[top, right, channel], across)
                lower = _mix(pixels[bottom, left, channel], pixels[bottom, right, channel], across)
                out[i, j, channel] = int(_mix(upper, lower, down) + np.float32(0.5))


@native
def _mix(a, b, share):
    return np.float32(a) + (np.float32(b) - np.float32(a)) * share


@dataclass(frozen=True)
class CropsView:
    """The crops of the Inception papers: squares of the resized image, and views of each square.

    shorter_sides: px that the image's shorter side is resized to, one after another. of_three:
    squares at the beginning, centre and end of the longer side, else only the centre one.
    of_six: of each square its four corners, its centre, and the whole; else only the centre.
    """

    size: int
    shorter_sides: tuple[int, ...]
    of_three: bool = False
    of_six: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        count = len(self.shorter_sides) * (3 if self.of_three else 1) * (6 if self.of_six else 1)
        return count, self.size, self.size, 3

    def __call__(
        self, pixels: np.ndarray, epoch: int, index: int, out: np.ndarray
    ) -> tuple[bool, None]:
        """Put the views of uint8 [H, W, 3] into `out`, uint8 [views, size, size, 3]."""
        places = iter(out)
        for shorter in self.shorter_sides:
            for square in self._squares(pixels, shorter):
                room = shorter - self.size
                middle = round(room / 2)
                corners = [(0, 0), (room, 0), (0, room), (room, room)] if self.of_six else []
                for x, y in [*corners, (middle, middle)]:
                    next(places)[:] = square[y : y + self.size, x : x + self.size]
                if self.of_six:
                    whole = Box(0, 0, shorter, shorter)
                    resize(square, next(places), box=whole, size=(self.size, self.size))
        return False, None

    def _squares(self, pixels: np.ndarray, shorter: int) -> list[np.ndarray]:
        """Cut squares from the image resized to a shorter side, uint8 [shorter, shorter, 3]."""
        height, width, _ = pixels.shape
        longer = int(shorter * max(height, width) / min(height, width))
        offsets = [round((longer - shorter) / 2)]
        if self.of_three:
            offsets = [0, *offsets, longer - shorter]
        squares = []
        for offset in offsets:
            square = np.empty((shorter, shorter, 3), np.uint8)
            is_tall = height >= width
            size, corner = (shorter, longer), (0, offset)
            if not is_tall:
                size, corner = size[::-1], corner[::-1]
            resize(pixels, square, box=Box(0, 0, width, height), size=size, corner=corner)
            squares.append(square)
        return squares


class Protocol(NamedTuple):
    """A way to show an image; the softmax is averaged over all its views."""

    description: str
    view: Callable[[int, float, str], View]  # size, crop and interpolation, where they matter
    mirrored: bool = False  # every view also mirrored left to right


def _scaled(size: int, sides: tuple[int, ...] = SHORTER_SIDES) -> tuple[int, ...]:
    return tuple(math.floor(side * size / REFERENCE_SIDE + 0.5) for side in sides)


PROTOCOLS = {
    "timm": Protocol("shorter side to size / crop, centre crop; as timm", EvalView),
    "flip": Protocol("timm's view and its mirror image", EvalView, mirrored=True),
    "slim": Protocol(
        "central 87.5 % of each side, squashed to a square, bilinear; as TF-slim",
        lambda size, crop, interpolation: SlimView(size),
    ),
    "paper-single": Protocol(
        "shorter side to 342 px (of 299), centre crop, bilinear",
        lambda size, crop, interpolation: CropsView(size, _scaled(size)[:1]),
    ),
    "paper-12": Protocol(
        "of the centre square at 342 px: 4 corners, centre, whole; and mirror images",
        lambda size, crop, interpolation: CropsView(size, _scaled(size)[:1], of_six=True),
        mirrored=True,
    ),
    "paper-144": Protocol(
        "at 342, 384, 427, 470 px 3 squares each, of each 4 corners, centre, whole; and mirror "
        "images",
        lambda size, crop, interpolation: CropsView(
            size, _scaled(size), of_three=True, of_six=True
        ),
        mirrored=True,
    ),
}
