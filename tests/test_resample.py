"""Resizing against Pillow's, to the bit."""

import numpy as np
import pytest
from PIL import Image

from data.resample import Box, resize

RNG = np.random.default_rng(0)
FILTERS = {False: Image.Resampling.BILINEAR, True: Image.Resampling.BICUBIC}


def pillow(pixels: np.ndarray, box: Box, size: tuple[int, int], bicubic: bool) -> np.ndarray:
    """Rows, then columns: releases from 13 on sometimes take the columns first if given both."""
    x, y, width, height = box
    crop = Image.fromarray(pixels).crop((x, y, x + width, y + height))
    return np.asarray(
        crop.resize((size[0], height), FILTERS[bicubic]).resize(size, FILTERS[bicubic])
    )


def random_part(width: int, height: int) -> Box:
    part_width, part_height = (int(RNG.integers(1, side + 1)) for side in (width, height))
    x, y = (int(RNG.integers(0, n + 1)) for n in (width - part_width, height - part_height))
    return Box(x, y, part_width, part_height)


def picture(width: int, height: int, extreme: bool) -> np.ndarray:
    """Noise; of black and white alone, so that a cubic's overshoot has to be cut off."""
    levels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(levels > 127, 255, 0).astype(np.uint8) if extreme else levels


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("extreme", [False, True])
def test_pixels_are_pillows_whatever_the_sizes(bicubic, extreme):
    for _ in range(60):
        width, height, *size = (int(n) for n in RNG.integers(1, 300, 4))
        pixels, box = picture(width, height, extreme), random_part(width, height)
        part = random_part(*size)
        out = np.empty((part.height, part.width, 3), np.uint8)
        resize(pixels, out, box=box, size=tuple(size), corner=part[:2], bicubic=bicubic)
        expected = pillow(pixels, box, tuple(size), bicubic)
        rows, columns = slice(part.y, part.y + part.height), slice(part.x, part.x + part.width)
        assert np.array_equal(out, expected[rows, columns]), (width, height, box, size, part)


def test_an_images_own_size_leaves_it_as_it_is():
    pixels = picture(50, 40, False)
    out = np.empty_like(pixels)
    resize(pixels, out, box=Box(0, 0, 50, 40), size=(50, 40), bicubic=True)
    assert np.array_equal(out, pixels)


@pytest.mark.parametrize(
    ("box", "size", "corner"),
    [
        (Box(0, 0, 51, 40), (8, 8), (0, 0)),
        (Box(-1, 0, 10, 10), (8, 8), (0, 0)),
        (Box(0, 35, 10, 6), (8, 8), (0, 0)),
        (Box(0, 0, 0, 10), (8, 8), (0, 0)),
        (Box(0, 0, 10, 10), (7, 8), (0, 0)),
        (Box(0, 0, 10, 10), (9, 8), (2, 0)),
    ],
)
def test_rectangles_that_do_not_fit_are_refused(box, size, corner):
    out = np.full((8, 8, 3), 9, np.uint8)
    with pytest.raises(ValueError, match=r"^Box\("):
        resize(picture(50, 40, False), out, box=box, size=size, corner=corner)
    assert (out == 9).all()
