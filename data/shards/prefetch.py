"""Requests to loader processes: a batch to make, and images to fetch ahead for later ones."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from data.stream import Key


class Request(NamedTuple):
    """A batch to make, and images to begin to fetch before that, the most urgent first."""

    keys: list[Key]
    soon: list[int]


def requests(batches: Iterable[list[Key]], images: int, processes: int) -> Iterator[Request]:
    """Ask the `processes` for the batches in turns, naming images that each will need soon.

    Each process hears of every image of its own once, at least `images` of them before it needs it
    as far as there are so many: of all these with its first batch, then with every further batch of
    those of one that comes later.
    """
    coming = iter(batches)
    known: deque[list[Key]] = deque(islice(coming, 1))
    turns = math.ceil(images / len(known[0])) if known else 0
    known.extend(islice(coming, turns * processes))
    number = 0
    while known:
        keys = known.popleft()
        of_this_process = [keys, *islice(known, processes - 1, None, processes)]
        if number >= processes:  # it has heard of the others already
            of_this_process = of_this_process[turns:]
        yield Request(keys, [index for batch in of_this_process for _, index in batch])
        known.extend(islice(coming, 1))
        number += 1
