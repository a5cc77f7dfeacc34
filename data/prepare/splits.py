"""Images of one's own, split by class into training and validation images."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from io import TextIOWrapper
from itertools import count
from pathlib import Path

from data.errors import DataError, enumeration
from data.files import open_regular
from data.image_formats import image_extensions
from data.prepare.public_sets import Entry
from data.sources import FolderSource

SPLITS = {  # words in the names of files or their folders -> split
    "train": "train",
    "training": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}


def files_by_split(path: Path, ending: str, unnamed: str | None = "train") -> dict[str, list[Path]]:
    """Find the files of an ending in a folder and below it by split: "train", "val" or "test".

    unnamed: of files whose names and folders name no split; None: they are left out. `path` may be
    a single file, too.
    """
    files = sorted(path.rglob(f"*{ending}")) if path.is_dir() else [path]
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        if file.suffix == ending:
            own = file.name if file == path else str(file.relative_to(path))
            words = re.split(r"[^a-z]+", own.lower())
            named = [SPLITS[word] for word in words if word in SPLITS]
            splits.setdefault(named[-1] if named else unnamed, []).append(file)
    splits.pop(None, None)
    return splits


def held_out(names: Sequence[str], fraction: float, seed: int, where: object) -> set[str]:
    """Choose a share of a class's images, at least one of them and never all, for validation.

    Names are ranked by a hash of the seed and themselves, so that the choice is the same wherever
    and whenever it is made. Raises DataError, naming `where`, for a single image.
    """
    if len(names) == 1:
        raise DataError(f"{where}: one image cannot be in both train and val")
    most = min(max(1, round(fraction * len(names))), len(names) - 1)
    return set(sorted(names, key=lambda name: _rank(seed, name))[:most])


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def entries_of_class(
    paths: dict[str, Path], fraction: float, seed: int, where: object
) -> list[Entry]:
    """Split a class's files, by their names in the set. Raises DataError as `held_out`."""
    val = held_out(list(paths), fraction, seed, where)
    return [
        Entry(f"{'val' if name in val else 'train'}/{name}", path) for name, path in paths.items()
    ]


def split_folder(
    root: Path, fraction: float, seed: int, say: Callable[[str], None] = lambda line: None
) -> list[Entry]:
    """Hold out a share of each class of a folder. `say` gets what was noticed. Raises DataError."""
    source = FolderSource(root)
    entries: list[Entry] = []
    for label, name in enumerate(source.classes):
        paths = [Path(source.name(i)) for i in source.images_of(label)]
        named = {path.relative_to(source.root).as_posix(): path for path in paths}
        entries += entries_of_class(named, fraction, seed, root / name)
    for line in source.remarks:
        say(f"note: {line}")
    return entries


def split_table(
    table: Path, root: Path, columns: tuple[str, str], fraction: float, seed: int
) -> list[Entry]:
    """Hold out a share of each class of the images that a CSV file lists.

    columns: of paths, which are relative to `root`, and of class names. Raises DataError.
    """
    try:
        with TextIOWrapper(open_regular(table), "utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{table}: has no column {missing[0]!r}, only "
                    f"{', '.join(reader.fieldnames or ())}; name yours by --path-column and "
                    "--label-column"
                )
            rows = [(row[columns[0]] or "", row[columns[1]] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error})") from None
    paths = [path for path, _ in rows]
    for fault, unfit in (
        (f"not below {root}", [path for path in paths if not _is_below(root, path)]),
        ("no images", [path for path in paths if not path.lower().endswith(image_extensions())]),
        ("listed twice", [path for path, times in Counter(paths).items() if times > 1]),
    ):
        if unfit:
            raise DataError(f"{table}: {len(unfit):,} files are {fault}: {enumeration(unfit)}")
    folders = folder_names({label for _, label in rows}, table)
    classes: dict[str, list[str]] = {}
    for path, label in rows:
        classes.setdefault(folders[label], []).append(path)
    entries: list[Entry] = []
    for label, paths in sorted(classes.items()):
        names = [f"{label}/{name}" for name in file_names(paths, count())]
        named = {name: root / path for name, path in zip(names, paths)}
        entries += entries_of_class(named, fraction, seed, f"{table}: {label}")
    return entries


def _is_below(root: Path, path: str) -> bool:
    """True for a file in a folder or below it, however its path is written."""
    inside = Path(os.path.normpath(root / path)).is_relative_to(os.path.normpath(root))
    return inside and (root / path).is_file()


def folder_names(labels: Iterable[str], where: object) -> dict[str, str]:
    """Make a folder's name of the name of each class.

    Raises DataError for a class of which none can be made, and for two that would share one.
    """
    folders: dict[str, str] = {}
    for label in labels:
        name = label.replace("/", "_").replace("\0", "_").strip()
        if name in ("", ".", "..") or len(os.fsencode(name)) > 255:
            raise DataError(f"{where}: {label!r} cannot be the name of a class's folder")
        folders[label] = name
    counts = Counter(folders.values())
    if shared := sorted(label for label, name in folders.items() if counts[name] > 1):
        raise DataError(f"{where}: classes would share a folder: {', '.join(map(repr, shared))}")
    return folders


def file_names(paths: Sequence[str], numbers: Iterable[int]) -> list[str]:
    """Name files that are to lie in one folder as they are called, where two are called the same
    with their numbers before that."""
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) < len(names):
        return [f"{number:07d}-{name}" for number, name in zip(numbers, names)]
    return names
