"""Encoded bytes -> uint8 pixels: decoding, the Inception crop, evaluation views.

Workers decode, crop and resize; flip, colour and normalisation run on the device, on the whole
batch (data/to_input.py). What is random in an image's view is drawn from (seed, epoch, index)
alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data.image_formats import JPEG_START, check_size, count_scans, open_image
from data.resample import Box, resize
from data.stream import VIEW
from data.to_input import Colour

MAX_BRIGHTNESS_DELTA = 32 / 255  # TF-slim, inception_preprocessing.py, distort_color (fast mode)
SATURATION_RANGE = (0.5, 1.5)
MIN_COVERED = 0.1  # TF-slim's min_object_covered, with the whole image as the object
MAX_ATTEMPTS = 100

JPEG_COLOURS = {"YCbCr", "RGB", "Gray"}  # of which two decoders make the same RGB

# ---------------------------------------------------------------------------------- decoding


class DecodeError(ValueError):
    """Bytes that are no image which can be used; the message says why."""


def decode(encoded: bytes) -> np.ndarray:
    """Decode an image: RGB, uint8 [H, W, 3], the first frame if there are several.

    As timm's and torchvision's ImageFolder (and TF-slim), on which published results rest: an EXIF
    orientation is not applied, and transparency is dropped, not blended. Unlike theirs, 16 bits are
    scaled to 8. Raises DecodeError, before decoding if it is too large or too long (`check_size`).
    """
    try:
        pixels = _decode_jpeg(encoded) if encoded.startswith(JPEG_START) else None
        return np.array(_decode_any(encoded)) if pixels is None else pixels
    except MemoryError:  # says nothing of the image
        raise
    except UnidentifiedImageError:  # its own message quotes the buffer's address
        raise DecodeError("cannot be decoded (not a known kind of image)") from None
    except Exception as error:
        raise DecodeError(f"cannot be decoded ({error})") from None


def _decode_jpeg(encoded: bytes) -> np.ndarray | None:
    """Decode a sound JPEG with the faster decoder; None leaves it to PIL. Pixels are the same."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours in JPEG_COLOURS:
            check_size(width, height, count_scans(encoded))
            return simplejpeg.decode_jpeg(encoded, "RGB")
    except ValueError:  # damaged, or merely odd
        pass
    return None


def _decode_any(encoded: bytes) -> Image.Image:
    """Decode whatever PIL reads."""
    with warnings.catch_warnings():  # PIL would warn of a file's oddities anew in every epoch
        warnings.simplefilter("ignore")
        return _to_rgb(open_image(encoded))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Raises ValueError for grey levels without a known range."""
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
class SquareView:
    """Base of the views that show an image as one square of `size` px."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output for one image."""
        return self.size, self.size, 3


@dataclass(frozen=True)
class TrainView(SquareView):
    """TF-slim's training view: distorted crop, resize to a square, flip, colour."""

    seed: int
    area_range: tuple[float, float] = (0.05, 1.0)
    aspect_range: tuple[float, float] = (0.75, 1.33)
    hflip: float = 0.5
    colour: bool = True
    augment: Callable[[np.ndarray, tuple[int, int, int]], None] | None = None

    def __call__(
        self, pixels: np.ndarray, epoch: int, index: int, out: np.ndarray
    ) -> tuple[bool, Colour | None]:
        """Put the crop of uint8 [H, W, 3] into `out`, uint8 [size, size, 3].

        Returns whether it is still to be mirrored, and the colour change still to be applied.
        `augment` may change `out`, given (seed, epoch, index) to draw from.
        """
        rng = np.random.default_rng((self.seed, epoch, index, VIEW))
        height, width, _ = pixels.shape
        box = draw_crop(rng, width, height, self.area_range, self.aspect_range)
        resize(pixels, out, box=box, size=(self.size, self.size))
        if self.augment is not None:
            self.augment(out, (self.seed, epoch, index))
        flip = bool(rng.random() < self.hflip)
        return flip, draw_colour(rng) if self.colour else None


def draw_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
) -> Box:
    """Draw a crop by the law of TensorFlow's sample_distorted_bounding_box.

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
        return Box(x, y, crop_width, crop_height)
    return Box(0, 0, width, height)


def draw_colour(rng: np.random.Generator) -> Colour:
    """Draw as TF-slim's fast colour mode does: brightness and saturation in either order."""
    return Colour(
        rng.uniform(-MAX_BRIGHTNESS_DELTA, MAX_BRIGHTNESS_DELTA),
        rng.uniform(*SATURATION_RANGE),
        float(rng.integers(2)),
    )


# ---------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class EvalView(SquareView):
    """timm's evaluation view: shorter side to size / crop, centre crop. Pixels are timm's own.

    Source: timm/data/transforms_factory.py, transforms_imagenet_eval, and what it calls of
    torchvision (Resize, CenterCrop).
    """

    crop: float
    interpolation: str

    def __call__(
        self, pixels: np.ndarray, epoch: int, index: int, out: np.ndarray
    ) -> tuple[bool, None]:
        """Put the view of uint8 [H, W, 3] into `out`, uint8 [size, size, 3]."""
        height, width, _ = pixels.shape
        shorter = math.floor(self.size / self.crop)
        if width <= height:
            resized = shorter, int(shorter * height / width)
        else:
            resized = int(shorter * width / height), shorter
        corner = tuple(round((side - self.size) / 2) for side in resized)
        bicubic = self.interpolation == "bicubic"
        if _order_of_passes_varies((width, height), resized):
            how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
            whole = np.asarray(Image.fromarray(pixels).resize(resized, how))
            out[:] = whole[corner[1] :, corner[0] :][: self.size, : self.size]
        else:
            whole = Box(0, 0, width, height)
            resize(pixels, out, box=whole, size=resized, corner=corner, bicubic=bicubic)
        return False, None


def as_evaluated(pixels: np.ndarray, view: EvalView) -> np.ndarray:
    """Show an image as an evaluation sees it: uint8 [H, W, 3] -> uint8 [size, size, 3]."""
    out = np.empty(view.shape, np.uint8)
    view(pixels, 0, 0, out)
    return out


def _order_of_passes_varies(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Return whether releases of Pillow differ: from 13 on it may resize columns first.

    It does so where the height shrinks by more than twice what the width does (Pillow #9549), as
    it can in pictures that are over twice as high as wide.
    """
    lost_width, lost_height = (before - after for before, after in zip(size, resized))
    return lost_height > max(0, 2 * lost_width)
