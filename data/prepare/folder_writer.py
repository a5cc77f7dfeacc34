"""Writer of an archive's images into a folder in ImageFolder layout, whole or not under its name.

A class is written as <class>.partial, flushed to disk with others and renamed; the folder itself
is called <folder>.partial until every class is in and has been compared with the archive. So what
bears its final name is whole, also after a power cut, without a flush for every image.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.errors import DataError, enumeration
from data.files import read_regular, remove_leftovers, write_atomically
from data.prepare.listed import UNKNOWN, FileSource, ListedSource
from data.prepare.progress import byte_bar

PARTIAL = ".partial"
NOTE = ".written"  # how many images of a sequential source are on the disk
FLUSH_IMAGES = 8192  # of a sequential source, some 900 MB
READ_AHEAD = 64  # images of it that wait to be written
FLUSH_BYTES = 1 << 30  # classes are flushed and renamed together once they have so many
MAX_LISTED = 20  # faults in an error message

Put = Callable[[ListedSource, int, Path], object]  # makes the file of an image


def copy_image(source: ListedSource, index: int, path: Path) -> None:
    """Write an image to a file."""
    path.write_bytes(source.read(index)[0])


def link_image(source: FileSource, index: int, path: Path) -> None:
    """Link to an image's file: a hard link, or a symbolic one where that is refused."""
    file = os.path.realpath(source.path(index))
    try:
        os.link(file, path)
    except OSError:  # another file system, or one without links
        path.symlink_to(file)


def write_folder(source: ListedSource, folder: Path, workers: int, put: Put = copy_image) -> None:
    """Write what is missing of `folder`, with `workers` threads and a progress bar.

    Classes that are whole are kept; of a sequential source, whose classes come whole only at its
    end, the images up to a note. `put` makes an image's file. Raises DataError, before anything is
    written, if there is anything in the folder that is not of the source.
    """
    unfinished, present = partial_of(folder), present_folder(folder, source.classes)
    done = [i for i, name in enumerate(source.classes) if (present / name).exists()]
    _compare(source, present, done, workers)
    todo = sorted(set(range(len(source.classes))) - set(done))
    if not todo and present == folder:
        return
    if present == folder:  # a class has been removed since
        folder.rename(unfinished)
    unfinished.mkdir(parents=True, exist_ok=True)
    remove_leftovers(unfinished)
    if source.is_sequential and todo:
        _write_in_order(source, unfinished, todo, workers)
    else:
        for leftover in unfinished.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        _write_classes(source, unfinished, todo, workers, put)
    (unfinished / NOTE).unlink(missing_ok=True)  # what is compared may be taken away again
    _compare(source, unfinished, range(len(source.classes)), workers)
    unfinished.rename(folder)
    os.sync()


def partial_of(folder: Path) -> Path:
    """Name a folder that is not complete yet."""
    return folder.with_name(f"{folder.name}{PARTIAL}")


def present_folder(folder: Path, classes: Sequence[str]) -> Path:
    """Return the folder under its present name. Raises DataError if it holds anything else."""
    unfinished = partial_of(folder)
    if folder.exists() and unfinished.exists():
        raise DataError(
            f"{folder} and {unfinished}: both there; remove the one that you do not need"
        )
    present = folder if folder.exists() else unfinished
    names = set(os.listdir(present)) if present.exists() else set()
    strangers = names - {*classes, *(f"{name}{PARTIAL}" for name in classes)}
    if strangers := sorted(name for name in strangers if name[0] != "."):
        raise DataError(
            f"{present}: holds other things ({enumeration(strangers)}); name another folder"
        )
    return present


def _write_classes(
    source: ListedSource, folder: Path, labels: Sequence[int], workers: int, put: Put
) -> None:
    """Write, flush and rename the folders of classes, several at a time."""
    stop = threading.Event()
    total = sum(_bytes_of(source, label) for label in labels)
    bar = byte_bar(folder.stem, total)
    with bar, ThreadPoolExecutor(workers) as pool:
        try:
            write = partial(_write_class, source, folder=folder, stop=stop, put=put)
            tasks = [pool.submit(write, label) for label in labels]
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


