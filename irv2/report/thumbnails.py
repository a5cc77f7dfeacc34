"""Small pictures within a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

from PIL import Image

SIDE = 112  # px, of the longer side
EXPLAINED = 480  # of a picture with its explanations beside it
TINY = SIDE // 2  # a picture up to here is shown enlarged, pixel by pixel


class Thumbnail(NamedTuple):
    """A picture as an <img> takes it."""

    name: str  # of its file
    source: str  # data: URI
    is_tiny: bool


class Gallery:
    """Pictures by image number."""

    def __init__(
        self, picture: Callable[[int], Image.Image], image_name: Callable[[int], str]
    ) -> None:
        self._picture, self._image_name = picture, image_name

    def picture(self, number: int) -> Thumbnail:
        """Load a picture, scaled down to `SIDE` if larger. Raises what the functions raise."""
        return thumbnail(self._picture(number), self._image_name(number))


def thumbnail(image: Image.Image, path: str, side: int = SIDE) -> Thumbnail:
    """Make a small picture whose longer side is at most `side` px; path: of its file."""
    image = image.convert("RGB")
    is_tiny = max(image.size) <= TINY
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png" if is_tiny else "jpeg"
    image.save(buffer, kind, quality=80, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(PurePath(path).name, f"data:image/{kind};base64,{data}", is_tiny)
