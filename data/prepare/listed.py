"""Sources of images that are known by name and place before any is read, whatever they lie in.

Each form in which ImageNet comes is read in place by one of these; writers make folders or shards.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.base import Source
from data.errors import ImageError, unreadable
from data.files import read_regular
from data.ilsvrc import original_name
from data.image_formats import MAX_BYTES
from data.prepare.members import Member, Packed

ZIP_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
UNKNOWN = -1  # a size that only reading shows


class Listing(NamedTuple):
    """A class's images in the order of their names: bytes, int64 and int64, each [images]."""

    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def listing(members: Sequence[Member]) -> Listing:
    """Sort a class's images by name."""
    members = sorted(members)
    return Listing(
        np.array([os.fsencode(member.name) for member in members], np.bytes_),
        np.array([member.offset for member in members], np.int64),
        np.array([member.size for member in members], np.int64),
    )


class ListedSource(Source):
    """Images of known name, place and size, in ImageFolder's order.

    Takes 40 bytes of memory an image and keeps no file open: threads and processes may share
    it. `names`, `offsets` and `sizes` are as in `Listing`. A kind of source gives `_content`.
    """

    is_sequential = False  # True: to be read in the order of the offsets, and by one thread

    def __init__(self, path: Path, classes: list[str], listings: Sequence[Listing]) -> None:
        """`listings`: one for each class."""
        self.root, self.classes = os.fspath(path), classes
        self.names, self.offsets, self.sizes = map(np.concatenate, zip(*listings))
        self.starts = np.cumsum([0, *(len(listing.names) for listing in listings)]).tolist()

    def read(self, index: int) -> tuple[bytes, int]:
        try:
            content = self._content(index)
        except OSError as error:
            raise unreadable(self.name(index), error) from None
        if self.sizes[index] == UNKNOWN:
            self.sizes[index] = len(content)
        if len(content) != self.sizes[index]:
            raise ImageError(f"{self.name(index)}: cannot be read (its file has been cut off)")
        return content, self.label(index)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.classes[self.label(index)], self.file_name(index))

    def file_name(self, index: int) -> str:
        """Name an image within its class."""
        return os.fsdecode(self.names[index])

    def _content(self, index: int) -> bytes:
        """Read an image. Raises OSError."""
        raise NotImplementedError


class ArchiveSource(ListedSource):
    """Images that are ranges of bytes of one file."""

    def _content(self, index: int) -> bytes:
        with open(self.root, "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(self.sizes[index]), int(self.offsets[index]))


class ZipSource(ListedSource):
    """Images in a zip archive; an offset is that of the header before an image's bytes."""

    def __init__(
        self, path: Path, classes: list[str], listings: Sequence[Listing], packed: Sequence[Packed]
    ) -> None:
        """`packed`: of each image, in any order."""
        super().__init__(path, classes, listings)
        rows = sorted((each.member.offset, each.packed_size, each.crc32) for each in packed)
        self._packed = np.array(rows, np.int64).reshape(-1, 3)

    def _content(self, index: int) -> bytes:
        offset = int(self.offsets[index])
        _, size, crc32 = self._packed[np.searchsorted(self._packed[:, 0], offset)].tolist()
        with open(self.root, "rb", buffering=0) as file:
            header = os.pread(file.fileno(), ZIP_HEADER.size, offset)
            signature, *lengths = ZIP_HEADER.unpack(header.ljust(ZIP_HEADER.size))
            packed = os.pread(file.fileno(), size, offset + ZIP_HEADER.size + sum(lengths))
        try:
            is_stored = header[8:10] == b"\0\0"
            content = packed if is_stored else self._inflated(packed, int(self.sizes[index]))
        except zlib.error:
            content = b""
        if signature != b"PK\3\4" or zlib.crc32(content) != crc32:
            raise ImageError(f"{self.name(index)}: does not match its checksum")
        return content

    @staticmethod
    def _inflated(packed: bytes, size: int) -> bytes:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)


class StreamSource(ListedSource):
    """Images in a compressed tar archive; an offset is one in what it unpacks to."""

    is_sequential = True

    def __init__(
        self,
        path: Path,
        classes: list[str],
        listings: Sequence[Listing],
        open_stream: Callable[[], BinaryIO],
    ) -> None:
        super().__init__(path, classes, listings)
        self._open = open_stream
        self._stream: BinaryIO | None = None

    def _content(self, index: int) -> bytes:
        if self._stream is None:
            self._stream = self._open()
        try:
            self._stream.seek(int(self.offsets[index]))
            return self._stream.read(int(self.sizes[index]))
        except (EOFError, zlib.error):  # it has changed since it was listed
            return b""


class FileSource(ListedSource):
    """Images that are files, in a folder for each class or all in one."""

    def __init__(
        self, path: Path, classes: list[str], listings: Sequence[Listing], is_flat: bool
    ) -> None:
        super().__init__(path, classes, listings)
        self._is_flat = is_flat

    def path(self, index: int) -> str:
        """Return the path of an image's file."""
        folders = [] if self._is_flat else [self.classes[self.label(index)]]
        return os.path.join(self.root, *folders, super().file_name(index))

    def file_name(self, index: int) -> str:
        return original_name(super().file_name(index))

    def _content(self, index: int) -> bytes:
        return read_regular(self.path(index), MAX_BYTES)
