"""Folders of images and tar shards for the tests of shards, made with other means than theirs."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Member = tuple[str, bytes]


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
    seed = 0
    for folder, names in files.items():
        for name in names:
            path, seed = root / folder / name, seed + 1
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = "PNG" if path.stem == "lies" else kinds.get(path.suffix, "JPEG")
            path.write_bytes(encoded(seed, kind))
    return root


def write_tar(path: Path, members: Iterable[Member], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, label: int, image: bytes = b"image", **json_text: bytes) -> list[Member]:
    """The members of a sample; `json=b"…"` adds one."""
    members = [(f"{key}.cls", str(label).encode()), (f"{key}.jpg", image)]
    return [*members, *((f"{key}.{ending}", text) for ending, text in json_text.items())]


def members_of(root: Path) -> dict[str, bytes]:
    """Everything in a folder's shards by name, as Python's own tarfile reads it."""
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found
