"""MD5 of large files, computed once: a small file remembers those that were right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data import strict_json
from data.errors import DataError
from data.files import lock, open_own, open_regular
from data.names import shown
from data.prepare.progress import byte_bar

BLOCK = 1 << 20  # bytes read at a time


@contextmanager
def remembered(path: Path) -> Iterator[BinaryIO]:
    """Open the file that remembers, for this process alone; its folder is made if need be.

    Raises DataError where another process has it open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_own(path, "rb+") as file:
        if reason := lock(file, "another process is at work in it"):
            raise DataError(f"{path.parent}: {reason}")
        yield file


def check_md5(path: Path, md5: str, memory: BinaryIO) -> None:
    """Raise DataError unless a file has this MD5; with a progress bar.

    A file of the same path, size and time of change as one that was right is not read again.
    """
    memory.seek(0)
    try:
        known = dict(strict_json.parse(memory.read()))
    except (ValueError, TypeError):  # empty, or cut short by a crash
        known = {}
    status = path.stat()
    stamp = [md5, status.st_size, status.st_mtime_ns]
    name = str(path.absolute())
    if known.get(name) == stamp:
        print(shown(f"{path}: md5 was right"))
        return
    digest = hashlib.md5(usedforsecurity=False)
    with byte_bar(f"md5 of {path.name}", status.st_size) as bar, open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != md5:
        raise DataError(f"{path}: its md5 is {digest.hexdigest()}, not {md5}; download it anew")
    print(shown(f"{path}: md5 is right"))
    memory.seek(0)
    memory.truncate()
    memory.write(json.dumps({**known, name: stamp}).encode())
    memory.flush()