def _write_class(
    source: ListedSource, label: int, folder: Path, stop: threading.Event, put: Put
) -> int:
    """Write a class under its temporary name, until `stop` is set; returns its label."""
    target = folder / f"{source.classes[label]}{PARTIAL}"
    target.mkdir()
    # In the archive's order, which disks read fastest.
    for index in sorted(source.images_of(label), key=source.offsets.__getitem__):
        if stop.is_set():
            break
        put(source, index, target / source.file_name(index))
    return label


def _flush_and_rename(source: ListedSource, labels: Sequence[int], folder: Path) -> None:
    os.sync()
    for label in labels:
        name = source.classes[label]
        (folder / f"{name}{PARTIAL}").rename(folder / name)


def _write_in_order(
    source: ListedSource, folder: Path, labels: Sequence[int], workers: int
) -> None:
    """Write the images of classes as they lie, then rename the folders of all of these classes.

    A note in the folder counts those that are on the disk, and those alone are not written again.
    """
    images = np.concatenate([source.images_of(label) for label in labels])
    order = images[np.argsort(source.offsets[images], kind="stable")].tolist()
    targets = {label: folder / f"{source.classes[label]}{PARTIAL}" for label in labels}
    for target in targets.values():
        target.mkdir(exist_ok=True)
    note = folder / NOTE
    start = written(folder)
    bar = tqdm(desc=folder.stem, total=len(order), initial=start, unit="image", disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        for begin in range(start, len(order), FLUSH_IMAGES):
            part = order[begin : begin + FLUSH_IMAGES]
            for first in range(0, len(part), READ_AHEAD):
                some = part[first : first + READ_AHEAD]
                contents = [source.read(index) for index in some]
                paths = [
                    targets[label] / source.file_name(i) for i, (_, label) in zip(some, contents)
                ]
                list(pool.map(Path.write_bytes, paths, (content for content, _ in contents)))
                bar.update(len(some))
            os.sync()
            write_atomically(note, str(begin + len(part)))
    _flush_and_rename(source, labels, folder)


def written(folder: Path) -> int:
    """Count the images of a sequential source that an unfinished folder has for certain."""
    try:
        return int(read_regular(folder / NOTE))
    except (FileNotFoundError, ValueError):
        return 0


def _bytes_of(source: ListedSource, label: int) -> int:
    images = source.images_of(label)
    return int(source.sizes[images.start : images.stop].sum())


# ---------------------------------------------------------------------------------- comparing


def _compare(source: ListedSource, folder: Path, labels: Sequence[int], workers: int) -> None:
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
        raise DataError(
            f"{folder}: not what {source.root} holds:",
            *(f"  {line}" for line in listed),
            "Move these classes' folders away; the same command then writes them anew.",
        )


def _faults(source: ListedSource, folder: Path, label: int) -> str:
    """Say how a class's folder differs from the archive; empty if it does not."""
    name = source.classes[label]
    images = source.images_of(label)
    wanted = {source.file_name(i): int(source.sizes[i]) for i in images}
    with os.scandir(folder / name) as entries:
        present = {entry.name: _size(entry) for entry in entries}
    differences = {
        "missing": wanted.keys() - present.keys(),
        "of another size": {
            file
            for file, size in wanted.items()
            if size != UNKNOWN and present.get(file, size) != size
        },
        "extra": present.keys() - wanted.keys(),
    }
    parts = [
        f"{len(files):,} {word} ({enumeration(sorted(files))})"
        for word, files in differences.items()
        if files
    ]
    return f"{name}: {len(wanted):,} images expected, {', '.join(parts)}" if parts else ""


def _size(entry: os.DirEntry) -> int:
    """Size of a file, or of what it links to; -1 of a link to nothing."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return -1
