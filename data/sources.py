"""Where images come from: index -> (encoded bytes, label). Folders and synthetic images here,
shards in `data.shards`, shards in an object store in `data.remote`."""

from __future__ import annotations

import io
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS


class DataError(ValueError):
    """Data that cannot be used; the message names the file or folder and what to do."""


class ImageError(DataError):
    """One image that cannot be read or decoded; only the rank that met it knows."""


class StorageError(DataError):
    """Storage that does not answer, or has other objects than were indexed; only the rank that met
    it knows. Nothing stands in for these images: they are what they were as soon as it answers."""


@dataclass(frozen=True)
class Storage:
    """How images are fetched that lie in an object store."""

    cache_dir: str | None = None  # folder of a local disk, shared by all processes; None: no cache
    cache_gb: float = 160.0  # the most it may take, 10^9 bytes
    timeout_s: float = 300.0  # for how long a fault is taken as passing


class Source(Protocol):
    """A numbered set of labelled, encoded images."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Encoded image and label, an index into `classes`."""

    def name(self, index: int) -> str:
        """What to call an image when speaking to a person."""

    def members(self, index: int) -> Sequence[int]:
        """All images of an image's class, itself among them, in ascending order."""

    def class_counts(self) -> list[int]:
        """Number of images of each class."""


class FolderSource:
    """ImageFolder layout: root/<class>/.../<image>, classes and images in sorted order.

    Raises DataError for a missing folder, one without class folders, or a class without images.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.expanduser(root)
        if not os.path.isdir(self.root):
            raise DataError(
                f"{self.root}: no such data folder; expected {self.root}/<class>/<image>"
            )
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not self.classes:
            raise DataError(f"{self.root}: {_no_classes(self.root)}")
        # As a list of Python strings, ImageNet's paths would take four times the memory.
        self._starts = [0]  # of each class, and the end of the last
        self._names: list[bytes] = []  # of each class: its images' paths within it, end to end
        ends = []  # of each path within its class's bytes
        for name in self.classes:
            paths = [os.fsencode(path) for path in images_below(os.path.join(self.root, name))]
            self._starts.append(self._starts[-1] + len(paths))
            self._names.append(b"".join(paths))
            ends.append(np.cumsum([len(path) for path in paths], dtype=np.uint32))
        self._ends = np.concatenate(ends)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> tuple[bytes, int]:
        path = self.name(index)
        try:
            with open(path, "rb") as file:
                return file.read(), self._label(index)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from None

    def name(self, index: int) -> str:
        label = self._label(index)
        begin = self._ends[index - 1] if index > self._starts[label] else 0
        path = os.fsdecode(self._names[label][begin : self._ends[index]])
        return os.path.join(self.root, self.classes[label], path)

    def members(self, index: int) -> range:
        label = self._label(index)
        return range(self._starts[label], self._starts[label + 1])

    def class_counts(self) -> list[int]:
        return np.diff(self._starts).tolist()

    def _label(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1


def _no_classes(root: str) -> str:
    if os.path.exists(os.path.join(root, "plan.json")):
        return "its shards are unfinished; start the command that writes them again"
    if any(entry.name.endswith(".tar") for entry in os.scandir(root)):
        return (
            "holds tar files but no index of them; make one: "
            f"python scripts/make_shards.py --index {root}"
        )
    if any(entry.name.startswith("ILSVRC2012_val_") for entry in os.scandir(root)):
        return (
            "holds ImageNet's validation images as their archive has them, without class folders; "
            "these are made from the archives by: "
            "python scripts/prepare_imagenet.py --archives DIR --out DIR --only val"
        )
    return "holds no class folders; expected <class>/<image> in it"


def _refuse(error: OSError) -> NoReturn:
    """A folder that cannot be listed would silently make the data set smaller."""
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror})")


def images_below(top: str) -> list[str]:
    """A class's images, relative to its folder, in ImageFolder's order: folder by folder, a
    folder's files sorted. Raises DataError if there are none."""
    paths = []
    for folder, _, files in sorted(os.walk(top, onerror=_refuse, followlinks=True)):
        below = os.path.relpath(folder, top)
        images = (file for file in sorted(files) if file.lower().endswith(IMG_EXTENSIONS))
        paths += images if below == os.curdir else [os.path.join(below, file) for file in images]
    if not paths:
        raise DataError(f"{top}: no images in it ({', '.join(IMG_EXTENSIONS)})")
    return paths


class SyntheticSource:
    """Noise around one colour a class: something to run on where there are no images."""

    SIZE = 96  # px

    def __init__(self, images: int, classes: int) -> None:
        self.images = images
        self.classes = [f"class{i:04d}" for i in range(classes)]

    def __len__(self) -> int:
        return self.images

    def read(self, index: int) -> tuple[bytes, int]:
        label = index % len(self.classes)
        colour = np.random.default_rng((1, label)).integers(32, 224, 3)
        noise = np.random.default_rng((2, index)).integers(-32, 32, (self.SIZE, self.SIZE, 3))
        buffer = io.BytesIO()
        Image.fromarray((colour + noise).astype(np.uint8)).save(buffer, "BMP")
        return buffer.getvalue(), label

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def members(self, index: int) -> range:
        return range(index % len(self.classes), self.images, len(self.classes))

    def class_counts(self) -> list[int]:
        return [len(self.members(label)) for label in range(len(self.classes))]


def open_source(spec: str, storage: Storage | None = None) -> Source:
    """The path of a folder of classes or of shards, the URL of shards, or
    "synthetic:IMAGESxCLASSES".

    Raises DataError.
    """
    if not spec.startswith("synthetic:"):
        from data import remote, shard_index, shards  # they build on this module

        if "://" in spec:
            return remote.RemoteShards(spec, storage or Storage())
        is_indexed = os.path.exists(os.path.join(os.path.expanduser(spec), shard_index.INDEX))
        return shards.ShardSource(spec) if is_indexed else FolderSource(spec)
    match = re.fullmatch(r"synthetic:([1-9]\d*)x([1-9]\d*)", spec)
    if match is None or int(match[1]) < int(match[2]):
        raise DataError(f"{spec}: expected synthetic:IMAGESxCLASSES, such as synthetic:6400x10")
    return SyntheticSource(int(match[1]), int(match[2]))


def check_same_classes(classes: list[str], expected: list[str], where: str, of: str) -> None:
    """Raise DataError unless two class lists are equal, naming what differs."""
    if classes == expected:
        return
    extra, missing = sorted(set(classes) - set(expected)), sorted(set(expected) - set(classes))
    parts = [
        f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
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
