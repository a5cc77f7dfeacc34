"""Tar shards in an object store: an index says where each image lies, a range request fetches it.

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

from isal.isal_zlib import crc32  # zlib's, four times as fast

from data import shard_index
from data.disk_cache import DiskCache
from data.object_store import NoSuchObject, ObjectStore
from data.shards import BLOCK, IndexedImages, check_sizes
from data.sources import DataError, ImageError, Storage, StorageError

AHEAD = 128  # images that a process is told of before it needs them: 14 MB of ImageNet
TRIES = 3  # at an image whose bytes are not those that were indexed


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
        index = shard_index.parse(content, self.store.url + shard_index.INDEX)
        super().__init__(index)
        sizes = dict(zip(self._shards, self.store.sizes(self._shards)))
        check_sizes(self.store.url, index.shards, lambda name: _size(sizes[name]))
        self._sizes = [shard.size for shard in index.shards]
        first, begin, _ = self.place(0)
        # Here, and not in the first batch, a server is found out that does not know of ranges.
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
        """As ShardSource's. Raises ImageError for an image that is not as it was indexed, and
        StorageError where that is not the image's fault."""
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
        """The shard's URL and the member's name, as `described`."""
        shard, begin, _ = self.place(index)
        whole = self._sizes[self._shard[index]]
        try:
            header = self.store.begin(shard, begin - BLOCK, BLOCK, whole).result()
        except StorageError:
            header = None
        return self.store.url + self.described(index, header)

    def _index_file(self) -> bytes:
        try:
            return self.store.read(shard_index.INDEX)
        except NoSuchObject as error:
            raise DataError(
                f"{error}; shards are wanted there, with the index that scripts/make_shards.py "
                "writes beside them"
            ) from None

    def _of_this_process(self) -> dict[int, Future[bytes | None]]:
        """What is being fetched; what a parent process fetches does not arrive here."""
        if self._pid != os.getpid():
            self._coming, self._pid = {}, os.getpid()
        return self._coming

    def _kept(self, index: int) -> bytes | None:
        """An image from the cache, if it is there as it was indexed."""
        if self._cache is None or (encoded := self._cache.get(index)) is None:
            return None
        if self._is_right(index, encoded):
            return encoded
        self._cache.discard(index)
        return None

    def _begin(self, index: int) -> Future[bytes | None]:
        return self.store.start(self._fetched(index))

    async def _fetched(self, index: int) -> bytes | None:
        """An image from the store; None if it is not as it was indexed."""
        shard, begin, size = self.place(index)
        for _ in range(TRIES):
            encoded = await self.store.range(shard, begin, size, self._sizes[self._shard[index]])
            if self._is_right(index, encoded):
                await asyncio.to_thread(self._keep, index, encoded)
                return encoded
        return None

    def _keep(self, index: int, encoded: bytes) -> None:
        """Put an image into the cache; a run goes on without if the disk refuses."""
        if self._cache is None or not self._is_cache_usable:
            return
        try:
            self._cache.put(index, encoded)
        except OSError as error:
            self._is_cache_usable = False
            print(
                f"{self._cache.root}: images cannot be kept here any more ({error.strerror}); this "
                "process goes on without",
                file=sys.stderr,
                flush=True,
            )

    def _is_right(self, index: int, encoded: bytes) -> bool:
        return len(encoded) == self._size[index] and crc32(encoded) == self._crc32[index]


def _size(found: int | StorageError) -> int:
    """Bytes of a shard. Raises StorageError for one that is not there."""
    if isinstance(found, StorageError):
        raise found
    return found
