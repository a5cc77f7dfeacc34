"""The forms in which people have ImageNet, and which of them a path is."""

from __future__ import annotations

import gzip
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

from data import label_files
from data.errors import DataError
from data.ilsvrc import (
    BLACKLIST,
    ILSVRC2012,
    LABELS,
    SYNSET,
    VALIDATION_IMAGE,
    Archive,
    Expected,
    read_devkit,
)
from data.names import shown
from data.prepare import parquet
from data.prepare.imagenet import PATHS, sort_images, split_of, train_source, val_source
from data.prepare.listed import FileSource, ListedSource, Listing, StreamSource, ZipSource
from data.prepare.members import (
    DAMAGED,
    MAX_MEMBER,
    Member,
    Packed,
    files_in_tar,
    files_in_zip,
    refuse,
)
from data.prepare.progress import byte_bar
from data.prepare.splits import files_by_split

DOWNLOADS = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
KAGGLE = "imagenet-object-localization-challenge.zip"
SOLUTION = "LOC_val_solution.csv"
TARS = (".tar", ".tar.gz", ".tgz")
# What a damaged archive raises; the last two for tar's chains of long names.
UNREADABLE = (*DAMAGED, zipfile.BadZipFile, ValueError, RecursionError)
KNOWN = (
    f"the three original archives (from {DOWNLOADS})",
    f"Kaggle's {KAGGLE}, the tar in it, or its tree",
    "Hugging Face's parquet files, a folder or hf:OWNER/NAME",
    "timm's imagenet-1k-wds, a folder of tar shards or hf:OWNER/NAME",
    "a folder of validation images, with --labels FILE",
)


@dataclass(frozen=True)
class Asked:
    """The data set to prepare, and where it comes from."""

    path: Path
    splits: Sequence[str]  # of "train" and "val"
    labels: Path | None  # of the validation images, where the form does not say them itself
    expected: Expected
    workers: int  # threads


@dataclass(frozen=True)
class Form:
    """A form that ImageNet is distributed in."""

    words: str
    splits: Sequence[str]  # that it has
    open: Callable[[str], ListedSource] | None  # the images of a split; raises DataError
    tars: Mapping[str, Sequence[Path]] = field(default_factory=dict)  # shards, to be indexed
    faults: Sequence[str] = ()  # that can be seen at first sight
    archives: Sequence[tuple[Path, Archive]] = ()  # files that are compared with their md5
    notes: Callable[[], Mapping[str, bytes]] = dict  # further files for the result, by name


def recognise(asked: Asked) -> Form:
    """Find out what a path holds. Raises DataError if it is none of the known forms."""
    if not asked.path.exists():
        raise DataError(f"{asked.path}: not there")
    forms = (make(asked) for make in (_originals, _tree, _zip, _tar, _parquet, _shards, _kit))
    form = next(filter(None, forms), None)
    if form is None:
        what = f"{asked.path}: not a form of ImageNet that is known; these are:"
        raise DataError(what, *(f"  {words}" for words in KNOWN))
    for split in asked.splits:
        if split not in form.splits:
            rest = " and ".join(form.splits)
            raise DataError(f"{asked.path}: {form.words} without {split} images; --only {rest}")
    return form


# ---------------------------------------------------------------------------------- archives


