"""Folders that are given one level too high or too low, and the folder that was meant."""

from __future__ import annotations

import os
from collections.abc import Sequence

from data.base import Source
from data.errors import DataError, enumeration

TRAIN = {"train", "training", "trainset"}
HELD_OUT = {"val", "valid", "validation", "dev", "eval", "test", "testing", "testset"}


def refuse_splits(root: str, folders: Sequence[str]) -> None:
    """Raise DataError if a root's folders are the splits of a data set, not its classes.

    A class may be called train, as in CIFAR-100; it then has others than splits beside it.
    """
    lower = {name.lower() for name in folders}
    has_both = lower & TRAIN and lower & HELD_OUT
    splits = [name for name in folders if name.lower() in TRAIN | HELD_OUT]
    if has_both or len(splits) == len(folders):
        meant = " or ".join(os.path.join(root, name) for name in splits[:3])
        raise DataError(
            f"{root}: its folders {' and '.join(splits[:3])} are parts of a data set, not classes; "
            f"give {meant}"
        )


def refuse_wrong_level(source: Source, where: str, key: str) -> None:
    """Raise DataError unless images lie in the folders of several classes.

    key: what names them, such as "data.train".
    """
    if len(source.classes) == 1:
        (name,) = source.classes
        below = source.nested.get(name)
        what = f"{key}={where}: has only one class, {name}"
        if below:
            meant = os.path.join(where, name)
            raise DataError(f"{what}, and that holds folders ({enumeration(below)}); give {meant}")
        raise DataError(f"{what}; expected {where}/<class>/<image> with two classes or more")
    if source.nested:
        name, below = next(iter(source.nested.items()))
        raise DataError(
            f"{key}={where}: {len(source.nested)} of its {len(source.classes)} class folders hold "
            f"only folders, such as {name} ({enumeration(below)}): if those are the classes, give "
            f"{os.path.join(where, name)}, else put the images into {name} itself"
        )


def refuse_overlap(train: str, val: str) -> None:
    """Raise DataError if training and validation images are the same, or lie in each other."""
    if any(where.startswith("synthetic:") for where in (train, val)):
        return
    places = [_place(where) for where in (train, val)]
    if places[0] == places[1]:
        raise DataError(
            f"data.train and data.val are the same, {val}: a run would be tested on what it was "
            "trained on; give data.val other images, such as scripts/prepare_dataset.py folder "
            "holds out"
        )
    for inner, outer in (places, places[::-1]):
        if inner.startswith(outer.rstrip("/") + "/"):
            raise DataError(
                f"data.train={train} and data.val={val}: one lies in the other; put them side by "
                "side, in folders of their own"
            )


def _place(where: str) -> str:
    """Canonical name of a folder or URL."""
    if "://" in where:
        return where.rstrip("/")
    return os.path.realpath(os.path.expanduser(where))
