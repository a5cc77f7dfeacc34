"""ImageNet's classes: synsets in the order of the networks' outputs, and readable names."""

from __future__ import annotations

import re
from functools import cache

from timm.data import ImageNetInfo

_SYNSET = re.compile(r"n\d{8}")


@cache
def _info() -> ImageNetInfo:
    return ImageNetInfo("imagenet-1k")


def synsets() -> list[str]:
    """The 1,000 synsets, "n01440764" and on, sorted: output i of a network is class i."""
    return _info().label_names()


def in_words(name: str) -> str:
    """Readable name of a class: the first word of a synset ("tench"), else the name itself."""
    if not _SYNSET.fullmatch(name):
        return name
    try:
        description = _info().label_name_to_description(name)
    except KeyError:  # a folder that only looks like a synset
        return name
    return description.partition(",")[0] or name