def _originals(asked: Asked, known_by: Sequence[str] = ("train", "val")) -> Form | None:
    """The three archives as image-net.org has them: their folder, or one of them.

    known_by: those of which a folder has one; the kit may lie beside images in another form.
    """
    expected, folder = asked.expected, asked.path
    archives = {role: getattr(expected, role) for role in ("devkit", "train", "val")}
    if folder.name in {archive.name for archive in archives.values()}:
        folder = folder.parent
    elif not any((folder / archives[role].name).is_file() for role in known_by):
        return None
    needed = [archives[role] for role in ("devkit", *asked.splits)]
    faults = [fault for archive in needed if (fault := _fault(folder / archive.name, archive))]
    if faults:
        faults.append(f"(The archives come from {DOWNLOADS}, after registration.)")
    devkit = cache(partial(read_devkit, folder / expected.devkit.name, expected))

    def open_split(split: str) -> ListedSource:
        path = folder / archives[split].name
        if split == "val":
            return val_source(path, devkit())
        with byte_bar(f"listing {path.name}", path.stat().st_size) as bar:
            return train_source(path, devkit(), expected, asked.workers, bar.update)

    def notes() -> dict[str, bytes]:
        blacklist = devkit().blacklist if "val" in asked.splits else None
        return {} if blacklist is None else {BLACKLIST: blacklist}

    return Form(
        "the original archives",
        ("train", "val"),
        open_split,
        faults=faults,
        archives=[(folder / archive.name, archive) for archive in needed],
        notes=notes,
    )


def _kit(asked: Asked) -> Form | None:
    """The development kit alone, without images."""
    return _originals(asked, ["devkit"])


def _fault(path: Path, archive: Archive) -> str:
    """Describe what is wrong with an archive at first sight; empty if nothing is."""
    if not path.is_file():
        return f"{path}: not there"
    size = path.stat().st_size
    if archive.size not in (None, size):
        return f"{path}: {size:,} bytes, not {archive.size:,}; download it anew"
    return ""


def _zip(asked: Asked) -> Form | None:
    """Kaggle's download, as it is."""
    path = asked.path / KAGGLE if asked.path.is_dir() else asked.path
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    images: dict[str, list[Packed]] = {split: [] for split in PATHS}
    others = set()
    for packed in files_in_zip(path):
        split = split_of(packed.member)
        if split is None:
            others.add(packed.member.name)
        elif packed.member.size > MAX_MEMBER:
            raise refuse(path, packed.member.name)
        else:
            images[split].append(packed)
    solution = _solution_in(path) if SOLUTION in others else None
    inner = next((name for name in sorted(others) if name.endswith(TARS)), None)
    if inner is not None:
        words = f"Kaggle's zip with {inner} in it"
        return _streamed(asked, words, path, lambda: zipfile.ZipFile(path).open(inner), solution)

    def open_split(split: str) -> ListedSource:
        members = (packed.member for packed in images[split])
        listings = _sorted(asked, split, members, path, solution)
        return ZipSource(path, list(asked.expected.synsets()), listings, images[split])

    return Form("Kaggle's zip", [split for split in images if images[split]], open_split)


def _solution_in(path: Path) -> dict[str, str]:
    """Read the labels of the validation images that lie in the zip. Raises DataError."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(SOLUTION) as file:
            content = file.read(label_files.MAX_FILE)
    except (*UNREADABLE, OSError) as error:
        raise DataError(f"{path}: {SOLUTION} in it is damaged ({error})") from None
    return label_files.parse(content, path / SOLUTION)


def _tar(asked: Asked) -> Form | None:
    """The archive that Kaggle's zip may hold."""
    path = asked.path
    if path.is_dir():
        path = next(path.glob("imagenet_object_localization*.tar.gz"), path)
    if not path.is_file() or not path.name.endswith(TARS):
        return None
    return _streamed(asked, "Kaggle's tar", path, partial(open, path, "rb"))


def _streamed(
    asked: Asked,
    words: str,
    path: Path,
    open_file: Callable[[], BinaryIO],
    solution: Mapping[str, str] | None = None,
) -> Form:
    """A tar archive that is read from beginning to end: once to list it, once to unpack it."""

    def open_stream() -> BinaryIO:
        file = open_file()
        is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return gzip.open(file) if is_packed else file

    @cache
    def images() -> dict[str, list[Member]]:
        members: dict[str, list[Member]] = {split: [] for split in PATHS}
        try:
            with open_stream() as stream:
                for member in files_in_tar(stream, path):
                    if split := split_of(member):
                        members[split].append(member)
                while stream.read(1 << 20):  # to gzip's own checksum, behind the tar's end
                    pass
        except DataError:
            raise
        except UNREADABLE as error:
            raise DataError(f"{path}: not a whole archive ({error}); download it anew") from None
        return members

    def open_split(split: str) -> ListedSource:
        listings = _sorted(asked, split, images()[split], path, solution)
        return StreamSource(path, list(asked.expected.synsets()), listings, open_stream)

    return Form(words, list(PATHS), open_split)


