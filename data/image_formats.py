"""Formats that images may have: those that Pillow decodes within this process.

The content of a file decides which it is, not its name.
"""

from __future__ import annotations

import io
import os
from functools import cache

from PIL import Image, features
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.errors import unreadable
from data.files import read_regular

# Not EPS, which Ghostscript would run, nor IPTC, which may hold it, nor formats of which Pillow
# knows the head alone.
FORMATS = {
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS",
    "ICO", "IM", "IMT", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM",
    "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB",
}  # fmt: skip
MAX_BYTES = 2 << 30  # of a file; 250 megapixels of 16-bit colour, not compressed, have 1.5 GB
LIMIT = "MAX_MEGAPIXELS"  # variable of the environment
MEGAPIXELS = 250  # if it is not set: 1 GB in a worker, as PIL holds them; telephones make 200
MAX_PASSES = 10  # over the pixels of the largest image: progressive JPEGs take ten
MAX_ASPECT = 1000  # evaluation scales the shorter side up to some 333 px, and the longer with it
JPEG_START, SCAN = b"\xff\xd8\xff", b"\xff\xda"
SEQUENTIAL_FRAMES = (0xC0, 0xC1, 0xC9)  # their markers' second byte
OPTIONAL = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}  # format -> Pillow's feature


@cache
def decoded_formats() -> tuple[str, ...]:
    """Names of the formats that Pillow, as it is installed, decodes, in its order."""
    Image.init()
    return tuple(
        kind
        for kind in Image.ID
        if kind in FORMATS and (kind not in OPTIONAL or features.check(OPTIONAL[kind]))
    )


@cache
def image_extensions() -> tuple[str, ...]:
    """Endings of files of these formats; ImageFolder's among them."""
    formats = decoded_formats()  # before Pillow is asked for its endings
    decoded = {
        extension for extension, kind in Image.registered_extensions().items() if kind in formats
    }
    return tuple(sorted(decoded | {".mpo", *IMG_EXTENSIONS}))  # MPO: JPEGs with more behind them


def begins_an_image(head: bytes) -> bool:
    """True for the first bytes of a file that Pillow would try to decode."""
    acceptors = (Image.OPEN[kind][1] for kind in decoded_formats())
    return any(accept is not None and accept(head[:16]) for accept in acceptors)


def count_scans(jpeg: bytes) -> int:
    """Count the passes over all its pixels that decoding a JPEG takes; a forged one has thousands.

    That is one if the first scan holds all colours in full (ITU-T T.81, B.2), and else as many as
    bytes look like the start of one.
    """
    place, colours = len(JPEG_START) - 1, None
    while jpeg[place : place + 1] == b"\xff" and place + 9 < len(jpeg):
        marker = jpeg[place + 1]
        if marker in SEQUENTIAL_FRAMES:
            colours = jpeg[place + 9]
        if marker == SCAN[1]:
            return 1 if jpeg[place + 4] == colours else jpeg.count(SCAN)
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return jpeg.count(SCAN)


def read_image(path: str) -> bytes:
    """Read an image's file. Raises ImageError; a fault of the system as `unreadable` makes it."""
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise unreadable(path, error) from None


def open_image(encoded: bytes) -> Image.Image:
    """Open an image, with its pixels still to be decoded.

    Raises UnidentifiedImageError for another format, ValueError as `check_size`, and whatever
    Pillow raises for a damaged one.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels()  # Pillow's own, of twice as many, for images within files
    image = Image.open(io.BytesIO(encoded), formats=decoded_formats())
    has_scans = encoded.startswith(JPEG_START) or image.format == "BLP"  # which may hold a JPEG
    check_size(*image.size, count_scans(encoded) if has_scans else 1)
    return image


def check_size(width: int, height: int, passes: int) -> None:
    """Raise ValueError for an image that would take more memory, or time, than is meant for one.

    passes: how often decoding goes over all pixels.
    """
    if width * height > max_pixels():
        megapixels = width * height / 1e6
        raise ValueError(
            f"{width} x {height} px, {megapixels:,.0f} megapixels: over {LIMIT}, which is "
            f"{max_pixels() / 1e6:g}; set it in the environment"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} px, over {MAX_ASPECT} to 1")
    if width * height * passes > MAX_PASSES * max_pixels():
        raise ValueError(
            f"{passes:,} scans of {width} x {height} px: over {MAX_PASSES} times {LIMIT}"
        )


def max_pixels() -> int:
    """Return how many pixels an image may have. Raises ValueError if it is set to no number."""
    text = os.environ.get(LIMIT, str(MEGAPIXELS))
    try:
        return int(float(text) * 1e6)
    except (ValueError, OverflowError):
        raise ValueError(f"{LIMIT}={text} in the environment is not a number") from None
