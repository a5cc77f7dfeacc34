"""The index of tar shards: where each image lies, in one safetensors file beside them.

Images are numbered by (label, key), as the files of class folders are. For each there are 14 bytes:
its shard, its place there in tar's blocks of 512 bytes, its size and its CRC-32.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.numpy

from data.sources import DataError

INDEX = "index.safetensors"
FORMAT = "tar shards, 1"
BLOCK = 512  # bytes; tar begins every header and every content at a multiple of it
MAX_SHARDS = 1 << 16
COLUMNS = {"shard": np.uint16, "block": np.uint32, "size": np.uint32, "crc32": np.uint32}
_NAME = re.compile(r"[^/\\\0]+\.tar")


class Shard(NamedTuple):
    """A tar file of images."""

    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Index:
    """Where the images of a folder of shards lie, and what is known of all of them."""

    shards: list[Shard]
    classes: list[str]
    starts: list[int]  # number of each class's first image, and of all images
    columns: dict[str, np.ndarray]  # COLUMNS, [N] each
    resized_to: int | None  # px of the shorter side that larger images were scaled down to


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Create or replace a file so that it is never seen half-written, also after a power cut.

    Raises DataError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
        raise


def save(index: Index, root: Path) -> None:
    """Write the index of the shards in a folder."""
    header = {
        "format": FORMAT,
        "shards": index.shards,
        "classes": index.classes,
        "starts": index.starts,
        "resized_to": index.resized_to,
    }
    header["crc32"] = _checksum(header, index.columns)
    # One key: safetensors puts several in another order each time.
    content = safetensors.numpy.save(index.columns, {"header": json.dumps(header)})
    write_atomically(root / INDEX, lambda file: file.write(content))


def load(root: str | Path) -> Index:
    """Read the index of the shards in a folder. Raises DataError if it is damaged."""
    path = os.path.join(root, INDEX)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse(content, path)


def parse(content: bytes, path: str) -> Index:
    """An index from its file's content. Raises DataError, naming `path`, if it is damaged."""
    try:
        columns = safetensors.numpy.load(content)
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header = json.loads(about["__metadata__"]["header"])
        if header["format"] != FORMAT:
            raise DataError(f"{path}: its format is {header['format']!r}, only {FORMAT!r} is known")
        if header.pop("crc32") != _checksum(header, columns):
            raise ValueError("it does not match its checksum")
        return _parsed(header, columns)
    except DataError:
        raise
    except Exception as error:  # it may hold anything
        raise DataError(
            f"{path}: a damaged index ({error}); copy it anew, or remove it and run "
            "scripts/make_shards.py again"
        ) from None


def _checksum(header: dict[str, Any], columns: dict[str, np.ndarray]) -> int:
    """CRC-32 of everything that an index says."""
    value = zlib.crc32(json.dumps(header).encode())
    for name in sorted(columns):
        value = zlib.crc32(np.ascontiguousarray(columns[name]), value)
    return value


def _parsed(header: dict[str, Any], columns: dict[str, np.ndarray]) -> Index:
    """Index from a file's content. Raises ValueError and others for one that cannot be right."""
    shards = [Shard(str(name), int(size), str(sha256)) for name, size, sha256 in header["shards"]]
    classes, starts = [str(name) for name in header["classes"]], [int(i) for i in header["starts"]]
    for shard in shards:
        if not _NAME.fullmatch(shard.name):
            raise ValueError(f"{shard.name!r} is not a shard's name")
    if {name: column.dtype for name, column in columns.items()} != COLUMNS:
        raise ValueError("other columns than expected")
    length = starts[-1]
    if any(column.shape != (length,) for column in columns.values()):
        raise ValueError("columns of other lengths than the classes have together")
    if len(starts) != len(classes) + 1 or starts[0] != 0 or (np.diff(starts) <= 0).any():
        raise ValueError("classes without images")
    if columns["shard"].max() >= len(shards):
        raise ValueError("images in shards that are not named")
    ends = columns["block"].astype(np.int64) * BLOCK + columns["size"]
    sizes = np.array([shard.size for shard in shards])
    if columns["block"].min() == 0 or (ends > sizes[columns["shard"]]).any():
        raise ValueError("images beyond the ends of their shards")
    resized_to = header["resized_to"]
    return Index(shards, classes, starts, columns, None if resized_to is None else int(resized_to))
