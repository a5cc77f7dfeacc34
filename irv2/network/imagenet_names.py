"""ImageNet's classes: synsets in the order of the networks' outputs, and readable names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

_SYNSET = re.compile(r"n\d{8}")


@cache
def _info() -> ImageNetInfo:
    return ImageNetInfo("imagenet-1k")


def synsets() -> list[str]:
    """The 1,000 synsets, "n01440764" and on, sorted: output i of a network is class i."""
    return _info().label_names()


def in_words(names: Sequence[str]) -> list[str]:
    """Readable names of classes: "tench" for a synset, with it where two are called alike."""
    words = list(map(_in_words, names))
    counts = Counter(words)
    return [
        f"{word} ({name})" if counts[word] > 1 and word != name else word
        for word, name in zip(words, names)
    ]


def _in_words(name: str) -> str:
    """The first word of a synset, else the name itself."""
    if not _SYNSET.fullmatch(name):
        return name
    try:
        description = _info().label_name_to_description(name)
    except KeyError:  # a folder that only looks like a synset
        return name
    return description.partition(",")[0] or name
