"""Published results to compare with (configs/reference.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data.errors import UserError
from irv2.report.statistics import Interval


class PublishedError(UserError):
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
    """Distance of a result from a published one."""

    images: int  # correct here less those correct there
    within: bool  # True if the published percentage lies in the interval here


def read(path: Path) -> list[Reference]:
    """Read a file of published results. Raises PublishedError."""
    try:
        references = [
            Reference(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
        ]
        return [each._replace(top1=float(each.top1), top5=float(each.top5)) for each in references]
    except (OSError, ValueError, yaml.YAMLError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PublishedError(f"{path}: no list of published results ({reason})") from None


def matching(references: list[Reference], **facts: Any) -> list[Reference]:
    """Select the references that agree with `facts`; fields that are None agree with any."""
    return [
        reference
        for reference in references
        if all(getattr(reference, key) in (value, None) for key, value in facts.items())
    ]


def distance(correct: int, images: int, interval: Interval, published: float) -> Distance:
    """Distance of `correct` of `images` from a published percentage of the same images."""
    there = round(published * images / 100)
    return Distance(correct - there, interval.low <= published <= interval.high)
