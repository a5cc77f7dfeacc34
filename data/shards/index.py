"""The index of tar shards: where each image lies, in one safetensors file beside them.

Images are numbered by (label, key), as the files of class folders are. For each there are 14 bytes:
its shard, its place there in tar's blocks of 512 bytes, its size and its CRC-32.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from data import strict_json
from data.base import Source
from data.errors import DataError, panics_as_errors
from data.files import read_regular, write_atomically
from data.strict_json import Count

INDEX = "index.safetensors"
PLAN = "plan.json"  # stands beside shards that are not finished
FORMAT = "tar shards, 1"
BLOCK = 512  # bytes; tar begins every header and every content at a multiple of it
MAX_SHARDS = 1 << 16
COLUMNS = {"shard": np.uint16, "block": np.uint32, "size": np.uint32, "crc32": np.uint32}
MAX_BYTES = 1 << 29  # of an index: 38 million images
_NAME = re.compile(r"[^/\\\0]+\.tar")


class Shard(NamedTuple):
    """A tar file of images."""

    name: str
    size: Count  # bytes
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of an index: where the images lie, and what is known of all of them."""

    shards: list[Shard]
    classes: list[str]
    starts: list[int]  # as in `Source`
    columns: dict[str, np.ndarray]  # COLUMNS, [N] each
    resized_to: int | None  # as in `Source`


class _Header(TypedDict):
    """The part of an index beside its columns, as text."""

    shards: list[Shard]
    classes: list[str]
    starts: list[Count]
    resized_to: Count | None


_HEADER = TypeAdapter(_Header)


def save(index: Index, root: Path) -> None:
    """Write the index of the shards in a folder. Raises OSError."""
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
    write_atomically(root / INDEX, content)


def load(root: str | Path) -> Index:
    """Read the index of the shards in a folder. Raises DataError if it is damaged."""
    path = os.path.join(root, INDEX)
    try:
        content = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse(content, path)


def parse(content: bytes, path: str) -> Index:
    """Read an index from its file's content. Raises DataError, naming `path`, if it is damaged."""
    try:
        with panics_as_errors():
            columns = safetensors.numpy.load(content)
        about = strict_json.parse(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header = strict_json.parse(about["__metadata__"]["header"])
        if header["format"] != FORMAT:
            raise DataError(f"{path}: its format is {header['format']!r}, only {FORMAT!r} is known")
        if header.pop("crc32") != _checksum(header, columns):
            raise ValueError("it does not match its checksum")
        return _index(strict_json.checked(header, _HEADER), columns)
    except DataError:
        raise
    except Exception as error:  # it may hold anything
        raise DataError(
            f"{path}: a damaged index ({error}); copy it anew, or remove it and run "
            "scripts/make_shards.py again"
        ) from None


def _checksum(header: dict[str, Any], columns: dict[str, np.ndarray]) -> int:
    """Compute the CRC-32 of everything that an index says."""
    value = zlib.crc32(json.dumps(header).encode())
    for name in sorted(columns):
        value = zlib.crc32(np.ascontiguousarray(columns[name]), value)
    return value


def _index(header: _Header, columns: dict[str, np.ndarray]) -> Index:
    """Make the index of what a file says. Raises ValueError for what cannot be right."""
    shards, classes, starts = header["shards"], header["classes"], header["starts"]
    for shard in shards:
        if not _NAME.fullmatch(shard.name):
            raise ValueError(f"{shard.name!r} is not a shard's name")
    if {name: column.dtype for name, column in columns.items()} != COLUMNS:
        raise ValueError("other columns than expected")
    length = starts[-1] if starts else 0
    if any(column.shape != (length,) for column in columns.values()):
        raise ValueError("columns of other lengths than the classes have together")
    if len(starts) != len(classes) + 1 or starts[0] != 0 or min(np.diff(starts), default=0) <= 0:
        raise ValueError("classes without images")
    if columns["shard"].max() >= len(shards):
        raise ValueError("images in shards that are not named")
    ends = columns["block"].astype(np.int64) * BLOCK + columns["size"]
    sizes = np.array([shard.size for shard in shards])
    if columns["block"].min() == 0 or (ends > sizes[columns["shard"]]).any():
        raise ValueError("images beyond the ends of their shards")
    return Index(shards, classes, starts, columns, header["resized_to"])


class IndexedImages(Source):
    """A source by its index, wherever the shards lie: images by (label, key).

    Made from class folders, image i is image i of the FolderSource.
    """

    def __init__(self, index: Index) -> None:
        self.classes, self.starts = index.classes, index.starts
        self.resized_to = index.resized_to
        self._shards = [shard.name for shard in index.shards]
        self._shard, self._block, self._size, self._crc32 = (
            index.columns[name] for name in ("shard", "block", "size", "crc32")
        )

    @cached_property
    def storage_order(self) -> np.ndarray:
        """The images as they lie in the shards: int32 [N]."""
        return np.lexsort((self._block, self._shard)).astype(np.int32)

    def where(self, index: int) -> str:
        return os.path.join(self.root or "", self.describe(index, None))

    def place(self, index: int) -> tuple[str, int, int]:
        """Find an image: its shard, and there the first byte and the size of its content."""
        begin = int(self._block[index]) * BLOCK
        return self._shards[self._shard[index]], begin, int(self._size[index])

    def describe(self, index: int, header: bytes | None) -> str:
        """Name an image by its shard and member, a very long name by its first 100 characters.

        `header`: tar's, of 512 bytes; without a sound one the place stands for the name.
        """
        shard, begin, _ = self.place(index)
        try:
            member = tarfile.TarInfo.frombuf(header or b"", "utf-8", "replace").name
        except tarfile.HeaderError:
            return f"{shard}: image at byte {begin}"
        return f"{shard}: {''.join(c if c.isprintable() else '?' for c in member)}"


def check_sizes(root: str, shards: list[Shard], size_of: Callable[[str], int]) -> None:
    """Raise DataError unless every shard is there with the size that its index states.

    `size_of`: bytes of a shard by name; raises OSError for one that is not there.
    """
    wrong = []
    for shard in shards:
        try:
            size = size_of(shard.name)
        except OSError as error:
            wrong.append(f"{shard.name} ({error.strerror})")
            continue
        if size != shard.size:
            wrong.append(f"{shard.name} ({size:,} bytes, not {shard.size:,})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(
            f"{root}: {len(wrong)} of {len(shards)} shards are missing or not as they were "
            f"indexed: {', '.join(wrong[:3])}{more}; copy them anew"
        )
