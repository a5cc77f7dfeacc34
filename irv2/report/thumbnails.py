"""Small pictures within a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

from PIL import Image

SIDE = 112  # px, of the longer side
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
        image = self._picture(number).convert("RGB")
        is_tiny = max(image.size) <= TINY
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer, kind = io.BytesIO(), "png" if is_tiny else "jpeg"
        image.save(buffer, kind, quality=80, optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        name = PurePath(self._image_name(number)).name
        return Thumbnail(name, f"data:image/{kind};base64,{data}", is_tiny)
