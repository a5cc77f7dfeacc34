"""Some classes of a source, by a list of their names."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np

from data.base import Source
from data.errors import DataError, enumeration
from data.files import read_text
from data.names import in_nfc
from data.sources import Wrapped

COMMENT = "# "  # begins a line of a list that is no name


class Subset(Wrapped):
    """The images of some classes of a source, numbered anew; its other images are not there."""

    def __init__(self, source: Source, labels: list[int], remark: str) -> None:
        """labels: of the classes that are kept, ascending."""
        super().__init__(source, [source.classes[label] for label in labels], remark)
        self._ranges = [source.images_of(label) for label in labels]
        self.starts = [0, *accumulate(map(len, self._ranges))]
        self.nested = {name: source.nested[name] for name in self.classes if name in source.nested}
        if source.storage_order is not None:
            kept = np.concatenate([np.asarray(images, np.int64) for images in self._ranges])
            number = np.full(len(source), -1, np.int32)
            number[kept] = np.arange(len(kept))
            stored = number[source.storage_order]
            self.storage_order = stored[stored >= 0]

    def inner(self, index: int) -> int:
        label = self.label(index)
        return self._ranges[label][index - self.starts[label]]


def of_classes(source: Source, names: list[str], where: str, of: str) -> Source:
    """Return the images of the classes named, in the order that the source has them.

    Names are the same in any Unicode form. Raises DataError for one that the source lacks.
    """
    wanted, own = set(map(in_nfc, names)), list(map(in_nfc, source.classes))
    if missing := sorted(wanted.difference(own)):
        raise DataError(
            f"{where}: lacks {len(missing):,} of the {len(wanted):,} classes of {of}: "
            f"{enumeration(missing)}"
        )
    labels = [label for label, name in enumerate(own) if name in wanted]
    if len(labels) == len(own):
        return source
    remark = f"{where}: {len(labels):,} of its {len(own):,} classes, those of {of}"
    return Subset(source, labels, remark)


def read_list(path: str | Path) -> list[str]:
    """Read the names of classes as `parse_list` does. Raises DataError."""
    try:
        names = parse_list(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{path}: cannot be read ({reason})") from None
    if len(set(map(in_nfc, names))) < len(names) or not names:
        raise DataError(f"{path}: expected names of classes, one a line, all different")
    return names


def parse_list(text: str) -> list[str]:
    """Names, one a line; a line that begins with "# " is a comment."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith(COMMENT)]
    return [line for line in lines if line]
