"""Encoded bytes -> pixels: decoding, the Inception crop and colour, evaluation views.

Workers decode, crop and resize to uint8; colour and normalisation run on the device, on the whole
batch. What is random in an image's view is drawn from (seed, epoch, index) alone.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.sources import ImageError

MAX_BRIGHTNESS_DELTA = 32 / 255  # TF-slim, inception_preprocessing.py, distort_color (fast mode)
SATURATION_RANGE = (0.5, 1.5)
MIN_COVERED = 0.1  # TF-slim's min_object_covered, with the whole image as the object
MAX_ATTEMPTS = 100

# 400 MB in a worker, as PIL holds them; the average image of ImageNet has 0.2 million.
MAX_PIXELS = 100_000_000
MAX_ASPECT = 1000  # evaluation scales the shorter side up to some 333 px, and the longer with it

VIEW = 1  # keeps a view's draws apart from those of the order, seeded by (seed, epoch)


class Colour(NamedTuple):
    """Colour change of one image."""

    brightness: float  # added to pixels in [0, 1]
    saturation: float  # multiplies saturation, value kept
    saturation_first: float  # 1: saturation, then brightness; 0: the other way round


def decode(encoded: bytes, name: str) -> Image.Image:
    """Encoded image -> RGB, the first frame if there are several.

    As timm's and torchvision's ImageFolder (and TF-slim), on which published results rest: an EXIF
    orientation is not applied, and transparency is dropped, not blended. Unlike theirs, 16 bits are
    scaled to 8. Raises ImageError naming the image, before decoding if it has over MAX_PIXELS
    or is more than MAX_ASPECT times as long as wide.
    """
    try:
        with warnings.catch_warnings():  # a file's oddities, told by PIL anew in every epoch
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} px, over {MAX_PIXELS:,} in all")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width} x {image.height} px, over {MAX_ASPECT} to 1")
            return _to_rgb(image)
    except MemoryError:  # says nothing of the image
        raise
    except UnidentifiedImageError:  # its own message quotes the buffer's address
        raise ImageError(f"{name}: cannot be decoded (not a known kind of image)") from None
    except Exception as error:
        raise ImageError(f"{name}: cannot be decoded ({error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB. Raises ValueError for grey levels without a known range."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, of no known range")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    # PIL's convert would make every level from 255 on white.
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError("32-bit pixels, of no known range")
    # The high byte: what PIL itself (16-bit colour), libpng and TensorFlow take.
    return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")


# ---------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainView:
    """TF-slim's training view: distorted crop, resize to a square, flip, colour."""

    size: int
    seed: int
    area_range: tuple[float, float] = (0.05, 1.0)
    aspect_range: tuple[float, float] = (0.75, 1.33)
    hflip: float = 0.5
    colour: bool = True

    def __call__(
        self, image: Image.Image, epoch: int, index: int
    ) -> tuple[np.ndarray, Colour | None]:
        """RGB image -> (uint8 [size, size, 3], colour change still to be applied)."""
        rng = np.random.default_rng((self.seed, epoch, index, VIEW))
        x, y, width, height = draw_crop(rng, *image.size, self.area_range, self.aspect_range)
        # Cut first: resize(box=…) would let pixels outside the crop into its edge.
        crop = image.crop((x, y, x + width, y + height))
        pixels = np.asarray(crop.resize((self.size, self.size), Image.Resampling.BILINEAR))
        if rng.random() < self.hflip:
            pixels = pixels[:, ::-1]
        return pixels, draw_colour(rng) if self.colour else None


def draw_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Crop (x, y, width, height) in px by the law of TensorFlow's sample_distorted_bounding_box.

    Aspect is uniform (not its logarithm), then height is uniform over what the area range allows,
    then the place; a crop that covers less than a tenth of the image is drawn again, as TF-slim's
    min_object_covered has it. After 100 attempts: the whole image.
    Source: tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc.
    """
    smallest, largest = (share * width * height for share in area_range)
    for _ in range(MAX_ATTEMPTS):
        aspect = rng.uniform(*aspect_range)
        min_height = round(math.sqrt(smallest / aspect))
        max_height = round(math.sqrt(largest / aspect))
        if round(max_height * aspect) > width:
            max_height = int((width + 0.5 - 1e-7) / aspect)
            max_height -= round(max_height * aspect) > width
        max_height = min(max_height, height)
        min_height = min(min_height, max_height)
        crop_height = int(rng.integers(min_height, max_height, endpoint=True))
        crop_width = round(crop_height * aspect)
        if crop_width * crop_height < smallest:
            crop_height += 1
        elif crop_width * crop_height > largest:
            crop_height -= 1
        crop_width = round(crop_height * aspect)
        area = crop_width * crop_height
        fits = 0 < crop_width <= width and 0 < crop_height <= height
        if not (fits and smallest <= area <= largest and area >= MIN_COVERED * width * height):
            continue
        # The last offset is never drawn: TensorFlow's Uniform(n) ends at n - 1.
        x = int(rng.integers(width - crop_width)) if crop_width < width else 0
        y = int(rng.integers(height - crop_height)) if crop_height < height else 0
        return x, y, crop_width, crop_height
    return 0, 0, width, height


def draw_colour(rng: np.random.Generator) -> Colour:
    """TF-slim's fast colour mode: brightness and saturation in either order."""
    return Colour(
        rng.uniform(-MAX_BRIGHTNESS_DELTA, MAX_BRIGHTNESS_DELTA),
        rng.uniform(*SATURATION_RANGE),
        float(rng.integers(2)),
    )


# ---------------------------------------------------------------------------------- evaluation


class EvalView:
    """timm's evaluation view: shorter side to size / crop, centre crop. Pixels are timm's own."""

    def __init__(self, size: int, crop: float, interpolation: str) -> None:
        self._transform = timm.data.create_transform(
            (3, size, size),
            is_training=False,
            use_prefetcher=True,  # uint8 out, normalised later
            interpolation=interpolation,
            crop_pct=crop,
        )

    def __call__(self, image: Image.Image, epoch: int, index: int) -> tuple[np.ndarray, None]:
        """RGB image -> (uint8 [size, size, 3], no colour change)."""
        return np.asarray(self._transform(image)).transpose(1, 2, 0), None


# ---------------------------------------------------------------------------------- on the device


def to_input(images: Tensor, colours: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> the network's input, float32 [B, 3, H, W] in channels-last memory.

    colours: [B, 3], rows of `Colour`; None leaves colours alone, and pixels are exactly timm's:
    (pixel / 255 - mean) / std.
    """
    x = images.permute(0, 3, 1, 2).float().div_(255)
    if colours is not None:
        x = apply_colour(x, colours)
    return x.sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))


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
    return (x + brightness * saturation_first).clamp_(0, 1)
