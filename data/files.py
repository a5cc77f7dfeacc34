"""Files that are whole whenever they are seen, and opening what others may have put there.

Nothing here waits for a pipe, reads a device, or follows a link to a file that it would change.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from errno import EFBIG, EINVAL, ELOOP
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import DataError

LARGEST_TEXT = 1 << 28  # bytes; no text that is read as a whole comes near
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")  # as `write_atomically` names them


class NotAFileError(OSError):
    """A pipe, a device or a socket under the name of a file."""


# ---------------------------------------------------------------------------------- reading


def open_regular(path: str | Path, limit: int = sys.maxsize) -> BinaryIO:
    """Open a file of at most `limit` bytes for reading.

    Raises OSError that names it, for a pipe or a device, too.
    """
    file = open(path, "rb", opener=_opener)  # noqa: SIM115 - the caller closes it
    if os.fstat(file.fileno()).st_size > limit:
        file.close()
        raise OSError(EFBIG, f"over {limit:,} bytes", str(path))
    return file


def read_text(path: str | Path, limit: int = LARGEST_TEXT) -> str:
    """Read a file of UTF-8. Raises OSError as `read_regular`, and UnicodeDecodeError."""
    return read_regular(path, limit).decode("utf-8-sig")


def read_user_text(path: str | Path) -> str:
    """Read a file of UTF-8 that a user has named. Raises DataError."""
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{path}: cannot be read ({reason})") from None


def read_regular(path: str | Path, limit: int = sys.maxsize) -> bytes:
    """Read a file of at most `limit` bytes, as `open_regular` opens it."""
    with open_regular(path, limit) as file:
        return file.read()


def check_torch_zip(path: Path) -> None:
    """Raise ValueError for a file of torch.save that is damaged, or would grow as it is read.

    torch.load compares no checksums. Its older form is no archive, and is let pass.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed, which torch.save never does")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its members are larger than the file")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} does not match its checksum")


def _opener(path: str | Path, flags: int) -> int:
    """Open what `open` asks for, without waiting. Raises OSError unless it is a regular file."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    kind = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # of a folder `open` says it by itself
        os.close(descriptor)
        raise NotAFileError(EINVAL, "not a regular file", str(path))
    return descriptor


# ---------------------------------------------------------------------------------- writing


def open_own(path: str | Path, mode: str) -> BinaryIO:
    """Open a file that is this program's, unbuffered: "ab" to add to it, "rb+" as it is.

    It is made if it is not there. Raises OSError that names it, also for a link, which may lead to
    a file of somebody else's.
    """
    flags = os.O_CREAT | os.O_NOFOLLOW
    try:
        return open(path, mode, 0, opener=lambda name, others: _opener(name, others | flags))
    except OSError as error:
        if error.errno == ELOOP:
            raise OSError(ELOOP, "is a symbolic link; remove it", str(path)) from None
        raise


def lock(file: BinaryIO, held: str) -> str:
    """Lock a file for this process while it is open; returns why that fails, or "".

    held: the reason where another process has locked it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would live on in loader workers
    except (BlockingIOError, PermissionError):
        return held
    except OSError as error:
        return f"cannot be locked ({error})"
    return ""


FileContent = bytes | str | Callable[[BinaryIO], Any]  # of a file; a function writes it by itself


def write_atomically(path: Path, content: FileContent) -> None:
    """Create or replace a file so that it is never seen half-written, also after a power cut.

    Text is written as UTF-8. Raises OSError that names the file.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        write_through(temporary, content)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what `write_atomically` left when it was killed, from a folder that nobody uses."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink()


def write_through(path: Path, content: FileContent) -> None:
    """Write a new file and have its content reach the disk."""
    with open(path, "xb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the names in a folder reach the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
