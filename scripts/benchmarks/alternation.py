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
    """Until a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(count: int, work: Callable[[], object], device: torch.device | None = None) -> Way:
    """A way that does some work on so many things."""

    def way() -> float:
        started = time.perf_counter()
        work()
        if device is not None:
            wait_for(device)
        return count / (time.perf_counter() - started)

    return way


def alternate(ours: Way, peer: Way, rounds: int) -> dict[str, Any]:
    """Median rates of both ways and of their ratio, with its extremes; the first round is lost."""
    ours(), peer()
    return compared([(ours(), peer()) for _ in range(rounds)])


def compared(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of both rates, and of the ratios of each pair with their extremes."""
    ratios = sorted(a / b for a, b in pairs)
    rates = (statistics.median(rates) for rates in zip(*pairs))
    return {
        **dict(zip(("ours_per_s", "peer_per_s"), rates)),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


def table_row(words: str, found: dict[str, Any], goal: str, digits: int = 4) -> str:
    """What `compared` found as a row of a table: both rates, the ratio with its range, the goal."""
    low, high = found["ratio_range"]
    return (
        f"| {words} | {found['ours_per_s']:.{digits}g} | {found['peer_per_s']:.{digits}g} | "
        f"**{found['ratio']:.2f}** ({low:.2f} to {high:.2f}) | {goal} |"
    )


def best_time(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The shortest time of several, after one that is lost, in seconds."""
    once = _launches if device.type == "cuda" else _once
    return min([once(work) for _ in range(repeats + 1)][1:])


def _once(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _launches(work: Callable[[], object]) -> float:
    """Of one among many that a GPU does one after the other, so that launching is not timed."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(LAUNCHES):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / LAUNCHES
