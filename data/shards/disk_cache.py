"""Images of an object store on a local disk: bounded, and shared by all processes of a host.

Any process may be killed at any time. A file gets its name when it is whole; that its content is
right is for the reader to check, as a disk may damage it later.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ELOOP

from data.errors import DataError
from data.files import open_own, open_regular

FOLDERS = 64  # each with its lock and its part of the room, so that processes seldom meet
SECTOR = 4096  # bytes; file systems give out no less
AMPLE = 0.9  # of its room is what a folder keeps when it has to remove something
RECENT_S = 3600  # a use is noted if none was for so long
_NAME = re.compile(r"[0-9a-f]{16}-\d+")
_TEMPORARY = ".new"  # one for each folder: whoever writes holds the lock


class CacheError(DataError):
    """A cache that cannot be used here."""


class DiskCache:
    """Contents of one data set by number, in a folder that other data sets may use, too.

    Where there is no more room, the least recently used of other data sets make way, and when none
    of these are left nothing is added. A data set's own contents stay: each epoch asks for all of
    them in a new order, and of a share f that is kept, f is found again. If they made way for each
    other, only f + (1-f) ln(1-f) would be: of a half, 15 %.

    Raises CacheError if the folder cannot be written.
    """

    def __init__(self, root: str, limit: int, data_set: str) -> None:
        """`limit`: bytes; `data_set`: 16 hexadecimal digits."""
        self.root, self.data_set = root, data_set
        self.room = limit // FOLDERS
        self._full: set[str] = set()
        try:
            for number in range(FOLDERS):
                folder = self._folder(number)
                os.makedirs(folder, exist_ok=True)
                if os.path.islink(folder):
                    raise OSError(ELOOP, f"{folder} is a symbolic link")
                with _locked(folder):
                    pass
        except OSError as error:
            raise CacheError(
                f"{self.root}: images cannot be kept here ({error.strerror}); set data.cache_dir "
                "to a folder of a local disk that may be written, or to null"
            ) from None

    def get(self, number: int) -> bytes | None:
        """Read a content as it lies on the disk, perhaps damaged; None if there is none."""
        try:
            with open_regular(self._path(number)) as file:
                status = os.fstat(file.fileno())
                if status.st_size > self.room:
                    return None
                content = file.read()
                if time.time() - status.st_mtime > RECENT_S:
                    os.utime(file.fileno())
                return content
        except OSError:  # as good as not there: it is fetched again
            return None

    def has(self, number: int) -> bool:
        return os.path.exists(self._path(number))

    def put(self, number: int, content: bytes) -> None:
        """Keep a content if there is room. Raises OSError if the disk refuses it."""
        folder, size = self._folder(number), _on_disk(len(content))
        if folder in self._full:
            return
        with _locked(folder) as tally:
            used = _used(tally, folder)
            if used + size > self.room:
                used = self._make_room(folder, size)
            if used + size > self.room:
                self._full.add(folder)
                return
            # Before the file: if this process is killed in between, it is too high until the
            # folder is counted again, and never too low.
            os.pwrite(tally, b"%020d" % (used + size), 0)
            temporary = os.path.join(folder, _TEMPORARY)
            try:
                with suppress(FileNotFoundError):  # of a process that was killed, or a link
                    os.unlink(temporary)
                with open(temporary, "xb") as file:
                    file.write(content)
                os.replace(temporary, self._path(number))
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary)
                raise

    def discard(self, number: int) -> None:
        """Remove a content that is not right."""
        with suppress(OSError), _locked(self._folder(number)):
            os.unlink(self._path(number))

    def _make_room(self, folder: str, size: int) -> int:
        """Count a folder anew, and let other data sets' files make way for `size` bytes.

        Returns the bytes that are left. The lock is held.
        """
        used, others = 0, []
        for entry in _contents(folder):
            status = entry.stat(follow_symlinks=False)
            used += _on_disk(status.st_size)
            if not entry.name.startswith(self.data_set):
                others.append((status.st_mtime, _on_disk(status.st_size), entry.path))
        if used + size <= self.room:
            return used
        for _, bytes_there, path in sorted(others):
            if used + size <= AMPLE * self.room:
                break
            os.unlink(path)
            used -= bytes_there
        return used

    def _folder(self, number: int) -> str:
        return os.path.join(self.root, f"{number % FOLDERS:02d}")

    def _path(self, number: int) -> str:
        return os.path.join(self._folder(number), f"{self.data_set}-{number}")


def size_of(root: str) -> int:
    """Add up the bytes that a cache takes, as noted in its folders."""
    size = 0
    for number in range(FOLDERS):
        with suppress(OSError, ValueError), open_regular(f"{root}/{number:02d}/.tally") as tally:
            size += int(tally.read(32))
    return size


@contextmanager
def _locked(folder: str) -> Iterator[int]:
    """Open and lock the file with the tally of a folder's bytes; a process that is killed lets go
    of it."""
    # Opened each time: a descriptor that was inherited shares its lock with the parent.
    with open_own(os.path.join(folder, ".tally"), "rb+") as tally:
        fcntl.flock(tally, fcntl.LOCK_EX)
        yield tally.fileno()


def _used(tally: int, folder: str) -> int:
    """Return the bytes in a folder, as noted or else counted."""
    noted = os.pread(tally, 32, 0)
    if noted.isdigit():
        return int(noted)
    return sum(_on_disk(entry.stat(follow_symlinks=False).st_size) for entry in _contents(folder))


def _contents(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if _NAME.fullmatch(entry.name)]


def _on_disk(size: int) -> int:
    """Round the bytes of a file up to whole sectors."""
    return -(-size // SECTOR) * SECTOR
