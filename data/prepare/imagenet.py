"""ImageNet (ILSVRC2012) read where it lies, in the three original archives.

A tar archive holds its members as they are, and the training archive's members are tar archives
in turn: every image is a range of bytes of the outer file. Reading the headers alone finds them all
(40 s of processor time); nothing is unpacked, and nothing in an archive is executed.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat

from data.base import Source
from data.errors import DataError, ImageError, unreadable
from data.shards.index import BLOCK

DEVKIT_FOLDER = "ILSVRC2012_devkit_t12/data"
META, LABELS = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
BLACKLIST = "ILSVRC2012_validation_blacklist.txt"
MAX_DEVKIT_FILE = 64 << 20  # bytes; the largest has less than 2 MiB
MAX_LISTED = 20  # classes in an error message


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


# md5: torchvision/datasets/imagenet.py; counts: readme.txt of the development kit.
ILSVRC2012 = Expected(
    devkit=Archive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf", None),
    train=Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", 147_897_477_120),
    val=Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", 6_744_924_160),
    classes=1000,
    train_images=1_281_167,
    val_images=50_000,
)


# ---------------------------------------------------------------------------------- devkit


@dataclass(frozen=True)
class Devkit:
    """Labels and counts of the images, as the development kit states them."""

    synsets: list[str]  # WordNet ids in sorted order; an image's label is a position in it
    train_counts: np.ndarray  # int64 [classes]
    val_labels: np.ndarray  # int64 [images], that of ILSVRC2012_val_00000001.JPEG first
    blacklist: bytes | None  # numbers of validation images with unusable boxes, if it has them


def read_devkit(path: Path, expected: Expected) -> Devkit:
    """Read the kit. Raises DataError if it is damaged or not of the images expected."""
    files = _read_files(path)
    for name in (META, LABELS):
        if name not in files:
            raise DataError(f"{path}: holds no {DEVKIT_FOLDER}/{name}")
    ids, synsets, counts = _read_synsets(files[META], f"{path}: {META}")
    if sorted(ids) != list(range(1, expected.classes + 1)) or len(set(synsets)) < len(synsets):
        raise DataError(f"{path}: {META} does not number {expected.classes:,} low-level synsets")
    order = np.argsort(synsets)  # class -> position in the file
    label_of_id = np.empty(expected.classes + 1, np.int64)
    label_of_id[np.array(ids)[order]] = np.arange(expected.classes)

    numbers = files[LABELS].split()
    if len(numbers) != expected.val_images:
        raise DataError(
            f"{path}: {LABELS} has {len(numbers):,} labels; {expected.val_images:,} expected"
        )
    for line, number in enumerate(numbers, 1):
        if not number.isdigit() or not 1 <= int(number) <= expected.classes:
            raise DataError(
                f"{path}: {LABELS}, line {line}: no id from 1 to {expected.classes:,}: "
                f"{number[:20].decode(errors='replace')!r}"
            )
    return Devkit(
        synsets=[synsets[i] for i in order],
        train_counts=np.array(counts, np.int64)[order],
        val_labels=label_of_id[[int(number) for number in numbers]],
        blacklist=files.get(BLACKLIST),
    )


def _read_files(path: Path) -> dict[str, bytes]:
    """Read those of the three files of interest that are there; nothing is extracted."""
    wanted = {f"{DEVKIT_FOLDER}/{name}": name for name in (META, LABELS, BLACKLIST)}
    files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name in wanted and member.isreg() and member.size <= MAX_DEVKIT_FILE:
                    files[wanted[member.name]] = archive.extractfile(member).read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not a whole .tar.gz archive ({error})") from None
    return files


def _read_synsets(content: bytes, where: str) -> tuple[list[int], list[str], list[int]]:
    """Read ILSVRC2012_ID, WordNet id and number of training images of each low-level synset.

    High-level synsets, those with children, label no image.
    """
    try:
        # MATLAB's format holds arrays, no code; function handles and objects stay raw bytes.
        records = loadmat(io.BytesIO(content), squeeze_me=True, variable_names=["synsets"])
        rows = [
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_train_images"]))
            for row in np.atleast_1d(records["synsets"])
            if int(row["num_children"]) == 0
        ]
    except Exception as error:  # its error types are many
        raise DataError(f"{where}: cannot be read ({type(error).__name__}: {error})") from None
    for _, synset, _ in rows:
        if not re.fullmatch(r"n[0-9]{8}", synset):
            raise DataError(f"{where}: not a WordNet id: {synset[:20]!r}")
    ids, synsets, counts = zip(*rows) if rows else ((), (), ())
    return list(ids), list(synsets), list(counts)


# ---------------------------------------------------------------------------------- tar headers


class Member(NamedTuple):
    """A file in a tar archive; offset and size in bytes, in the outermost file."""

    name: str
    offset: int
    size: int


def list_members(descriptor: int, start: int, end: int, where: str) -> list[Member]:
    """List the members of the tar archive in bytes [start, end) of an open file.

    Stricter than tarfile, which takes a damaged header for the end. Raises DataError that names
    `where` for an archive that is damaged or cut off, or holds anything but plain files.
    """
    members = []
    position = start
    while True:
        header = os.pread(descriptor, max(0, min(BLOCK, end - position)), position)
        if header == bytes(BLOCK):  # the archive's end
            return members
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(
                f"{where}: damaged or cut off, no tar header at byte {position - start:,} ({error})"
            ) from None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DataError(f"{where}: holds {info.name!r}, which is no plain file")
        member = Member(info.name, position + BLOCK, info.size)
        if not 0 <= member.size <= end - member.offset:
            raise DataError(f"{where}: damaged or cut off within {member.name!r}")
        members.append(member)
        position = member.offset + -(-member.size // BLOCK) * BLOCK


def _check_names(members: Iterable[Member], is_known: Callable[[str], object], where: str) -> None:
    """Raise DataError for a member of an unknown name, thus for any path, or two of the same."""
    seen = set()
    for member in members:
        if not is_known(member.name):
            raise DataError(f"{where}: holds {member.name!r}, which is not of ILSVRC2012")
        if member.name in seen:
            raise DataError(f"{where}: holds {member.name!r} twice")
        seen.add(member.name)


# ---------------------------------------------------------------------------------- images


class Listing(NamedTuple):
    """A class's images in the order of their names: bytes, int64 and int64, each [images]."""

    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


