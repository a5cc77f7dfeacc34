#!/usr/bin/env python3
"""Make ImageNet (ILSVRC2012) ready from its original archives.

  python scripts/prepare_imagenet.py --archives DIR --out datasets/imagenet
  python scripts/prepare_imagenet.py --archives DIR --out datasets/imagenet --only val

DIR holds ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from
https://image-net.org/challenges/LSVRC/2012/2012-downloads.php after registration. Written are
OUT/train/<synset>/<name>.JPEG and OUT/val/<synset>/<name>.JPEG, byte for byte as in the archives,
which are read in place: nothing is unpacked twice.

The same command goes on after an interruption: classes that are whole are kept, those that were
being written are written anew. OUT/train and OUT/val have these names once they are complete; until
then they are called train.partial and val.partial. On a complete OUT the command compares every
file's name and size with the archives.

Exit status: 0 complete; 1 something must be mended first; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.folder_writer import enumeration, partial_of, present_folder, write_folder
from data.imagenet import (
    BLACKLIST,
    ILSVRC2012,
    Archive,
    ArchiveSource,
    Devkit,
    Expected,
    read_devkit,
    train_source,
    val_source,
)
from data.sources import DataError
from irv2.checkpoint import write_atomically

DOWNLOADS = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
STATE = ".prepare_imagenet.json"  # archives whose md5 was right: path -> [md5, size, mtime in ns]
HASH_BLOCK = 1 << 20  # bytes
FILE_SYSTEM_SHARE = 1.02  # files end in half-filled blocks of 4 KiB


def prepare(
    archives: Path,
    out: Path,
    splits: Sequence[str],
    expected: Expected,
    check_md5: bool,
    workers: int,
) -> None:
    """Check everything, then write what is missing. Raises DataError or OSError."""
    check_beforehand(archives, out, splits, expected)
    with locked_state(out) as state:

        def check_checksum(archive: Archive) -> None:
            if check_md5:
                check_md5_of(archives / archive.name, archive.md5, state)

        check_checksum(expected.devkit)
        devkit = read_devkit(archives / expected.devkit.name, expected)
        for split in splits:
            present_folder(out / split, devkit.synsets)  # refuses another's
        for split in splits:
            check_checksum(getattr(expected, split))
        sources = {
            split: open_split(split, archives, devkit, expected, workers) for split in splits
        }
        for split, source in sources.items():
            write_folder(source, out / split, workers)
            print(f"{out / split}: {len(source):,} images of {len(source.classes):,} classes")
        if "val" in splits and devkit.blacklist is not None:
            write_atomically(out / BLACKLIST, lambda file: file.write(devkit.blacklist))


def open_split(
    split: str, archives: Path, devkit: Devkit, expected: Expected, workers: int
) -> ArchiveSource:
    """The images of "train" or "val", found in their archive."""
    if split == "val":
        return val_source(archives / expected.val.name, devkit)
    path = archives / expected.train.name
    with progress_bar(f"listing {path.name}", path.stat().st_size) as bar:
        return train_source(path, devkit, expected, workers, bar.update)


def progress_bar(words: str, total: int) -> tqdm:
    """Of bytes, with the time left; none where no terminal shows it."""
    return tqdm(desc=words, total=total, unit="B", unit_scale=True, disable=None)


# ---------------------------------------------------------------------------------- beforehand


def check_beforehand(archives: Path, out: Path, splits: Sequence[str], expected: Expected) -> None:
    """Raise DataError with everything that can be seen at once to stand in the way."""
    needed = [expected.devkit, *(getattr(expected, split) for split in splits)]
    faults = [fault for archive in needed if (fault := archive_fault(archives, archive))]
    if faults:
        faults.append(f"(The archives come from {DOWNLOADS}, after registration.)")
    if fault := content_fault(out) or space_fault(archives, out, splits, expected):
        faults.append(fault)
    if faults:
        raise DataError("\n  ".join(["cannot begin:", *faults]))


def archive_fault(archives: Path, archive: Archive) -> str:
    """What is wrong with an archive at first sight; empty if nothing is."""
    path = archives / archive.name
    if not path.is_file():
        return f"{path}: not there"
    size = path.stat().st_size
    if archive.size not in (None, size):
        return f"{path}: {size:,} bytes, not {archive.size:,}; download it anew"
    return ""


def content_fault(out: Path) -> str:
    """What else is in the way of the result; empty if nothing is."""
    if not out.exists():
        return ""
    if not out.is_dir():
        return f"{out}: not a folder"
    folders = [out / "train", out / "val"]
    known = {STATE, BLACKLIST, *(path.name for path in [*folders, *map(partial_of, folders)])}
    strangers = sorted(set(os.listdir(out)) - known)
    if strangers:
        return f"{out}: holds other things ({enumeration(strangers)}); name a new or empty folder"
    return ""


def space_fault(archives: Path, out: Path, splits: Sequence[str], expected: Expected) -> str:
    """How much room is missing on the disk for what is not written yet; empty if none is."""
    needed = 0.0
    for split in splits:
        folder = out / split if (out / split).exists() else partial_of(out / split)
        names = os.listdir(folder) if folder.is_dir() else []
        missing = 1 - sum("." not in name for name in names) / expected.classes
        archive = archives / getattr(expected, split).name
        needed += missing * (archive.stat().st_size if archive.exists() else 0)
    needed *= FILE_SYSTEM_SHARE
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free >= needed:
        return ""
    return f"{place}: {free / 1e9:,.1f} GB are free, {needed / 1e9:,.1f} GB are needed"


# ---------------------------------------------------------------------------------- checksums


@contextmanager
def locked_state(out: Path) -> Iterator[TextIO]:
    """The file of what is known already, and OUT for this process alone."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / STATE, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise DataError(f"{out}: another prepare_imagenet.py is at work in it") from None
        yield file


