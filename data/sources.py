"""Sources of images: class folders, synthetic images, and whatever a config's data.train names."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.base import Source
from data.errors import DataError, enumeration
from data.folders import Remarks, search
from data.image_formats import image_extensions, read_image
from data.levels import refuse_splits
from data.names import in_nfc
from data.shards.index import INDEX, PLAN
from data.shards.local import ShardSource
from data.shards.remote import RemoteShards, Storage


class FolderSource(Source):
    """ImageFolder layout: root/<class>/.../<image>, classes and images in sorted order.

    Raises DataError for a missing folder, one without class folders, or a class without images,
    or folders that are the splits of a data set, not classes.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        if not os.path.isdir(self.root):
            raise DataError(
                f"{self.root}: no such data folder; expected {self.root}/<class>/<image>"
            )
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not self.classes:
            raise DataError(f"{self.root}: {_no_classes(self.root)}")
        refuse_splits(self.root, self.classes)
        self.nested: dict[str, list[str]] = {}
        remarks = Remarks(self.root, self.classes)
        # As a list of Python strings, ImageNet's paths would take four times the memory.
        self.starts = [0]
        self._names: list[bytes] = []  # of each class: its images' paths within it, end to end
        ends = []  # of each path within its class's bytes
        for name in self.classes:
            files = search(os.path.join(self.root, name))
            remarks.note(name, files)
            images = files.images
            if all(os.sep in path for path in images):
                self.nested[name] = sorted({path.partition(os.sep)[0] for path in images})
            paths = [os.fsencode(path) for path in images]
            self.starts.append(self.starts[-1] + len(paths))
            self._names.append(b"".join(paths))
            ends.append(np.cumsum([len(path) for path in paths], dtype=np.uint32))
        self._ends = np.concatenate(ends)
        self.remarks = remarks.lines()

    def read(self, index: int) -> tuple[bytes, int]:
        return read_image(self.name(index)), self.label(index)

    def name(self, index: int) -> str:
        label = self.label(index)
        begin = self._ends[index - 1] if index > self.starts[label] else 0
        path = os.fsdecode(self._names[label][begin : self._ends[index]])
        return os.path.join(self.root, self.classes[label], path)


def _no_classes(root: str) -> str:
    if os.path.exists(os.path.join(root, PLAN)):
        return "its shards are unfinished; start the command that writes them again"
    if any(entry.name.endswith(".tar") for entry in os.scandir(root)):
        return (
            "holds tar files but no index of them; make one: "
            f"python scripts/make_shards.py --index {root}"
        )
    if any(entry.name.startswith("ILSVRC2012_val_") for entry in os.scandir(root)):
        return (
            "holds ImageNet's validation images without class folders; validate.py --labels FILE "
            "evaluates them as they lie, and class folders are made by: python "
            f"scripts/prepare_imagenet.py --from {root} --labels FILE --link --out DIR --only val"
        )
    if any(entry.name.lower().endswith(image_extensions()) for entry in os.scandir(root)):
        parent, name = os.path.split(os.path.abspath(root))
        return f"holds no class folders, only images; if {name} is a class, give {parent}"
    return "holds no class folders; expected <class>/<image> in it"


class SyntheticSource(Source):
    """Noise around one colour a class: something to run on where there are no images.

    Image i is of class i modulo the number of classes.
    """

    SIZE = 96  # px

    def __init__(self, images: int, classes: int) -> None:
        self.images = images
        self.classes = [f"class{i:04d}" for i in range(classes)]

    def __len__(self) -> int:
        return self.images

    def read(self, index: int) -> tuple[bytes, int]:
        label = self.label(index)
        colour = np.random.default_rng((1, label)).integers(32, 224, 3)
        noise = np.random.default_rng((2, index)).integers(-32, 32, (self.SIZE, self.SIZE, 3))
        buffer = io.BytesIO()
        Image.fromarray((colour + noise).astype(np.uint8)).save(buffer, "BMP")
        return buffer.getvalue(), label

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def images_of(self, label: int) -> range:
        return range(label, self.images, len(self.classes))


def open_source(spec: str, storage: Storage | None = None) -> Source:
    """Open images by the path of a folder of classes or of shards, by the URL of shards, or
    "synthetic:IMAGESxCLASSES".

    Raises DataError.
    """
    if spec.startswith("synthetic:"):
        return _open_synthetic(spec)
    if "://" in spec:
        return RemoteShards(spec, storage or Storage())
    is_indexed = os.path.exists(os.path.join(spec, INDEX))
    return ShardSource(spec) if is_indexed else FolderSource(spec)


