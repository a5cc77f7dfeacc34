"""Published results to compare with (configs/reference.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from data import class_lists, strict_json
from data.errors import DataError, UserError
from data.strict_json import Count, NonNegative, Percent
from irv2 import strict_yaml
from irv2.report.statistics import Interval


class PublishedError(UserError):
    """A file of published results that cannot be used."""


class Reference(NamedTuple):
    """A published result; top1 and top5 in percent correct."""

    name: str
    labels: str
    protocol: str
    images: Count
    top1: Percent
    top5: Percent
    source: str
    image_size: Count | None = None  # px; None: not part of the protocol
    eval_crop: NonNegative | None = None
    eval_interpolation: str | None = None
    ensemble: Count = 1  # networks whose probabilities were averaged
    classes: list[str] | str | None = None  # that compete, sorted; in a file, a list's; None: all


_REFERENCES = TypeAdapter(list[Reference])


class Distance(NamedTuple):
    """Distance of a result from a published one."""

    images: int  # correct here less those correct there
    within: bool  # True if the published percentage lies in the interval here


def read(path: Path) -> list[Reference]:
    """Read a file of published results. Raises PublishedError."""
    try:
        references = strict_json.checked(strict_yaml.load(path), _REFERENCES)
    except OSError as error:
        raise PublishedError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise PublishedError(f"{path}: not a list of published results ({error})") from None
    try:
        return [
            each._replace(classes=sorted(class_lists.read(path.parent / each.classes)))
            if isinstance(each.classes, str)
            else each
            for each in references
        ]
    except DataError as error:
        raise PublishedError(f"{path}: {error}") from None


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
