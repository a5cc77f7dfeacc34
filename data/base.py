"""The base class of all sources of images: folders, shards and archives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np


class Source:
    """A numbered set of labelled, encoded images, class by class.

    A kind of source gives `classes` and `starts`, `read` and `name`; the rest are abilities that it
    may have besides.
    """

    classes: list[str]
    starts: Sequence[int]  # number of each class's first image, and of all images
    root: str | None = None  # the folder or archive that the images lie in
    resized_to: int | None = None  # px of the shorter side that larger images were scaled down to
    storage_order: np.ndarray | None = None  # int32 [N], the images as they lie one after another
    remarks: Sequence[str] = ()  # lines for a person, of what was noticed when this was opened
    nested: Mapping[str, list[str]] = MappingProxyType({})  # class -> folders, no image beside them
    fetches_ahead: int = 0  # images that `fetch` wants to know of before they are read

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an image, encoded, and its label, an index into `classes`. Raises ImageError."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Name an image to a person."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Name an image as well as that can be without reading anything."""
        return self.name(index)

    def label(self, index: int) -> int:
        """Return the label of an image without reading it."""
        return bisect_right(self.starts, index) - 1

    def images_of(self, label: int) -> range:
        """Return the images of a class, in ascending order."""
        return range(self.starts[label], self.starts[label + 1])

    def members(self, index: int) -> range:
        """Return all images of an image's class, itself among them, in ascending order."""
        return self.images_of(self.label(index))

    def class_counts(self) -> list[int]:
        """Count the images of each class."""
        return [len(self.images_of(label)) for label in range(len(self.classes))]

    def will_read(self, indices: Sequence[int]) -> None:
        """Have the system load images that some process will read soon, where that helps."""

    def fetch(self, indices: Iterable[int]) -> None:
        """Begin to fetch images that this very process will read soon, where that helps."""
