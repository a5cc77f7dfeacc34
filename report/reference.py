"""Published results to hold one's own against (configs/reference.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from irv2.statistics import Interval


class PublishedError(ValueError):
    """A file of published results that cannot be used."""


class Reference(NamedTuple):
    """A published result; top1 and top5 in percent correct."""

    name: str
    labels: str
    protocol: str
    images: int
    top1: float
    top5: float
    source: str
    image_size: int | None = None  # px; None: not part of the protocol
    eval_crop: float | None = None
    eval_interpolation: str | None = None
    ensemble: int = 1  # networks whose probabilities were averaged


class Distance(NamedTuple):
    """How far a result is from a published one."""

    images: int  # correct here less those correct there
    within: bool  # whether the published percentage lies in the interval found here


def read(path: Path) -> list[Reference]:
    """Raises PublishedError."""
    try:
        found = [Reference(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]
        return [each._replace(top1=float(each.top1), top5=float(each.top5)) for each in found]
    except (OSError, ValueError, yaml.YAMLError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PublishedError(f"{path}: no list of published results ({reason})") from None


def matching(references: list[Reference], **facts: Any) -> list[Reference]:
    """Those of which no field that is not None differs from `facts`."""
    return [
        reference
        for reference in references
        if all(getattr(reference, key) in (value, None) for key, value in facts.items())
    ]


def distance(correct: int, images: int, interval: Interval, published: float) -> Distance:
    """Of `correct` of `images` from a published percentage of the same images."""
    there = round(published * images / 100)
    return Distance(correct - there, interval.low <= published <= interval.high)
