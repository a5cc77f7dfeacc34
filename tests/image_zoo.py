"""Images as they are found in the wild, sound and unsound, each with the pixels it should give."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30
ROTATED = 6  # EXIF orientation: to be turned by 90° for viewing
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_GREY, PNG_RGB = 0, 2  # colour types


class Specimen(NamedTuple):
    """A file's content and its uint8 pixels [H, W, 3], None if it cannot be decoded."""

    encoded: bytes
    pixels: np.ndarray | None
    tolerance: int = 0  # of JPEG's losses

    @property
    def expected(self) -> str:
        """Outcome in training."""
        return "replaced" if self.pixels is None else "decodes"


def picture() -> np.ndarray:
    """uint8 [30, 40, 3], smooth, no two sides or corners alike."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([6 * x, 255 - 8 * y, 2 * x + 3 * y], 2).astype(np.uint8)


def levels16() -> np.ndarray:
    """uint16 [30, 40]: the whole range of grey, low bytes not zero."""
    levels = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16)
    return levels.reshape(HEIGHT, WIDTH)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return saved(image, "JPEG", quality=95, subsampling=0, **options)


def grey(levels: np.ndarray) -> np.ndarray:
    """[H, W] -> [H, W, 3]."""
    return np.repeat(levels[..., None], 3, 2)


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG file from its header's fields and its rows, each with its leading filter byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return PNG_SIGNATURE + header + b"".join(extra) + body + chunk(b"IEND", b"")


def rows16(levels: np.ndarray) -> bytes:
    """uint16 [H, ...] -> unfiltered PNG rows."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)


def palette_image() -> tuple[Image.Image, np.ndarray]:
    """An indexed image of 16 colours and its pixels."""
    colours = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
    indices = (np.arange(WIDTH * HEIGHT) % 16).astype(np.uint8).reshape(HEIGHT, WIDTH)
    image = Image.fromarray(indices, "L")
    image.putpalette(colours.tobytes())
    return image, colours[indices]


@functools.cache  # it takes a second
def zoo() -> dict[str, Specimen]:
    """File name -> specimen."""
    pixels, deep = picture(), levels16()
    image = Image.fromarray(pixels)
    indexed, indexed_pixels = palette_image()
    alpha = Image.linear_gradient("L").resize(image.size)
    lightness = np.asarray(image.convert("L"))
    bilevel = lightness > 100
    deep_colour = np.stack([deep, deep[::-1], deep[:, ::-1]], 2)
    orientation = Image.Exif()
    orientation[0x0112] = ROTATED
    frames = [Image.new("RGB", image.size, colour) for colour in ((200, 30, 60), (0, 255, 0))]
    animation = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    plain_jpeg, plain_png = jpeg(image), saved(image, "PNG")
    row = b"\0" + bytes(WIDTH)
    text_bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20)))
    return {
        # What a decoder can read
        "animated_gif.jpg": Specimen(animation, np.asarray(frames[0])),
        "bilevel.png": Specimen(
            saved(Image.fromarray(bilevel), "PNG"), grey(bilevel * np.uint8(255))
        ),
        "broken_exif.jpg": Specimen(jpeg(image, exif=b"Exif\0\0MM\0*\xff\xff"), pixels, 4),
        "cmyk.jpg": Specimen(jpeg(image.convert("CMYK")), pixels, 4),
        "colour16.png": Specimen(
            png(WIDTH, HEIGHT, 16, PNG_RGB, rows16(deep_colour)),
            (deep_colour >> 8).astype(np.uint8),
        ),
        "grey16.pgm": Specimen(
            b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + deep.astype(">u2").tobytes(),
            grey((deep >> 8).astype(np.uint8)),
        ),
        "grey16.png": Specimen(
            png(WIDTH, HEIGHT, 16, PNG_GREY, rows16(deep)), grey((deep >> 8).astype(np.uint8))
        ),
        "grey16_big_endian.tif": Specimen(
            saved(Image.frombytes("I;16B", image.size, deep.astype(">u2").tobytes()), "TIFF"),
            grey((deep >> 8).astype(np.uint8)),
        ),
        "grey_alpha.png": Specimen(
            saved(Image.merge("LA", (image.convert("L"), alpha)), "PNG"), grey(lightness)
        ),
        "palette.png": Specimen(saved(indexed, "PNG"), indexed_pixels),
        "palette_transparent.png": Specimen(
            saved(indexed, "PNG", transparency=bytes(range(0, 256, 16))), indexed_pixels
        ),
        "png_named.jpeg": Specimen(plain_png, pixels),
        "rgba.png": Specimen(saved(Image.merge("RGBA", (*image.split(), alpha)), "PNG"), pixels),
        "rotated.jpg": Specimen(jpeg(image, exif=orientation), pixels, 4),
        "trailing_garbage.jpg": Specimen(plain_jpeg + b"\0garbage\xff\xd8" * 99, pixels, 4),
        # What none can, or none should
        "empty.jpg": Specimen(b"", None),
        "float.tif": Specimen(saved(Image.fromarray(deep / np.float32(65535)), "TIFF"), None),
        "header_alone.jpg": Specimen(plain_jpeg[:100], None),
        "thread.png": Specimen(png(1, 1001, 8, PNG_GREY, b"\0\0" * 1001), None),
        "huge.png": Specimen(png(60_000, 60_000, 8, PNG_GREY, row), None),
        "int32.tif": Specimen(saved(Image.fromarray(deep.astype(np.int32) * 9), "TIFF"), None),
        "large.png": Specimen(png(25_001, 10_000, 8, PNG_GREY, row), None),
        "text.jpg": Specimen(b"<html>404 Not Found</html>" * 40, None),
        "text_bomb.png": Specimen(png(WIDTH, HEIGHT, 8, PNG_GREY, row * HEIGHT, text_bomb), None),
        "truncated.jpg": Specimen(plain_jpeg[:-300], None),
        "truncated.png": Specimen(plain_png[: len(plain_png) // 2], None),
    }


def write_zoo(folder: Path) -> dict[str, str]:
    """Every specimen as a file of the folder; returns name -> "decodes" or "replaced"."""
    folder.mkdir(parents=True)
    for name, specimen in zoo().items():
        (folder / name).write_bytes(specimen.encoded)
    return {name: specimen.expected for name, specimen in zoo().items()}
