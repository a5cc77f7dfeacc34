"""Tar shards in a folder: `os.pread` reads an image where the index says that it lies.

So a shuffle is over all images, not over a buffer's, and a position in an epoch is one integer, as
with class folders. The index is made by scripts/make_shards.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32  # zlib's, four times as fast

from data.errors import ImageError, unreadable
from data.limits import raise_open_files
from data.shards.index import BLOCK, IndexedImages, check_sizes, load

MAX_OPEN = 4096  # shards; ImageNet has 1,024


class ShardSource(IndexedImages):
    """Tar shards in a folder, with their index beside them.

    Every image read is compared with its CRC-32 (0.01 ms for 110 kB, a hundredth of what decoding
    and cropping it take): JPEG decoders make pixels of damaged bytes without a word. May be forked
    at any time. Raises DataError for a damaged index, and for shards that are missing or have
    another size.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        index = load(self.root)
        check_sizes(self.root, index.shards, self._size_of)
        super().__init__(index)
        self._open = _opener(self.root, self._shards)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """Pickle the folder's name alone: files open here are not open in another process."""
        return type(self), (self.root,)

    def read(self, index: int) -> tuple[bytes, int]:
        size = int(self._size[index])
        try:
            encoded = self._pread(index, size, 0)
        except OSError as error:
            raise unreadable(self.name(index), error) from None
        if len(encoded) != size:
            raise ImageError(f"{self.name(index)}: cannot be read (its shard has become shorter)")
        if crc32(encoded) != self._crc32[index]:
            raise ImageError(f"{self.name(index)}: does not match its checksum")
        return encoded, self.label(index)

    def name(self, index: int) -> str:
        """Name an image by its shard's path and its member's name."""
        try:
            header = self._pread(index, BLOCK, -BLOCK)
        except OSError:
            header = None
        return os.path.join(self.root, self.describe(index, header))

    def will_read(self, indices: Sequence[int]) -> None:
        """Have the system load the images, where it takes advice."""
        if not hasattr(os, "posix_fadvise"):
            return
        wanted = np.asarray(indices, np.int64)
        for index in wanted[np.lexsort((self._block[wanted], self._shard[wanted]))].tolist():
            offset, size = int(self._block[index]) * BLOCK, int(self._size[index])
            try:
                file = self._open(int(self._shard[index]))
                os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_WILLNEED)
            except OSError:  # `read` will say so
                continue

    def _size_of(self, name: str) -> int:
        """Look up the bytes of a shard. Raises OSError."""
        return os.stat(os.path.join(self.root, name)).st_size

    def _pread(self, index: int, size: int, offset: int) -> bytes:
        """Read `size` bytes, `offset` from where an image begins; fewer at the shard's end."""
        file = self._open(int(self._shard[index]))
        return os.pread(file.fd, size, int(self._block[index]) * BLOCK + offset)


class _File:
    """A file's descriptor, closed when nobody holds this any more."""

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _opener(root: str, names: list[str]) -> Callable[[int], _File]:
    """Return what opens a shard by its number.

    Those used last stay open, up to half of what the process may have open.
    """
    most = min(MAX_OPEN, raise_open_files() // 2)
    return lru_cache(most)(lambda number: _File(os.path.join(root, names[number])))