def check_md5_of(path: Path, md5: str, state: TextIO) -> None:
    """Raise DataError unless a file has an md5, now or when it was last computed.

    A file of the same size and time of change is not read again.
    """
    state.seek(0)
    try:
        known = dict(json.load(state))
    except (ValueError, TypeError):  # empty, or cut short by a crash
        known = {}
    status = path.stat()
    stamp = [md5, status.st_size, status.st_mtime_ns]
    key = str(path.absolute())
    if known.get(key) == stamp:
        print(f"{path}: md5 was right")
        return
    digest = hashlib.md5(usedforsecurity=False)
    with progress_bar(f"md5 of {path.name}", status.st_size) as bar, open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != md5:
        raise DataError(
            f"{path}: its md5 is {digest.hexdigest()}, not {md5}; download it anew "
            f"(--skip-md5 uses it as it is)"
        )
    print(f"{path}: md5 is right")
    state.truncate(0)
    json.dump({**known, key: stamp}, state)
    state.flush()


def main(arguments: Sequence[str] | None = None, expected: Expected = ILSVRC2012) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archives", type=Path, required=True, metavar="DIR", help="folder of the archives"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make or to complete")
    parser.add_argument(
        "--only",
        choices=["train", "val"],
        help="one split, for which the other's archive is not needed",
    )
    parser.add_argument(
        "--skip-md5", action="store_true", help="use the archives without reading them through"
    )
    parser.add_argument(
        "--workers", type=int, default=8, metavar="N", help="threads that read and write (8)"
    )
    given = parser.parse_args(arguments)
    if given.workers < 1:
        parser.error("--workers: at least 1")
    splits = [given.only] if given.only else ["train", "val"]
    try:
        prepare(given.archives, given.out, splits, expected, not given.skip_md5, given.workers)
    except KeyboardInterrupt:
        print("prepare_imagenet.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except DataError as error:
        print(f"prepare_imagenet.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # no permission, no space
        print(f"prepare_imagenet.py: {error}; once mended, run it again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
