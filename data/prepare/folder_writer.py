"""Writer of an archive's images into a folder in ImageFolder layout, whole or not under its name.

A class is written as <class>.partial, flushed to disk with others and renamed; the folder itself
is called <folder>.partial until every class is in and has been compared with the archive. So what
bears its final name is whole, also after a power cut, without a flush for every image.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from data.errors import DataError, enumeration
from data.prepare.imagenet import ArchiveSource
from data.prepare.progress import byte_bar

PARTIAL = ".partial"
FLUSH_BYTES = 1 << 30  # classes are flushed and renamed together once they have so many
MAX_LISTED = 20  # faults in an error message


def write_folder(source: ArchiveSource, folder: Path, workers: int) -> None:
    """Write what is missing of `folder`, with `workers` threads and a progress bar.

    Classes that are whole are kept. Raises DataError, before anything is written, if there is
    anything in the folder that is not of the source.
    """
    partial, present = partial_of(folder), present_folder(folder, source.classes)
    done = [i for i, name in enumerate(source.classes) if (present / name).exists()]
    _compare(source, present, done, workers)
    todo = sorted(set(range(len(source.classes))) - set(done))
    if not todo and present == folder:
        return
    if present == folder:  # a class has been removed since
        folder.rename(partial)
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover)
    _write_classes(source, partial, todo, workers)
    _compare(source, partial, range(len(source.classes)), workers)
    partial.rename(folder)
    os.sync()


def partial_of(folder: Path) -> Path:
    """Name a folder that is not complete yet."""
    return folder.with_name(f"{folder.name}{PARTIAL}")


def present_folder(folder: Path, classes: Sequence[str]) -> Path:
    """Return the folder as it is called now. Raises DataError if it holds anything else."""
    partial = partial_of(folder)
    if folder.exists() and partial.exists():
        raise DataError(f"{folder} and {partial}: both there; remove the one that you do not need")
    present = folder if folder.exists() else partial
    names = set(os.listdir(present)) if present.exists() else set()
    strangers = sorted(names - set(classes) - {f"{name}{PARTIAL}" for name in classes})
    if strangers:
        raise DataError(
            f"{present}: holds other things ({enumeration(strangers)}); name another folder"
        )
    return present


def _write_classes(
    source: ArchiveSource, folder: Path, labels: Sequence[int], workers: int
) -> None:
    """Write, flush and rename the folders of classes, several at a time."""
    stop = threading.Event()
    total = sum(_bytes_of(source, label) for label in labels)
    bar = byte_bar(folder.stem, total)
    with bar, ThreadPoolExecutor(workers) as pool:
        try:
            tasks = [pool.submit(_write_class, source, label, folder, stop) for label in labels]
            unflushed: dict[int, int] = {}  # label -> bytes
            for task in as_completed(tasks):
                label = task.result()
                unflushed[label] = _bytes_of(source, label)
                bar.update(unflushed[label])
                if sum(unflushed.values()) >= FLUSH_BYTES:
                    _flush_and_rename(source, unflushed, folder)
                    unflushed.clear()
            _flush_and_rename(source, unflushed, folder)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _write_class(source: ArchiveSource, label: int, folder: Path, stop: threading.Event) -> int:
    """Write a class under its temporary name, until told to stop; returns its label."""
    target = folder / f"{source.classes[label]}{PARTIAL}"
    target.mkdir()
    # In the archive's order, which disks read fastest.
    for index in sorted(source.images_of(label), key=source.offsets.__getitem__):
        if stop.is_set():
            break
        (target / source.file_name(index)).write_bytes(source.read(index)[0])
    return label


def _flush_and_rename(source: ArchiveSource, labels: Sequence[int], folder: Path) -> None:
    os.sync()
    for label in labels:
        name = source.classes[label]
        (folder / f"{name}{PARTIAL}").rename(folder / name)


def _bytes_of(source: ArchiveSource, label: int) -> int:
    images = source.images_of(label)
    return int(source.sizes[images.start : images.stop].sum())


# ---------------------------------------------------------------------------------- comparing


def _compare(source: ArchiveSource, folder: Path, labels: Sequence[int], workers: int) -> None:
    """Raise DataError unless the folders of classes hold exactly their images, by name and size."""
    with ThreadPoolExecutor(workers) as pool:
        faults = pool.map(lambda label: _faults(source, folder, label), labels)
        bar = tqdm(
            faults,
            f"comparing {folder.name}",
            len(labels),
            unit="class",
            leave=False,
            disable=None,
        )
        listed = [fault for fault in bar if fault]
    if listed:
        if len(listed) > MAX_LISTED:
            listed[MAX_LISTED:] = [f"… and {len(listed) - MAX_LISTED:,} classes more"]
        lines = "".join(f"\n  {line}" for line in listed)
        raise DataError(
            f"{folder}: not what {source.root} holds:{lines}\n"
            f"Move these classes' folders away; the same command then writes them anew."
        )


def _faults(source: ArchiveSource, folder: Path, label: int) -> str:
    """Say how a class's folder differs from the archive; empty if it does not."""
    name = source.classes[label]
    images = source.images_of(label)
    wanted = {source.file_name(i): int(source.sizes[i]) for i in images}
    with os.scandir(folder / name) as entries:
        present = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
    differences = {
        "missing": wanted.keys() - present.keys(),
        "of another size": {
            file for file in wanted if present.get(file, wanted[file]) != wanted[file]
        },
        "extra": present.keys() - wanted.keys(),
    }
    parts = [
        f"{len(files):,} {word} ({enumeration(sorted(files))})"
        for word, files in differences.items()
        if files
    ]
    return f"{name}: {len(wanted):,} images expected, {', '.join(parts)}" if parts else ""
