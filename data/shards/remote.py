"""Tar shards in an object store: a range request reads an image where the index says that it lies.

The order of a run is known ahead, so the images to come are fetched while others are decoded, many
at a time, by the process that will need them; what was fetched is kept on a local disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from isal.isal_zlib import crc32  # zlib's, four times as fast

from data.errors import DataError, ImageError, StorageError
from data.names import shown
from data.shards.disk_cache import DiskCache
from data.shards.index import BLOCK, INDEX, MAX_BYTES, IndexedImages, check_sizes, parse
from data.shards.object_store import NoSuchObject, ObjectStore

AHEAD = 128  # images that a process begins to fetch before it needs them: 14 MB of ImageNet
TRIES = 3  # at an image whose bytes are not those that were indexed


@dataclass(frozen=True)
class Storage:
    """Options of fetching and keeping images of an object store."""

    cache_dir: str | None = None  # folder of a local disk, shared by all processes; None: no cache
    cache_gb: float = 160.0  # the most it may take, 10^9 bytes
    timeout_s: float = 300.0  # how long faults are waited out before they are errors


class RemoteShards(IndexedImages):
    """Tar shards below a URL, with their index beside them; the images of the ShardSource that
    the same files make in a folder.

    Every image is compared with its CRC-32, fetched or from the cache. May be forked and pickled.
    Raises DataError for a damaged index and for shards that are missing or have another size, and
    StorageError for a store that does not answer.
    """

    fetches_ahead = AHEAD

    def __init__(self, url: str, storage: Storage) -> None:
        self.store = ObjectStore(url, storage.timeout_s)
        content = self._index_file()
        index = parse(content, self.store.url + INDEX)
        super().__init__(index)
        sizes = dict(zip(self._shards, self.store.sizes(self._shards)))
        check_sizes(self.store.url, index.shards, sizes.__getitem__)
        self._sizes = [shard.size for shard in index.shards]
        first, begin, _ = self.place(0)
        # A server that does not know of ranges is refused here, and not in the first batch.
        self.store.begin(first, begin - BLOCK, BLOCK, sizes[first]).result()
        self._cache = None
        if storage.cache_dir is not None:
            data_set = hashlib.sha256(content).hexdigest()[:16]
            self._cache = DiskCache(storage.cache_dir, int(storage.cache_gb * 1e9), data_set)
        self._is_cache_usable = True
        self._coming: dict[int, Future[bytes | None]] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict:
        return {**vars(self), "_coming": {}}

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an image and its label.

        Raises ImageError for an image that is not as it was indexed, and StorageError where that is
        not the image's fault.
        """
        coming = self._of_this_process().pop(index, None)
        encoded = self._kept(index) if coming is None else coming.result()
        if encoded is None and coming is None:
            encoded = self._begin(index).result()
        if encoded is None:
            raise ImageError(f"{self.name(index)}: does not match its checksum")
        return encoded, self.label(index)

    def fetch(self, indices: Iterable[int]) -> None:
        """Begin to fetch images that this process will read soon, in this order."""
        coming = self._of_this_process()
        for index in indices:
            if index not in coming and not (self._cache is not None and self._cache.has(index)):
                coming[index] = self._begin(index)

    def name(self, index: int) -> str:
        """Name an image by its shard's URL and its member's name."""
        shard, begin, _ = self.place(index)
        whole = self._sizes[self._shard[index]]
        try:
            header = self.store.begin(shard, begin - BLOCK, BLOCK, whole).result()
        except StorageError:
            header = None
        return self.store.url + self.describe(index, header)

    def _index_file(self) -> bytes:
        try:
            return self.store.read(INDEX, MAX_BYTES)
        except NoSuchObject as error:
            raise DataError(
                f"{error}; expected shards there, with the index that scripts/make_shards.py "
                "writes beside them"
            ) from None

    def _of_this_process(self) -> dict[int, Future[bytes | None]]:
        """Return what this process is fetching; what its parent fetches does not arrive here."""
        if self._pid != os.getpid():
            self._coming, self._pid = {}, os.getpid()
        return self._coming

    def _kept(self, index: int) -> bytes | None:
        """Read an image from the cache, if it is there as it was indexed."""
        if self._cache is None or (encoded := self._cache.get(index)) is None:
            return None
        if self._is_right(index, encoded):
            return encoded
        self._cache.discard(index)
        return None

    def _begin(self, index: int) -> Future[bytes | None]:
        return self.store.start(self._fetched(index))

    async def _fetched(self, index: int) -> bytes | None:
        """Read an image from the store; None if it is not as it was indexed."""
        shard, begin, size = self.place(index)
        for _ in range(TRIES):
            encoded = await self.store.range(shard, begin, size, self._sizes[self._shard[index]])
            if self._is_right(index, encoded):
                await asyncio.to_thread(self._keep, index, encoded)
                return encoded
        return None

    def _keep(self, index: int, encoded: bytes) -> None:
        """Put an image into the cache; a run continues without one if the disk refuses."""
        if self._cache is None or not self._is_cache_usable:
            return
        try:
            self._cache.put(index, encoded)
        except OSError as error:
            self._is_cache_usable = False
            line = (
                f"{self._cache.root}: images cannot be kept here any more ({error.strerror}); this "
                "process continues without"
            )
            print(shown(line), file=sys.stderr, flush=True)

    def _is_right(self, index: int, encoded: bytes) -> bool:
        return len(encoded) == self._size[index] and crc32(encoded) == self._crc32[index]
