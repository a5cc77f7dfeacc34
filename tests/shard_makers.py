"""Folders of images and tar shards for the tests of shards, and what is in them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tars import Entry, tar

from data.base import Source
from data.prepare.shard_writer import Options, write_shards
from data.sources import FolderSource

IMAGES = 14  # of `write_folder`
SMALL = Options("train", images_per_shard=4)


def ignore(_: object) -> None:
    """Nobody is told of progress."""


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A noisy image, (width, height) px."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_folder(root: Path) -> Path:
    """14 images in 3 classes, several kinds, names of all sorts, one that lies about its kind."""
    files = {
        "n01440764": ["n01440764_10.JPEG", "n01440764_9.JPEG", "ä ö.jpg", "a.b.c.jpg", "lies.JPEG"],
        "n01443537": [f"{i}.png" for i in range(4)] + ["deep/er/x.bmp", "x.webp"],
        "zebra": ["1.jpg", "x" * 200 + ".jpg", "9.tiff"],
    }
    kinds = {".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tiff": "TIFF"}
    paths = [root / folder / name for folder, names in files.items() for name in names]
    for seed, path in enumerate(paths, 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            encoded(seed, "PNG" if path.stem == "lies" else kinds.get(path.suffix, "JPEG"))
        )
    return root


def write_set(folder: Path, out: Path, options: Options = SMALL) -> Path:
    """Shards of a folder of images, by the project's own writer."""
    write_shards(FolderSource(folder), out, options, 1, ignore)
    return out


def write_tar(path: Path, members: Iterable[Entry], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(members, form=form))
    return path


def sample(key: str, label: int, image: bytes = b"image", **json_text: bytes) -> list[Entry]:
    """The members of a sample; `json=b"…"` adds one."""
    members = [(f"{key}.cls", str(label).encode()), (f"{key}.jpg", image)]
    return [*members, *((f"{key}.{ending}", text) for ending, text in json_text.items())]


def members_of(root: Path) -> dict[str, bytes]:
    """Everything in a folder's shards by name, as Python's own tarfile reads it."""
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                assert member.name not in found
                found[member.name] = archive.extractfile(member).read()
    return found


def everything(source: Source) -> list[tuple[bytes, int, list[int]]]:
    """Bytes, label and class members of every image."""
    return [(*source.read(i), list(source.members(i))) for i in range(len(source))]


def flip(path: Path, *places: int) -> None:
    """Change a bit of each of these bytes of a file."""
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 1
    path.write_bytes(content)