class ArchiveSource(Source):
    """The images in an archive, in ImageFolder's order.

    Takes 40 bytes of memory an image and keeps no file open: threads and processes may share
    it. `names`, `offsets` and `sizes` are as in `Listing`.
    """

    def __init__(self, path: Path, classes: list[str], listings: Sequence[Listing]) -> None:
        """`listings`: one for each class."""
        self.root, self.classes = os.fspath(path), classes
        self.names, self.offsets, self.sizes = map(np.concatenate, zip(*listings))
        self.starts = np.cumsum([0, *(len(listing.names) for listing in listings)]).tolist()

    def read(self, index: int) -> tuple[bytes, int]:
        size = int(self.sizes[index])
        try:
            with open(self.root, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, int(self.offsets[index]))
        except OSError as error:
            raise unreadable(self.name(index), error) from None
        if len(content) != size:
            raise ImageError(f"{self.name(index)}: the archive has been cut off")
        return content, self.label(index)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.classes[self.label(index)], self.file_name(index))

    def file_name(self, index: int) -> str:
        """Name an image within its class."""
        return self.names[index].decode("ascii")


def train_source(
    path: Path,
    devkit: Devkit,
    expected: Expected,
    workers: int,
    progress: Callable[[int], object],
) -> ArchiveSource:
    """Open the training images; `workers` threads read headers, `progress` gets the bytes done.

    Raises DataError if the archive or one within it is damaged or does not hold what is expected.
    """
    with open(path, "rb") as file:
        descriptor = file.fileno()
        parts = list_members(descriptor, 0, os.fstat(descriptor).st_size, str(path))
        _check_names(parts, {f"{synset}.tar" for synset in devkit.synsets}.__contains__, str(path))
        part_of = {part.name: part for part in parts}

        def list_class(synset: str) -> Listing:
            part = part_of.get(f"{synset}.tar")
            if part is None:
                return _listing([])
            where = f"{path}: {part.name}"
            images = list_members(descriptor, part.offset, part.offset + part.size, where)
            _check_names(images, re.compile(rf"{synset}_[0-9]+\.JPEG").fullmatch, where)
            progress(part.size)
            return _listing(images)

        with ThreadPoolExecutor(workers) as pool:
            listings = list(pool.map(list_class, devkit.synsets))
    counts = np.array([len(listing.names) for listing in listings])
    if counts.sum() != expected.train_images or not counts.all():
        _refuse_counts(path, counts, devkit.train_counts, devkit.synsets, expected.train_images)
    return ArchiveSource(path, devkit.synsets, listings)


def val_source(path: Path, devkit: Devkit) -> ArchiveSource:
    """Open the validation images, labelled by the development kit.

    Raises DataError if the archive is damaged or does not hold an image for each label.
    """
    with open(path, "rb") as file:
        descriptor = file.fileno()
        images = list_members(descriptor, 0, os.fstat(descriptor).st_size, str(path))
    labels = {
        f"ILSVRC2012_val_{i:08d}.JPEG": int(label) for i, label in enumerate(devkit.val_labels, 1)
    }
    _check_names(images, labels.__contains__, str(path))
    classes: list[list[Member]] = [[] for _ in devkit.synsets]
    for image in images:
        classes[labels[image.name]].append(image)
    if len(images) != len(labels):
        wanted = np.bincount(devkit.val_labels, minlength=len(classes))
        counts = np.array([len(members) for members in classes])
        _refuse_counts(path, counts, wanted, devkit.synsets, len(labels))
    return ArchiveSource(path, devkit.synsets, [_listing(members) for members in classes])


def _listing(members: Sequence[Member]) -> Listing:
    members = sorted(members)
    return Listing(
        np.array([member.name for member in members], np.bytes_),
        np.array([member.offset for member in members], np.int64),
        np.array([member.size for member in members], np.int64),
    )


def _refuse_counts(
    path: Path, counts: np.ndarray, wanted: np.ndarray, synsets: Sequence[str], total: int
) -> None:
    """Raise DataError that says which classes have too few or too many images."""
    differing = [
        f"  {synset}: {count:,} images, {number:,} expected"
        for synset, count, number in zip(synsets, counts.tolist(), wanted.tolist())
        if count != number
    ]
    if len(differing) > MAX_LISTED:
        differing[MAX_LISTED:] = [f"  … and {len(differing) - MAX_LISTED:,} classes more"]
    raise DataError("\n".join([f"{path}: {counts.sum():,} images, {total:,} expected", *differing]))
