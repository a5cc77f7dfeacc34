"""Resizing, bit for bit as Pillow does it, several times as fast, and only the part wanted.

Pillow resizes 8-bit images in two passes, rows first, with weights in fixed point and a rounding
to 8 bits after each pass (Pillow, src/libImaging/Resample.c). The same numbers come out here from
loops that a compiler turns into vector instructions: for that, the first pass takes a block of
rows at a time, turned so that the rows of the block lie side by side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from data.native import native

FRACTION_BITS = 22  # Pillow's PRECISION_BITS: 32 - 8 - 2
HALF = 1 << (FRACTION_BITS - 1)  # rounds to nearest
BLOCK = 64  # rows turned at a time
LANES = BLOCK * 3  # bytes side by side; a constant, so that the compiler can lay out its vectors


class Box(NamedTuple):
    """A rectangle of an image, px."""

    x: int
    y: int
    width: int
    height: int


def resize(
    pixels: np.ndarray,
    out: np.ndarray,
    *,
    box: Box,
    size: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    bicubic: bool = False,
) -> None:
    """Resize `box` of an image to `size`, and put the part that begins at `corner` into `out`.

    pixels: uint8 [H, W, 3]; out: uint8 [h, w, 3], both C-contiguous. size and corner: (width,
    height) and (x, y) in px, with the part inside. Pixels are those of
    `PIL.Image.crop(box).resize(size, BILINEAR or BICUBIC).crop(part)`, rows always before columns.
    Raises ValueError for rectangles that do not fit.
    """
    height, width, _ = pixels.shape
    part = out.shape[1], out.shape[0]
    fits = (
        _lies_in((box.x, box.y), (box.width, box.height), (width, height))
        and _lies_in(corner, part, size)
        and min(box.width, box.height) > 0
    )
    if not fits:
        raise ValueError(f"{box} of {width} x {height} px to {part} at {corner} of {size}")
    _resize(pixels, out, tuple(box), size, corner, bicubic)


def _lies_in(corner: tuple[int, int], part: tuple[int, int], whole: tuple[int, int]) -> bool:
    return all(c >= 0 and c + p <= w for c, p, w in zip(corner, part, whole))


@native
def _resize(pixels, out, box, size, corner, bicubic):
    x, y, width, height = box
    out_height, out_width, _ = out.shape
    firsts, counts, weights = _weights(width, size[0], corner[0], out_width, bicubic)
    row_firsts, row_counts, row_weights = _weights(height, size[1], corner[1], out_height, bicubic)
    begin, end = row_firsts[0], row_firsts[-1] + row_counts[-1]
    narrow = np.empty((end - begin, out_width, 3), np.uint8)
    _resize_rows(pixels[y + begin : y + end], narrow, firsts + x, counts, weights)
    rows, lines = narrow.reshape(end - begin, out_width * 3), out.reshape(out_height, out_width * 3)
    _combine_rows(rows, lines, row_firsts - begin, row_counts, row_weights)


@native
def _weights(size, out_size, out_first, out_count, bicubic):
    """Compute first input, number of inputs and fixed-point weights, from output `out_first` on."""
    scale = size / out_size
    stretch = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * stretch
    most = math.ceil(support) * 2 + 1
    firsts, counts = np.empty(out_count, np.int64), np.empty(out_count, np.int64)
    fixed = np.zeros((out_count, most), np.int32)
    weights = np.empty(most)
    for i in range(out_count):
        centre = (out_first + i + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), size) - first
        total = 0.0
        for k in range(count):
            distance = abs((k + first - centre + 0.5) * (1.0 / stretch))
            weights[k] = _bicubic(distance) if bicubic else max(1.0 - distance, 0.0)
            total += weights[k]
        for k in range(count):
            weight = weights[k] / total * (1 << FRACTION_BITS)
            fixed[i, k] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
        firsts[i], counts[i] = first, count
    return firsts, counts, fixed


@native
def _bicubic(distance):
    """Evaluate Keys' cubic with a = -0.5, operations in Pillow's order."""
    a = -0.5
    if distance < 1.0:
        return ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1
    if distance < 2.0:
        return (((distance - 5) * distance + 8) * distance - 4) * a
    return 0.0


@native
def _resize_rows(pixels, out, firsts, counts, weights):
    """Resize each row on its own: [H, W, 3] -> [H, w, 3]."""
    height, _, _ = pixels.shape
    left, right = firsts[0], firsts[-1] + counts[-1]
    turned = np.empty((right - left, LANES), np.uint8)
    sums = np.empty(LANES, np.int32)
    for top in range(0, height, BLOCK):
        rows = min(BLOCK, height - top)
        for row in range(rows):
            for x in range(left, right):
                for channel in range(3):
                    turned[x - left, row * 3 + channel] = pixels[top + row, x, channel]
        for i in range(len(firsts)):
            _add_up(turned, firsts[i] - left, counts[i], weights[i], sums, LANES)
            for row in range(rows):
                for channel in range(3):
                    out[top + row, i, channel] = sums[row * 3 + channel]


@native
def _combine_rows(rows, out, firsts, counts, weights):
    """Resize each column on its own: [H, n] -> [h, n]."""
    length = rows.shape[1]
    sums = np.empty(length, np.int32)
    for i in range(len(firsts)):
        _add_up(rows, firsts[i], counts[i], weights[i], sums, length)
        for j in range(length):
            out[i, j] = sums[j]


@native
def _add_up(rows, first, count, weights, sums, length):
    """sums = weighted sum of `count` rows from `first` on, rounded and within 0 to 255."""
    weight, row = weights[0], rows[first]
    for j in range(length):
        sums[j] = HALF + np.int32(row[j]) * weight
    for k in range(1, count):
        weight, row = weights[k], rows[first + k]
        for j in range(length):
            sums[j] += np.int32(row[j]) * weight
    for j in range(length):
        sums[j] = min(max(sums[j] >> FRACTION_BITS, 0), 255)
