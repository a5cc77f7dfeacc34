"""Some classes of a source, by a list of their names."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from data.base import Source
from data.errors import DataError, enumeration
from data.names import in_nfc
from data.sources import Wrapped


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
