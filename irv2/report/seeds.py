"""Runs of several seeds: mean and spread of a config's results, and two configs on the same images.

DIR/index.html   the page
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import statistics as numbers
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import UserError
from data.files import open_regular
from irv2.report import page
from irv2.report.statistics import Interval, Paired, bootstrap_difference, mcnemar

PREDICTIONS = "predictions.csv.gz"


class SeedsError(UserError):
    """Runs that cannot be put side by side."""


class Answers(NamedTuple):
    """Images of one evaluation, and whether each was right."""

    images: list[str]
    correct: np.ndarray  # bool [N]

    @property
    def top1(self) -> float:
        """Percent of the images that are right."""
        return 100.0 * float(self.correct.mean())


class Seeds(NamedTuple):
    """The runs of one config, by seed."""

    name: str
    answers: dict[int, Answers]

    @property
    def top1(self) -> list[float]:
        """Percent right, of each seed."""
        return [each.top1 for each in self.answers.values()]

    @property
    def mean(self) -> float:
        """Mean over the seeds of the percentage that is right."""
        return numbers.mean(self.top1)

    @property
    def deviation(self) -> float:
        """Standard deviation of one run's percentage, with n - 1; NaN for a single one."""
        return numbers.stdev(self.top1) if len(self.top1) > 1 else math.nan


class Compared(NamedTuple):
    """Two configs on the same images."""

    pairs: dict[int, Paired]  # by seed
    difference: float  # of the means, percentage points, the second less the first
    interval: Interval  # of that


def read(directory: Path) -> Answers:
    """Read what validate.py --report wrote of each image. Raises SeedsError."""
    path = directory / PREDICTIONS
    try:
        with (
            open_regular(path) as file,
            gzip.open(file, "rt", encoding="utf-8", newline="") as text,
        ):
            rows = list(csv.DictReader(io.StringIO(text.read())))
        correct = np.array([{"0": False, "1": True}[row["correct"]] for row in rows], bool)
        images = [row["image"] for row in rows]
    except (OSError, EOFError, ValueError, KeyError, csv.Error, zlib.error) as error:
        raise SeedsError(f"{path}: no table of answers that validate.py wrote ({error})") from None
    if not rows:
        raise SeedsError(f"{path}: no image in it")
    return Answers(images, correct)


def compare(first: Seeds, second: Seeds) -> Compared:
    """Compare two configs. Raises SeedsError unless all their runs were asked the same images."""
    of_images = next(iter(first.answers.values())).images
    for each in (first, second):
        for seed, answers in each.answers.items():
            if answers.images != of_images:
                raise SeedsError(f"{each.name}, seed {seed}: was asked other images than the rest")
    shared = [seed for seed in first.answers if seed in second.answers]
    both = [np.stack([a.correct for a in each.answers.values()]) for each in (first, second)]
    return Compared(
        {s: mcnemar(first.answers[s].correct, second.answers[s].correct) for s in shared},
        second.mean - first.mean,
        bootstrap_difference(*both),
    )


def in_words(configs: list[Seeds], compared: Compared | None) -> str:
    """Describe the results, a line for each config and one for the comparison."""
    lines = [f"{each.name:<24} top-1 {spread(each)}" for each in configs]
    if compared is not None:
        lines.append(f"{'difference':<24} {difference(compared)}")
    return "\n".join(lines)


def spread(seeds: Seeds) -> str:
    """Format mean and standard deviation, "98.61 ± 0.30 % (3 seeds, 98.33 to 98.89)"."""
    shown = "" if math.isnan(seeds.deviation) else f" ± {seeds.deviation:.2f}"
    low, high = min(seeds.top1), max(seeds.top1)
    count = page.count(len(seeds.top1), "seed")
    return f"{seeds.mean:.2f}{shown} % ({count}, {low:.2f} to {high:.2f})"


def difference(compared: Compared) -> str:
    """Format a difference with its interval, in percentage points."""
    low, high = compared.interval
    return f"{compared.difference:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def write(directory: Path, configs: list[Seeds], compared: Compared | None, command: str) -> None:
    """Write index.html into a folder, which is made if need be. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    seeds = sorted({seed for each in configs for seed in each.answers})
    html = page.render(
        "seeds.html",
        title=" and ".join(each.name for each in configs),
        configs=configs,
        seeds=seeds,
        images=len(next(iter(configs[0].answers.values())).images),
        spreads=[spread(each) for each in configs],
        compared=compared,
        difference=None if compared is None else difference(compared),
        command=command,
    )
    page.write(directory / "index.html", html)
