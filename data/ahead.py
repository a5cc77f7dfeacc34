"""Which images a loader process will need after those it is given, for sources that fetch ahead."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from data.stream import Key


class Asked(NamedTuple):
    """A batch to make, and images to begin to fetch before that, those needed first in front."""

    keys: list[Key]
    soon: list[int]


def with_coming(batches: Iterable[list[Key]], images: int, processes: int) -> Iterator[Asked]:
    """The batches, in turns for the `processes`, each with images that its process needs soon.

    A process is told of every image once, at least `images` of them before it needs it, as far as
    there are so many: with its first batch of all these, with every further one of those of a batch
    that comes later.
    """
    coming = iter(batches)
    known: deque[list[Key]] = deque(islice(coming, 1))
    turns = math.ceil(images / len(known[0])) if known else 0
    known.extend(islice(coming, turns * processes))
    number = 0
    while known:
        keys = known.popleft()
        of_this_process = [keys, *islice(known, processes - 1, None, processes)]
        if number >= processes:  # it knows the others already
            of_this_process = of_this_process[turns:]
        yield Asked(keys, [index for batch in of_this_process for _, index in batch])
        known.extend(islice(coming, 1))
        number += 1
