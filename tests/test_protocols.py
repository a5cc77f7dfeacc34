"""The views of each protocol against Pillow and plain arithmetic."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from photographs import CHINA
from PIL import Image

from data.protocols import PROTOCOLS, CropsView, SlimView
from data.transforms import EvalView


def views(name: str, pixels: np.ndarray, size: int = 299) -> np.ndarray:
    """Views that a protocol shows of an image, uint8 [views, size, size, 3]."""
    view = PROTOCOLS[name].view(size, 0.875, "bicubic")
    out = np.empty(view.shape, np.uint8)
    assert view(pixels, 0, 0, out) == (False, None)
    return out.reshape(-1, size, size, 3)


RECORD = json.loads(Path(__file__).with_name("data").joinpath("tensorflow.json").read_text())


@pytest.mark.parametrize("case", RECORD["eval_view"])
def test_slims_view_is_tensorflows(case):
    pixels, expected = np.array(case["pixels"], np.uint8), np.array(case["result"])
    (ours,) = views("slim", pixels, len(expected))
    assert np.abs(ours - expected).max() <= 0.5 + 1e-3  # rounded to 8 bits


def by_pillow(pixels: np.ndarray, shorter: int, squares: int) -> list[np.ndarray]:
    """Squares of the resized photograph, and of each its four corners, centre and whole."""
    height, width, _ = pixels.shape
    longer = int(shorter * max(height, width) / min(height, width))
    size = (shorter, longer) if height >= width else (longer, shorter)
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    middle = round((longer - shorter) / 2)
    found = []
    for offset in [0, middle, longer - shorter] if squares == 3 else [middle]:
        x, y = (0, offset) if height >= width else (offset, 0)
        square = resized.crop((x, y, x + shorter, y + shorter))
        far, centre = shorter - 299, round((shorter - 299) / 2)
        for x, y in [(0, 0), (far, 0), (0, far), (far, far), (centre, centre)]:
            found.append(np.asarray(square.crop((x, y, x + 299, y + 299))))
        found.append(np.asarray(square.resize((299, 299), Image.Resampling.BILINEAR)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [CHINA, CHINA[:, :300]], ids=["wide", "tall"])
def test_the_papers_crops_are_pillows(pixels):
    pixels = np.ascontiguousarray(pixels)
    twelve = views("paper-12", pixels)
    expected = by_pillow(pixels, 342, squares=1)
    assert np.array_equal(twelve, expected)
    assert np.array_equal(views("paper-single", pixels), expected[4:5])
    many = views("paper-144", pixels)
    expected = [v for side in (342, 384, 427, 470) for v in by_pillow(pixels, side, squares=3)]
    assert np.array_equal(many, expected)
    assert len({view.tobytes() for view in many}) == 72


def test_with_mirror_images_the_papers_counts_come_out():
    shown = {
        name: len(views(name, CHINA, 75)) * (2 if protocol.mirrored else 1)
        for name, protocol in PROTOCOLS.items()
    }
    assert shown == {
        "timm": 1, "flip": 2, "slim": 1, "paper-single": 1, "paper-12": 12, "paper-144": 144,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["timm", "flip"])
def test_timms_view_is_the_default_and_flips(name):
    assert PROTOCOLS[name].view(299, 0.8975, "bicubic") == EvalView(299, 0.8975, "bicubic")


def test_any_shape_of_image_can_be_shown():
    shapes = [(1, 1), (1, 1000), (1000, 1), (3, 2000), (76, 75)]
    for name, shape in product(PROTOCOLS, shapes):
        pixels = np.full((*shape, 3), 200, np.uint8)
        assert (views(name, pixels, 75) == 200).all(), (name, shape)


def test_at_224_px_the_sides_are_googlenets():
    view = PROTOCOLS["paper-144"].view(224, 0.875, "bicubic")
    assert isinstance(view, CropsView) and view.shorter_sides == (256, 288, 320, 352)
    assert isinstance(PROTOCOLS["slim"].view(224, 0.875, "bicubic"), SlimView)