# ---------------------------------------------------------------------------------- folders


def _tree(asked: Asked) -> Form | None:
    """Kaggle's tree as it unpacks: class folders to train on, one folder of validation images."""
    for below in (".", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"):
        base = asked.path / below
        train, val = base / "train", base / "val"
        splits = [
            *(["train"] if _some(train, SYNSET.fullmatch) else []),
            *(["val"] if _some(val, VALIDATION_IMAGE.match) else []),
        ]
        if "val" in asked.splits and _some(val, SYNSET.fullmatch):
            raise DataError(
                f"{val}: holds class folders already, which train.py and validate.py take as they "
                f"are: data.val={val}"
            )
        if splits:
            return _files(asked, "Kaggle's tree", splits, base, val)
    if _some(asked.path, VALIDATION_IMAGE.match):
        return _files(asked, "validation images in one folder", ["val"], asked.path, asked.path)
    return None


def _some(folder: Path, is_wanted: Callable[[str], object]) -> bool:
    return folder.is_dir() and any(is_wanted(entry.name) for entry in os.scandir(folder))


def _files(asked: Asked, words: str, splits: Sequence[str], base: Path, val: Path) -> Form:
    def open_split(split: str) -> ListedSource:
        is_val = split == "val"
        folder = val if is_val else base / "train"
        folders = [folder] if is_val else sorted(filter(Path.is_dir, folder.iterdir()))
        members = (member for each in folders for member in _members(each, split))
        listings = _sorted(asked, split, members, folder)
        return FileSource(folder, list(asked.expected.synsets()), listings, is_val)

    return Form(words, splits, open_split)


def _members(folder: Path, split: str) -> Iterator[Member]:
    """Yield the files of a folder, named as in Kaggle's tree."""
    prefix = "val" if split == "val" else f"train/{folder.name}"
    for entry in os.scandir(folder):
        if entry.is_file():
            yield Member(f"{prefix}/{entry.name}", 0, entry.stat().st_size)


def _parquet(asked: Asked) -> Form | None:
    """Hugging Face's data set, whose file names say the split."""
    files = parquet.files_of(asked.path)
    if not files:
        return None
    return Form(
        "Hugging Face's parquet files",
        [split for split in ("train", "val") if split in files],
        lambda split: parquet.imagenet_source(asked.path, split, files[split], asked.expected),
    )


def _shards(asked: Asked) -> Form | None:
    """Tar shards as WebDataset has them, whose names say the split."""
    tars = files_by_split(asked.path, ".tar", unnamed=None)
    splits = [split for split in ("train", "val") if split in tars]
    return Form("WebDataset's tar shards", splits, None, tars) if splits else None


# ---------------------------------------------------------------------------------- labels


def _sorted(
    asked: Asked,
    split: str,
    members: Iterable[Member],
    where: Path,
    labels: Mapping[str, str] | None = None,
) -> list[Listing]:
    """Sort the images of a split into their classes; `labels`: those that the form itself has."""
    if split == "val" and (labels is None or asked.labels is not None):
        labels = label_files.read(asked.labels or _labels_near(asked.path))
    return sort_images(split, members, labels or {}, asked.expected, where)


def _labels_near(path: Path) -> Path:
    """Find labels of the validation images beside a path or above it. Raises DataError."""
    names = (SOLUTION, "meta.bin", ILSVRC2012.devkit.name, LABELS)
    for file in (folder / name for folder in [path, *path.parents][:5] for name in names):
        if file.is_file():
            print(shown(f"labels of the validation images: {file}"))
            return file
    raise DataError(
        f"{path}: no labels of the validation images there ({', '.join(names)}); --labels FILE"
    )
