"""The endless stream: position -> image. All that a run must remember of its data is a position.

Position p is image `permutation(seed, p // N)[p % N]` of epoch `p // N`. A global batch is
`stream[p : p + B]` and a rank's share a contiguous part of it, so the batches of a run are the
same on any number of ranks, and every image is seen exactly once an epoch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

Key = tuple[int, int]  # (epoch, image index)

# Everything random about an image is drawn from (seed, epoch, index, one of these), so that no two
# kinds of draws share their numbers; the order of an epoch is drawn from (seed, epoch).
VIEW = 1  # crop, mirroring, colour
REPLACEMENT = 2  # which image stands in for one that cannot be used
AUGMENT = 3  # RandAugment, random erasing
MIX = 4  # mixup and cutmix of a pair, by its first image


class Stream:
    """Order in which a run sees `length` images, epoch after epoch.

    `stored`, int [length], is the order in which they lie on the disk, if that is to be kept to:
    each epoch then takes blocks of `window` images that lie one after another, in a random order of
    blocks, and shuffles within each. Without it, every order of all images is as likely.
    """

    def __init__(
        self, length: int, seed: int, stored: np.ndarray | None = None, window: int = 1
    ) -> None:
        self.length, self.seed = length, seed
        self._stored, self.window = stored, window
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the order of the images in an epoch: int64 [length]."""
        if epoch != self._epoch:
            self._order = self._shuffled(np.random.default_rng((self.seed, epoch)))
            self._epoch = epoch
        return self._order

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        if self._stored is None:
            return rng.permutation(self.length)
        # Turned, so that blocks begin at other images in each epoch.
        stored = np.roll(self._stored, rng.integers(self.length))
        blocks = np.split(stored, range(self.window, self.length, self.window))
        return np.concatenate([rng.permutation(blocks[i]) for i in rng.permutation(len(blocks))])

    def __getitem__(self, positions: slice) -> list[Key]:
        """Return the keys of the positions [start, stop)."""
        return [
            (epoch, int(self.permutation(epoch)[offset]))
            for epoch, offset in (
                divmod(position, self.length) for position in range(positions.start, positions.stop)
            )
        ]


def micro_batches(
    start: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    end: int | None = None,
) -> Iterator[slice]:
    """Yield the positions of one rank's micro-batches from position `start` to `end`, or on and on.

    `global_batch` must be a multiple of `world_size * micro_batch`.
    """
    share = global_batch // world_size
    while end is None or start < end:
        begin = start + rank * share
        for offset in range(begin, begin + share, micro_batch):
            yield slice(offset, offset + micro_batch)
        start += global_batch


def read_ahead(
    batches: Iterable[slice], stream: Stream, will_read: Callable[[np.ndarray], None]
) -> Iterator[slice]:
    """Yield the batches of a windowed stream, and have the blocks they enter loaded ahead.

    As a batch enters a block, `will_read` is given the images of this block and the next: in a
    thread, since it may have to wait for the disk.
    """
    entered = -1
    for batch in batches:
        epoch, offset = divmod(batch.start, stream.length)
        first = offset - offset % stream.window
        if epoch * stream.length + first != entered:
            entered = epoch * stream.length + first
            coming = stream.permutation(epoch)[first : first + 2 * stream.window]
            threading.Thread(target=will_read, args=(coming,), daemon=True).start()
        yield batch


def evaluation_share(length: int, rank: int, world_size: int) -> range:
    """Return one rank's images of an evaluation: all ranks together see every image once."""
    return range(length * rank // world_size, length * (rank + 1) // world_size)


def evaluation_batches(length: int, batch: int, rank: int, world_size: int) -> list[list[Key]]:
    """Divide a rank's `evaluation_share` into batches."""
    share = evaluation_share(length, rank, world_size)
    return [
        [(0, index) for index in share[first : first + batch]]
        for first in range(0, len(share), batch)
    ]


def evaluation_rounds(length: int, batch: int, world_size: int) -> int:
    """Return the most batches that `evaluation_batches` gives to any rank."""
    largest_share = math.ceil(length / world_size)
    return math.ceil(largest_share / batch)
