"""Progress of work on bytes."""

from __future__ import annotations

from tqdm import tqdm


def byte_bar(words: str, total: int) -> tqdm:
    """Make a bar with rate and time left; it stays hidden where there is no terminal."""
    return tqdm(desc=words, total=total, unit="B", unit_scale=True, smoothing=0.05, disable=None)
