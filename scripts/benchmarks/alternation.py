"""Two ways of doing the same, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

LAUNCHES = 20
Way = Callable[[], float]  # does some work; returns how many things it did a second


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(count: int, work: Callable[[], object], device: torch.device | None = None) -> Way:
    """Return a way that does some work on `count` things."""
    return lambda: count / seconds(work, device)


def alternate(ours: Way, peer: Way, rounds: int) -> dict[str, Any]:
    """Median rates of both ways and their ratio, with its extremes; a first round is discarded."""
    ours(), peer()
    return compared([(ours(), peer()) for _ in range(rounds)])


def compared(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Return medians of both rates, and of the ratios of each pair with their extremes."""
    ratios = sorted(a / b for a, b in pairs)
    rates = (statistics.median(rates) for rates in zip(*pairs))
    return {
        **dict(zip(("ours_per_s", "peer_per_s"), rates)),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


def table_row(words: str, figures: dict[str, Any], goal: str, digits: int = 4) -> str:
    """Format what `compared` returns as a row: both rates, the ratio with its range, the goal."""
    low, high = figures["ratio_range"]
    return (
        f"{words} | {figures['ours_per_s']:.{digits}g} | {figures['peer_per_s']:.{digits}g} | "
        f"**{figures['ratio']:.2f}** ({low:.2f} to {high:.2f}) | {goal}"
    )


def best_time(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Shortest of several times, after one that is discarded, in seconds."""
    once = _launches if device.type == "cuda" else seconds
    return min([once(work) for _ in range(repeats + 1)][1:])


def seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Time some work, in seconds; on a GPU, until it has finished."""
    started = time.perf_counter()
    work()
    if device is not None:
        wait_for(device)
    return time.perf_counter() - started


def _launches(work: Callable[[], object]) -> float:
    """Seconds of one among many that a GPU does in a row, so that launching is not timed."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(LAUNCHES):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / LAUNCHES
