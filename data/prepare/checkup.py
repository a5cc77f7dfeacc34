"""A look at the images of a run before it: how many there are of each class, which cannot be
decoded, and which are in both splits."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.loader import read_image
from data.prepare.processes import run_all
from data.sources import FolderSource, ImageError, Source

PART = 64  # images a process looks at before it reports
QUANTILE = 1.96  # of the normal distribution, for 95 % confidence

Work = Callable[[Source, Sequence[int]], Sequence[Any]]  # a result for each index


class BadImage(NamedTuple):
    """An image that cannot be read or decoded."""

    name: str
    reason: str


class Comparison(NamedTuple):
    """Which images of one source are in another, too."""

    pairs: list[tuple[int, int]]  # (index here, index there) of the same content
    compared: int  # images there that were compared


def sample(length: int, count: int, seed: int) -> list[int]:
    """`count` of `length` indices, all if that is more: in each of as many equal parts, one."""
    count = min(length, count)
    bounds = np.arange(count + 1) * length // count
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:]).tolist()


def class_counts(source: Source) -> np.ndarray:
    """Images of each class: int64 [classes]. Raises ImageError if no image of a class can be read,
    as its label then cannot be."""
    counts = np.zeros(len(source.classes), np.int64)
    is_counted = np.zeros(len(source), bool)
    while not is_counted.all():
        members = source.members(int(is_counted.argmin()))
        counts[_label(source, members)] = len(members)
        is_counted[np.asarray(members)] = True
    return counts


def _label(source: Source, members: Sequence[int]) -> int:
    for index in members:
        try:
            return source.read(index)[1]
        except ImageError as error:
            last = error
    raise last


def bad_images(source: Source, indices: Sequence[int], processes: int) -> list[BadImage]:
    """Those that cannot be read or decoded, in order. Raises DataError as `in_parallel`."""
    found = in_parallel(_faults, source, indices, processes, "decoding")
    return [BadImage(source.name(index), reason) for index, reason in found if reason is not None]


def _faults(source: Source, indices: Sequence[int]) -> list[str | None]:
    """Why an image cannot be used; None for a good one."""
    reasons: list[str | None] = []
    for index in indices:
        try:
            read_image(source, index)
            reasons.append(None)
        except ImageError as error:
            reasons.append(str(error).removeprefix(f"{source.name(index)}: "))
    return reasons


def share_interval(found: int, looked_at: int) -> tuple[float, float]:
    """Bounds, with 95 % confidence, of the share of a whole of which a random sample was looked at
    (Wilson's score interval)."""
    z2 = QUANTILE**2
    centre = (found + z2 / 2) / (looked_at + z2)
    spread = math.sqrt(z2 * (found * (looked_at - found) / looked_at + z2 / 4)) / (looked_at + z2)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def same_images(
    here: Source, indices: Sequence[int], there: Source, limit: int, processes: int
) -> Comparison:
    """Which of the `indices` of `here` have the very bytes of an image of `there`.

    Of files only those of equal size are read, so all of `there` is compared. Of other sources,
    whose sizes are known only by reading, up to `limit` images, evenly spread.
    Raises DataError as `in_parallel`.
    """
    compared: Sequence[int] = range(len(there))
    if isinstance(here, FolderSource) and isinstance(there, FolderSource):
        sizes = {size for _, size in in_parallel(_sizes, here, indices, processes, "sizes")}
        found = in_parallel(_sizes, there, compared, processes, "sizes")
        candidates = [index for index, size in found if size in sizes]
    else:
        candidates = compared = sample(len(there), limit, seed=0)
    by_digest = {
        digest: index
        for index, digest in in_parallel(_digests, here, indices, processes, "comparing")
        if digest is not None
    }
    found = in_parallel(_digests, there, candidates, processes, "comparing")
    pairs = [(by_digest[digest], index) for index, digest in found if digest in by_digest]
    return Comparison(pairs, len(compared))


def _sizes(source: FolderSource, indices: Sequence[int]) -> list[int]:
    """Bytes of each file; -1 for one that cannot be looked at."""
    sizes = []
    for index in indices:
        try:
            sizes.append(os.stat(source.name(index)).st_size)
        except OSError:
            sizes.append(-1)
    return sizes


def _digests(source: Source, indices: Sequence[int]) -> list[bytes | None]:
    """Of each image's bytes; None for one that cannot be read."""
    digests: list[bytes | None] = []
    for index in indices:
        try:
            digests.append(hashlib.blake2b(source.read(index)[0], digest_size=16).digest())
        except ImageError:
            digests.append(None)
    return digests


def in_parallel(
    work: Work, source: Source, indices: Sequence[int], processes: int, title: str
) -> Iterator[tuple[int, Any]]:
    """(index, what `work` finds) of each index in order, by several processes, with progress.

    Raises DataError if a process dies.
    """
    parts = [indices[start : start + PART] for start in range(0, len(indices), PART)]
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(indices), desc=title, unit="image", leave=False, disable=hidden) as bar:
        jobs = [partial(work, source, part) for part in parts]
        found = run_all(jobs, processes, lambda results: bar.update(len(results)))
    for part, results in zip(parts, found):
        yield from zip(part, results)
