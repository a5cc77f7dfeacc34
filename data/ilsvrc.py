"""ILSVRC2012: what its archives hold, how its images are called, what its devkit says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import matlab
from data.errors import DataError
from data.prepare.members import contents_of_tar_gz

DEVKIT_FOLDER = "ILSVRC2012_devkit_t12/data"
META, LABELS = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
BLACKLIST = "ILSVRC2012_validation_blacklist.txt"

SYNSET = re.compile(r"n[0-9]{8}")
VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")
# What Hugging Face adds to names: ILSVRC2012_val_00000001_n01751748.JPEG
_ADDED_SYNSET = re.compile(r"(?<=\d)_(n[0-9]{8})(?=\.|$)")
_ID = re.compile(r"ILSVRC20\d\d_(CLSLOC_)?ID")  # a field of meta.mat, and of meta_clsloc.mat


def validation_name(number: int) -> str:
    """Name a validation image, without its ending; they are counted from 1."""
    return f"ILSVRC2012_val_{number:08d}"


def original_name(name: str) -> str:
    """Return an image's name as the archives have it, without a synset added to it."""
    return _ADDED_SYNSET.sub("", name)


def added_synset(name: str) -> str | None:
    """Return the synset that was added to an image's name, if any."""
    match = _ADDED_SYNSET.search(name)
    return match and match[1]


class Archive(NamedTuple):
    """An original archive; `size` in bytes, None where it is not known."""

    name: str
    md5: str
    size: int | None


@dataclass(frozen=True)
class Expected:
    """The archives, and how much they hold."""

    devkit: Archive
    train: Archive
    val: Archive
    classes: int
    train_images: int
    val_images: int
    synsets: Callable[[], Sequence[str]]  # all classes, sorted

    def images(self, split: str) -> int:
        """Return the number of images of "train" or "val"."""
        return self.train_images if split == "train" else self.val_images


def _synsets() -> list[str]:
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()


# md5: torchvision/datasets/imagenet.py; counts: readme.txt of the development kit.
ILSVRC2012 = Expected(
    devkit=Archive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf", None),
    train=Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", 147_897_477_120),
    val=Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", 6_744_924_160),
    classes=1000,
    train_images=1_281_167,
    val_images=50_000,
    synsets=_synsets,
)


# ---------------------------------------------------------------------------------- devkit


@dataclass(frozen=True)
class Devkit:
    """Labels and counts of the images, as the development kit states them."""

    train_counts: dict[str, int]  # by synset, in sorted order; an image's label is a place in it
    val_labels: dict[str, str]  # synset of each validation image, by its name without ending
    blacklist: bytes | None  # numbers of validation images with unusable boxes, if it has them

    @property
    def synsets(self) -> list[str]:
        """WordNet ids in the order of the labels."""
        return list(self.train_counts)


class Synset(NamedTuple):
    """A class as the kit's meta.mat has it."""

    number: int  # its ILSVRC2012_ID
    name: str
    train_images: int


def read_devkit(path: Path, expected: Expected) -> Devkit:
    """Read the kit. Raises DataError if it is damaged or not of the images expected."""
    files = _read_files(path)
    for name in (META, LABELS):
        if name not in files:
            raise DataError(f"{path}: holds no {DEVKIT_FOLDER}/{name}")
    synsets = read_synsets(files[META], f"{path}: {META}")
    names = {synset.name for synset in synsets}
    if len(synsets) != expected.classes or len(names) < expected.classes:
        raise DataError(f"{path}: {META} does not number {expected.classes:,} low-level synsets")
    labels = read_ground_truth(files[LABELS], synsets, f"{path}: {LABELS}")
    if len(labels) != expected.val_images:
        raise DataError(
            f"{path}: {LABELS} has {len(labels):,} labels; {expected.val_images:,} expected"
        )
    counts = {s.name: s.train_images for s in sorted(synsets, key=lambda s: s.name)}
    return Devkit(counts, labels, files.get(BLACKLIST))


def read_ground_truth(content: bytes, synsets: list[Synset], where: str) -> dict[str, str]:
    """Read a file of ids, a line for each validation image, that of number 1 first.

    Returns the synset of each image, by its name without ending. Raises DataError.
    """
    name_of = {str(synset.number).encode(): synset.name for synset in synsets}
    labels = {}
    for line, number in enumerate(content.split(), 1):
        if number not in name_of:
            raise DataError(
                f"{where}, line {line}: not an id from 1 to {len(synsets):,}: "
                f"{number[:20].decode(errors='replace')!r}"
            )
        labels[validation_name(line)] = name_of[number]
    return labels


def read_synsets(content: bytes, where: str) -> list[Synset]:
    """Read the low-level synsets of a meta.mat, or of a later kit's meta_clsloc.mat.

    High-level synsets, those with children, label no image. Raises DataError unless the ids are
    1, 2, 3, …
    """
    try:
        rows = matlab.read_struct(content, "synsets")
        (number,) = {field for row in rows for field in row if _ID.fullmatch(field)}
        synsets = [
            Synset(_number(row, number), str(row.get("WNID")), _number(row, "num_train_images"))
            for row in rows
            if "num_children" not in row or _number(row, "num_children") == 0
        ]
    except (OverflowError, ValueError) as error:
        raise DataError(f"{where}: cannot be read ({error})") from None
    for synset in synsets:
        if not SYNSET.fullmatch(synset.name):
            raise DataError(f"{where}: not a WordNet id: {synset.name[:20]!r}")
    if sorted(synset.number for synset in synsets) != list(range(1, len(synsets) + 1)):
        raise DataError(f"{where} does not number its low-level synsets from 1 on")
    return synsets


def _number(row: dict[str, matlab.Value], field: str) -> int:
    value = row.get(field)
    if not isinstance(value, np.ndarray) or value.size != 1:
        raise ValueError(f"a synset without {field}")
    return int(value[0])


def _read_files(path: Path) -> dict[str, bytes]:
    """Read those of the three files of interest that are there; nothing is extracted."""
    wanted = {f"{DEVKIT_FOLDER}/{name}": name for name in (META, LABELS, BLACKLIST)}
    contents = contents_of_tar_gz(path)
    return {wanted[name]: content for name, content in contents if name in wanted}