def _open_synthetic(spec: str) -> SyntheticSource:
    match = re.fullmatch(r"synthetic:([1-9]\d*)x([1-9]\d*)", spec)
    if match is None or int(match[1]) < int(match[2]):
        raise DataError(f"{spec}: expected synthetic:IMAGESxCLASSES, such as synthetic:6400x10")
    return SyntheticSource(int(match[1]), int(match[2]))


class Wrapped(Source):
    """The images of a source, with other classes; a subclass gives `starts` or `images_of`."""

    def __init__(self, source: Source, classes: list[str], remark: str) -> None:
        self.source, self.classes = source, classes
        self.remarks = [*source.remarks, remark]
        self.root, self.resized_to = source.root, source.resized_to
        self.storage_order, self.fetches_ahead = source.storage_order, source.fetches_ahead

    def inner(self, index: int) -> int:
        """Return the number that an image has in the source."""
        return index

    def read(self, index: int) -> tuple[bytes, int]:
        return self.source.read(self.inner(index))[0], self.label(index)

    def name(self, index: int) -> str:
        return self.source.name(self.inner(index))

    def where(self, index: int) -> str:
        return self.source.where(self.inner(index))

    def will_read(self, indices: Sequence[int]) -> None:
        self.source.will_read([self.inner(int(index)) for index in indices])

    def fetch(self, indices: Iterable[int]) -> None:
        self.source.fetch(map(self.inner, indices))


class Renamed(Wrapped):
    """The images of a source, whose classes have other names and another order."""

    def __init__(self, source: Source, classes: list[str], places: list[int], remark: str) -> None:
        """places: of each of the source's classes among `classes`."""
        super().__init__(source, classes, remark)
        self._places, self._own = places, np.argsort(places).tolist()

    def __len__(self) -> int:
        return len(self.source)

    def label(self, index: int) -> int:
        return self._places[self.source.label(index)]

    def images_of(self, label: int) -> range:
        return self.source.images_of(self._own[label])


def with_classes(source: Source, expected: list[str], where: str, of: str) -> Source:
    """Return a source with the classes expected, where it has them in another Unicode form.

    Raises DataError if it has others.
    """
    places = check_same_classes(source.classes, expected, where, of)
    if source.classes == expected:
        return source
    return Renamed(source, expected, places, other_form(where, of))


def other_form(where: str, of: str) -> str:
    """A remark on classes that are the same in another Unicode form."""
    return f"{where}: its class names are those of {of} in another Unicode form (NFC, NFD)"


def check_same_classes(classes: list[str], expected: list[str], where: str, of: str) -> list[int]:
    """Return the place of each class among those expected, which must be the same.

    Names are the same in any Unicode form; their order, which depends on it, is then found by name.
    Raises DataError, naming what differs.
    """
    if classes == expected:
        return list(range(len(classes)))
    own = {in_nfc(name): place for place, name in enumerate(classes)}
    others = {in_nfc(name): place for place, name in enumerate(expected)}
    are_written_otherwise = set(classes) != set(expected)
    if are_written_otherwise and own.keys() == others.keys() and len(own) == len(classes):
        return [others[name] for name in own]
    extra = sorted(name for name in classes if in_nfc(name) not in others)
    missing = sorted(name for name in expected if in_nfc(name) not in own)
    parts = [
        f"{len(names)} {word} ({enumeration(names)})"
        for names, word in ((extra, "unknown"), (missing, "missing"))
        if names
    ]
    what = " and ".join(parts) or "another order"
    if all(name.isdecimal() for name in classes):
        what += (
            "; it knows its classes by number alone: if these are shards, remove their index, then "
            f"python scripts/make_shards.py --index {where} --classes {of}"
        )
    raise DataError(f"{where}: its classes are not those of {of}: {what}")


def refuse_resized(source: Source, where: str, option: str) -> None:
    """Raise DataError if a source's images were scaled down when its shards were made.

    `option` is what allows them all the same.
    """
    if source.resized_to is not None:
        raise DataError(
            f"{where}: its images were scaled down to a shorter side of {source.resized_to} px "
            "when the shards were made, so that results would not be those of the data set; "
            f"evaluate on the original images, or allow these: {option}"
        )
