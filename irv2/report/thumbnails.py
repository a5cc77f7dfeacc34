"""Small pictures within a page."""

from __future__ import annotations

import base64
import io
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


def thumbnail(image: Image.Image, path: str, side: int = SIDE) -> Thumbnail:
    """Make a small picture whose longer side is at most `side` px; path: of its file."""
    image = image.convert("RGB")
    is_tiny = max(image.size) <= TINY
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png" if is_tiny else "jpeg"
    image.save(buffer, kind, quality=80, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(PurePath(path).name, f"data:image/{kind};base64,{data}", is_tiny)
