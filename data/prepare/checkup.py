"""A look at images before a run: which cannot be decoded, and which are in both splits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.base import Source
from data.errors import ImageError
from data.loader import read_image
from data.prepare.processes import run_all, take_in_hand
from data.sources import FolderSource

PART = 64  # images a process looks at before it reports

Work = Callable[[Source, int], Any]  # a result for an image


class BadImage(NamedTuple):
    """An image that cannot be read or decoded."""

    name: str
    reason: str


class Comparison(NamedTuple):
    """Images of one source that are in another, too."""

    pairs: list[tuple[int, int]]  # (index here, index there) of the same content
    compared: int  # images there that were compared


def sample(length: int, count: int, seed: int) -> list[int]:
    """Draw `count` of `length` indices, one in each of as many equal parts; all if that is more."""
    count = min(length, count)
    bounds = np.arange(count + 1) * length // count
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]).tolist()


def bad_images(source: Source, indices: Sequence[int], processes: int) -> list[BadImage]:
    """Return the images that cannot be decoded, in order. Raises DataError as `in_parallel`."""
    reasons = in_parallel(_fault, source, indices, processes, "decoding")
    return [BadImage(source.name(index), reason) for index, reason in reasons if reason is not None]


def _fault(source: Source, index: int) -> str | None:
    """Say why an image cannot be used; None for a good one."""
    try:
        read_image(source, index)
    except ImageError as error:
        return str(error).removeprefix(f"{source.name(index)}: ")
    return None


def same_images(
    here: Source, indices: Sequence[int], there: Source, limit: int, processes: int
) -> Comparison:
    """Find which of the `indices` of `here` have the very bytes of an image of `there`.

    Of files only those of equal size are read, so all of `there` is compared. Of other sources,
    whose sizes are known only by reading, up to `limit` images, evenly spread.
    Raises DataError as `in_parallel`.
    """
    compared: Sequence[int] = range(len(there))
    if isinstance(here, FolderSource) and isinstance(there, FolderSource):
        sizes = {size for _, size in in_parallel(_size, here, indices, processes, "sizes")}
        sizes_there = in_parallel(_size, there, compared, processes, "sizes")
        candidates = [index for index, size in sizes_there if size in sizes]
    else:
        candidates = compared = sample(len(there), limit, seed=0)
    by_digest = {
        digest: index
        for index, digest in in_parallel(_digest, here, indices, processes, "comparing")
        if digest is not None
    }
    digests = in_parallel(_digest, there, candidates, processes, "comparing")
    pairs = [(by_digest[digest], index) for index, digest in digests if digest in by_digest]
    return Comparison(pairs, len(compared))


def _size(source: FolderSource, index: int) -> int:
    """Look up the bytes of a file; -1 for one that cannot be looked at."""
    try:
        return os.stat(source.name(index)).st_size
    except OSError:
        return -1


def _digest(source: Source, index: int) -> bytes | None:
    """Compute a digest of an image's bytes; None for one that cannot be read."""
    try:
        return digest_of(source.read(index)[0])
    except ImageError:
        return None


def digest_of(encoded: bytes) -> bytes:
    """Compute a digest that differs between contents."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def in_parallel(
    work: Work, source: Source, indices: Sequence[int], processes: int, title: str
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result of `work`) of each index in order, by several processes, with progress.

    Raises DataError if a process dies.
    """
    parts = [indices[start : start + PART] for start in range(0, len(indices), PART)]
    with tqdm(total=len(indices), desc=title, unit="image", leave=False, disable=None) as bar:
        jobs = [partial(_results, work, source, part) for part in parts]
        results_of_parts = run_all(jobs, processes, lambda results: bar.update(len(results)))
    for part, results in zip(parts, results_of_parts):
        yield from zip(part, results)


def _results(work: Work, source: Source, indices: Sequence[int]) -> list[Any]:
    source.fetch(indices)
    results = []
    for index in indices:
        take_in_hand(source.where(index))
        results.append(work(source, index))
    return results
