"""Images in tar shards, by number: an index says where each lies, `os.pread` fetches it.

So a shuffle is over all images, not over a buffer's, and a position in an epoch is one integer, as
with class folders. The index is made by scripts/make_shards.py.
"""

from __future__ import annotations

import os
import resource
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32  # zlib's, four times as fast

from data import shard_index
from data.shard_index import BLOCK, Shard
from data.sources import DataError, ImageError, Source

MAX_OPEN = 4096  # shards; ImageNet has 1,024
SPARE = 256  # files that a process has open otherwise


class IndexedImages:
    """What an index tells of images, wherever the shards lie: classes in its order, images by
    (label, key). Made from class folders, image i is image i of the FolderSource."""

    def __init__(self, index: shard_index.Index) -> None:
        self.classes = index.classes
        self.resized_to = index.resized_to  # px of the shorter side, where larger; None: originals
        self._shards = [shard.name for shard in index.shards]
        self._starts = index.starts
        self._shard, self._block, self._size, self._crc32 = (
            index.columns[name] for name in ("shard", "block", "size", "crc32")
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def members(self, index: int) -> range:
        label = self.label(index)
        return range(self._starts[label], self._starts[label + 1])

    def class_counts(self) -> list[int]:
        """Number of images of each class."""
        return np.diff(self._starts).tolist()

    def label(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1

    @cached_property
    def storage_order(self) -> np.ndarray:
        """The images in the order in which they lie in the shards: int32 [N]."""
        return np.lexsort((self._block, self._shard)).astype(np.int32)

    def place(self, index: int) -> tuple[str, int, int]:
        """An image's shard, and the first byte there and the size of its content."""
        begin = int(self._block[index]) * BLOCK
        return self._shards[self._shard[index]], begin, int(self._size[index])

    def described(self, index: int, header: bytes | None) -> str:
        """The shard and the member's name, of a very long one its first 100 characters.

        `header`: tar's, of 512 bytes; without a sound one the place stands for the name.
        """
        shard, begin, _ = self.place(index)
        try:
            member = tarfile.TarInfo.frombuf(header or b"", "utf-8", "replace").name
        except tarfile.HeaderError:
            return f"{shard}: image at byte {begin}"
        return f"{shard}: {''.join(c if c.isprintable() else '?' for c in member)}"


class ShardSource(IndexedImages):
    """Tar shards in a folder, with their index beside them.

    Every image read is compared with its CRC-32 (0.01 ms for 110 kB, a hundredth of what decoding
    and cropping it take): JPEG decoders make pixels of damaged bytes without a word. May be forked
    at any time. Raises DataError for a damaged index, and for shards that are missing or have
    another size.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.expanduser(root)
        index = shard_index.load(self.root)
        check_sizes(self.root, index.shards, self._size_of)
        super().__init__(index)
        self._open = _opener(self.root, self._shards)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """To another process goes the folder's name: files open here are not open there."""
        return type(self), (self.root,)

    def read(self, index: int) -> tuple[bytes, int]:
        size = int(self._size[index])
        try:
            encoded = self._pread(index, size, 0)
        except OSError as error:
            raise ImageError(f"{self.name(index)}: cannot be read ({error.strerror})") from None
        if len(encoded) != size:
            raise ImageError(f"{self.name(index)}: cannot be read (its shard has become shorter)")
        if crc32(encoded) != self._crc32[index]:
            raise ImageError(f"{self.name(index)}: does not match its checksum")
        return encoded, self.label(index)

    def name(self, index: int) -> str:
        """The shard's path and the member's name, as `described`."""
        try:
            header = self._pread(index, BLOCK, -BLOCK)
        except OSError:
            header = None
        return os.path.join(self.root, self.described(index, header))

    def will_read(self, indices: Sequence[int]) -> None:
        """Have the system fetch images that will be read soon; where it cannot, do nothing."""
        if not hasattr(os, "posix_fadvise"):
            return
        wanted = np.asarray(indices, np.int64)
        for index in wanted[np.lexsort((self._block[wanted], self._shard[wanted]))].tolist():
            offset, size = int(self._block[index]) * BLOCK, int(self._size[index])
            try:
                file = self._open(int(self._shard[index]))
                os.posix_fadvise(file.fd, offset, size, os.POSIX_FADV_WILLNEED)
            except OSError:  # told by `read`
                continue

    def _size_of(self, name: str) -> int:
        """Bytes of a shard. Raises OSError."""
        return os.stat(os.path.join(self.root, name)).st_size

    def _pread(self, index: int, size: int, offset: int) -> bytes:
        """`size` bytes, `offset` from where an image begins; fewer at the shard's end."""
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
    """Shard's number -> its file; those used last stay open, up to half of what the process may
    have open, which is raised as far as it may for that."""
    allowed, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * min(MAX_OPEN, len(names)) + SPARE
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        allowed = wanted if highest == resource.RLIM_INFINITY else min(wanted, highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, highest))
    most = MAX_OPEN if allowed == resource.RLIM_INFINITY else min(MAX_OPEN, allowed // 2)
    return lru_cache(most)(lambda number: _File(os.path.join(root, names[number])))


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


def refuse_resized(source: Source, where: str, option: str) -> None:
    """Raise DataError if a source's images were scaled down when its shards were made.

    `option` is what allows them all the same.
    """
    resized_to = getattr(source, "resized_to", None)
    if resized_to is not None:
        raise DataError(
            f"{where}: its images were scaled down to a shorter side of {resized_to} px when the "
            "shards were made, so that results would not be those of the data set; evaluate on "
            f"the original images, or allow these: {option}"
        )
