"""ImageNet (ILSVRC2012) read where it lies, in the three original archives and in their likes.

A tar archive holds its members as they are, and the training archive's members are tar archives
in turn: every image is a range of bytes of the outer file. Reading the headers alone finds them all
(40 s of processor time); nothing is unpacked, and nothing in an archive is executed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.errors import DataError
from data.files import open_regular
from data.ilsvrc import Devkit, Expected, added_synset
from data.label_files import label_of
from data.prepare.listed import ArchiveSource, Listing, listing
from data.prepare.members import Member, check_names, list_members

MAX_LISTED = 20  # classes in an error message
# An image's path in Kaggle's tree, zip and tar; other files there are annotations and tests.
TRAIN_PATH = re.compile(r"(?:.*/)?train/(?P<synset>n[0-9]{8})/(?P<name>(?P=synset)_[0-9]+\.JPEG)")
VAL_PATH = re.compile(r"(?:.*/)?val/(?P<name>ILSVRC2012_val_[0-9]{8}(?:_n[0-9]{8})?\.JPEG)")
PATHS = {"train": TRAIN_PATH, "val": VAL_PATH}


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
    with open_regular(path) as file:
        descriptor = file.fileno()
        parts = list_members(descriptor, 0, os.fstat(descriptor).st_size, str(path))
        check_names(parts, {f"{synset}.tar" for synset in devkit.synsets}.__contains__, str(path))
        part_of = {part.name: part for part in parts}

        def list_class(synset: str) -> Listing:
            part = part_of.get(f"{synset}.tar")
            if part is None:
                return listing([])
            where = f"{path}: {part.name}"
            images = list_members(descriptor, part.offset, part.offset + part.size, where)
            check_names(images, re.compile(rf"{synset}_[0-9]+\.JPEG").fullmatch, where)
            progress(part.size)
            return listing(images)

        with ThreadPoolExecutor(workers) as pool:
            listings = list(pool.map(list_class, devkit.synsets))
    counts = {synset: len(each.names) for synset, each in zip(devkit.synsets, listings)}
    check_counts(path, counts, devkit.train_counts, expected.train_images)
    return ArchiveSource(path, devkit.synsets, listings)


def val_source(path: Path, devkit: Devkit) -> ArchiveSource:
    """Open the validation images, labelled by the development kit.

    Raises DataError if the archive is damaged or does not hold an image for each label.
    """
    with open_regular(path) as file:
        descriptor = file.fileno()
        images = list_members(descriptor, 0, os.fstat(descriptor).st_size, str(path))
    check_names(images, {f"{name}.JPEG" for name in devkit.val_labels}.__contains__, str(path))
    classes: dict[str, list[Member]] = {synset: [] for synset in devkit.synsets}
    for image in images:
        classes[label_of(image.name, devkit.val_labels)].append(image)
    counts = {synset: len(members) for synset, members in classes.items()}
    check_counts(path, counts, Counter(devkit.val_labels.values()), len(devkit.val_labels))
    return ArchiveSource(path, devkit.synsets, [listing(each) for each in classes.values()])


def check_counts(
    path: Path, counts: Mapping[str, int], wanted: Mapping[str, int], total: int
) -> None:
    """Raise DataError that says which classes have too few or too many images.

    `wanted`: images of each class; of a class that it lacks there may be any number but none.
    """
    differing = [
        f"  {synset}: {count:,} images, {wanted.get(synset, 1):,} expected"
        for synset, count in counts.items()
        if (count != wanted[synset] if synset in wanted else not count)
    ]
    images = sum(counts.values())
    if images == total and all(counts.values()):
        return
    if len(differing) > MAX_LISTED:
        differing[MAX_LISTED:] = [f"  … and {len(differing) - MAX_LISTED:,} classes more"]
    raise DataError(f"{path}: {images:,} images, {total:,} expected", *differing)


def split_of(member: Member) -> str | None:
    """Name the split of which a member of Kaggle's archives is an image; None for another file."""
    return next((split for split, path in PATHS.items() if path.fullmatch(member.name)), None)


def sort_images(
    split: str,
    members: Iterable[Member],
    labels: Mapping[str, str],
    expected: Expected,
    where: Path,
) -> list[Listing]:
    """Sort the images of "train" or "val" that are among some members into their classes.

    A member's name is its path in Kaggle's tree (PATHS); others are left out. `labels`: of the
    validation images. Raises DataError unless the images are those expected.
    """
    classes: dict[str, list[Member]] = {synset: [] for synset in expected.synsets()}
    for member in members:
        match = PATHS[split].fullmatch(member.name)
        if match is None:
            continue
        name = match["name"]
        synset = match["synset"] if split == "train" else label_of(name, labels)
        if synset not in classes or added_synset(name) not in (None, synset):
            raise DataError(f"{where}: holds {member.name!r}, of no class or another: {synset}")
        classes[synset].append(member._replace(name=name))
    for images in classes.values():
        check_names(images, bool, str(where))
    counts = {synset: len(images) for synset, images in classes.items()}
    wanted = Counter(labels.values()) if split == "val" else {}
    check_counts(where, counts, wanted, expected.images(split))
    return [listing(images) for images in classes.values()]
