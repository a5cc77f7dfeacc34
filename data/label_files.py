"""Files that say of which class each image of a folder is, and such a folder as a source."""

from __future__ import annotations

import csv
import os
import re
import warnings
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch

from data import ilsvrc
from data.base import Source
from data.errors import DataError, enumeration
from data.files import check_torch_zip, read_regular
from data.image_formats import image_extensions, read_image

METAS = ("meta.mat", "meta_clsloc.mat")  # of the development kits of 2012 and of later years
MAX_FILE = 256 << 20  # bytes
_SEPARATOR = re.compile(r"\s*[,\t]\s*")


def read(path: Path) -> dict[str, str]:
    """Read the class of each image, by the image's name as the file has it, without a folder.

    Known are a line `name class` for each image, Kaggle's LOC_val_solution.csv, torchvision's
    meta.bin, the ImageNet development kit (.tar.gz), and its ground truth with meta.mat beside it:
    images that a file counts, not names, are ILSVRC2012_val_00000001 and on. Raises DataError.
    """
    content = _content(path)
    if content.startswith(b"\x1f\x8b"):
        return ilsvrc.read_devkit(path, ilsvrc.ILSVRC2012).val_labels
    if b"\0" in content[:1024]:
        return _from_meta_bin(path)
    return parse(content, path)


def parse(content: bytes, path: Path) -> dict[str, str]:
    """Read labels that are text, as `read` does. Raises DataError that names `path`."""
    content = content.removeprefix(BOM_UTF8)
    try:
        lines = [line.strip() for line in content.decode().splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file") from None
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{path}: is empty")
    if all(line.isdecimal() for line in lines):
        return ilsvrc.read_ground_truth(content, _synsets_beside(path), str(path))
    if lines[0].replace('"', "") == "ImageId,PredictionString":
        return _from_kaggle(path, lines)
    return _from_pairs(path, list(map(_pair, lines)))


def _pair(line: str) -> list[str]:
    """Split "my photo.jpg,tench", the same with a tab, or else "my photo.jpg n01440764"."""
    pair = _SEPARATOR.split(line, maxsplit=1)
    return pair if len(pair) == 2 else line.rsplit(maxsplit=1)


def _content(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_FILE)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _synsets_beside(path: Path) -> list[ilsvrc.Synset]:
    """Read the synsets that a development kit's ids stand for."""
    for name in METAS:
        meta = path.with_name(name)
        if meta.is_file():
            return ilsvrc.read_synsets(_content(meta), str(meta))
    raise DataError(
        f"{path}: its numbers are ids of ImageNet's development kit, which {METAS[0]} explains: "
        f"put that beside it, or give the kit itself, {ilsvrc.ILSVRC2012.devkit.name}"
    )


def _from_kaggle(path: Path, lines: list[str]) -> dict[str, str]:
    """Read "ILSVRC2012_val_00000001,n01751748 111 108 428 273 n01751748 …": class and box, again
    and again; an image's boxes are all of one class."""
    try:
        rows = list(csv.reader(lines[1:]))
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    pairs = []
    for row in rows:
        classes = {name for boxes in row[1:] for name in boxes.split()[::5]}
        if len(classes) != 1:
            raise DataError(f"{path}: {row[0][:60]!r}: {len(classes)} classes, expected one")
        pairs.append([row[0], *classes])
    return _from_pairs(path, pairs)


def _from_meta_bin(path: Path) -> dict[str, str]:
    """Read torchvision's meta.bin: (class names by synset, synset of each validation image)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_torch_zip(path)
            _, synsets = torch.load(path, weights_only=True)
        if not all(isinstance(name, str) for name in synsets):
            raise TypeError("no list of names")
    except Exception:  # it may hold anything
        raise DataError(
            f"{path}: not a file of labels: expected lines of name and class, "
            "LOC_val_solution.csv, torchvision's meta.bin, or ImageNet's development kit"
        ) from None
    return {ilsvrc.validation_name(number): name for number, name in enumerate(synsets, 1)}


def _from_pairs(path: Path, pairs: list[list[str]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise DataError(f"{path}: expected lines of name and class, found {pair[0][:60]!r}")
        name = os.path.basename(pair[0])
        if labels.setdefault(name, pair[1]) != pair[1]:
            raise DataError(f"{path}: {name} is of two classes, {labels[name]} and {pair[1]}")
    return labels


def label_of(name: str, labels: Mapping[str, str]) -> str | None:
    """Look up the class of an image by its name, its name without ending, or its original name."""
    stem = os.path.splitext(name)[0]
    keys = (name, stem, ilsvrc.original_name(name), ilsvrc.original_name(stem))
    return next((labels[key] for key in keys if key in labels), None)


class LabelledFolder(Source):
    """Images that lie in one folder, and a file that says of which class each is.

    They are numbered as if they lay in class folders. Its classes are all those of the file. Raises
    DataError for an image of unknown class.
    """

    def __init__(self, root: str | Path, path: Path) -> None:
        self.root = str(root)
        labels = read(path)
        if not os.path.isdir(self.root):
            raise DataError(f"{self.root}: no such data folder")
        names = sorted(
            entry.name
            for entry in os.scandir(self.root)
            if entry.name.lower().endswith(image_extensions()) and not entry.is_dir()
        )
        if not names:
            raise DataError(f"{self.root}: holds no images; {path} labels those of one folder")
        classes = [label_of(name, labels) for name in names]
        unknown = [name for name, label in zip(names, classes) if label is None]
        others = [
            name
            for name, label in zip(names, classes)
            if ilsvrc.added_synset(name) not in (None, label)
        ]
        for unfit, fault in ((unknown, "not in"), (others, "of other classes in")):
            if unfit:
                raise DataError(
                    f"{self.root}: {len(unfit):,} of its {len(names):,} images are {fault} {path}: "
                    f"{enumeration(unfit)}"
                )
        self.classes = sorted(set(labels.values()))
        order = sorted(range(len(names)), key=lambda i: (classes[i], names[i]))
        self._names = [names[i] for i in order]
        counts = Counter(classes)
        self.starts = [0, *accumulate(counts[label] for label in self.classes)]
        if len(labels) > len(names):
            self.remarks = [
                f"{self.root}: {len(labels) - len(names):,} of the {len(labels):,} images in "
                f"{path} are not there"
            ]

    def read(self, index: int) -> tuple[bytes, int]:
        return read_image(self.name(index)), self.label(index)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._names[index])
