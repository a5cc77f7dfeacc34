"""Images of two sources that look alike: the same picture scaled, trimmed or encoded anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.base import Source
from data.errors import ImageError
from data.optional import needed
from data.prepare.checkup import digest_of, in_parallel, sample
from data.transforms import DecodeError, decode

NEAR_BITS = 4  # of 64 that differ at most; of images that have nothing in common some 32 do


class Pair(NamedTuple):
    """An image, the one of the other source that looks most like it, and how they differ."""

    here: int
    there: int
    bits: int


class Look(NamedTuple):
    """Digest of an image's bytes, and the perceptual hash of its pixels, 64 bits."""

    digest: bytes
    perceptual: int


def look_alikes(
    here: Source, indices: Sequence[int], there: Source, limit: int, processes: int
) -> tuple[list[Pair], int]:
    """Find which of the `indices` of `here` look like an image of `there` of other bytes.

    Up to `limit` images of `there` are compared, evenly spread; returns also how many. Images that
    cannot be decoded are left out. Raises DataError as `in_parallel`.
    """
    own = _looks(here, indices, processes)
    others = _looks(there, sample(len(there), limit, seed=0), processes)
    numbers = list(others)
    hashes = np.array([look.perceptual for look in others.values()], np.uint64)
    pairs = []
    for index, look in own.items():
        bits = np.bitwise_count(hashes ^ np.uint64(look.perceptual))
        near = [
            Pair(index, numbers[place], int(bits[place]))
            for place in np.flatnonzero(bits <= NEAR_BITS).tolist()
            if others[numbers[place]].digest != look.digest
        ]
        if near:
            pairs.append(min(near, key=lambda pair: pair.bits))
    return sorted(pairs, key=lambda pair: pair.bits), len(numbers)


def _looks(source: Source, indices: Sequence[int], processes: int) -> dict[int, Look]:
    looks = in_parallel(_look, source, indices, processes, "looking")
    return {index: look for index, look in looks if look is not None}


def _look(source: Source, index: int) -> Look | None:
    """Compute both hashes of an image; None for one that cannot be read or decoded."""
    imagehash = needed("imagehash", "a perceptual hash")
    try:
        encoded = source.read(index)[0]
        image = Image.fromarray(decode(encoded))
    except (ImageError, DecodeError):
        return None
    return Look(digest_of(encoded), int(str(imagehash.phash(image)), 16))
