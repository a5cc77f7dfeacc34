"""The user's cache, which keeps for the next process what was costly to compile.

Who can write there has his code run here, so nobody else may.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from errno import EPERM
from functools import cache
from pathlib import Path

INDUCTORS = "TORCHINDUCTOR_CACHE_DIR"
ROOM = 32 << 20  # bytes that torch.compile is to find; a full disk would end it
OTHERS_WRITE = 0o022


def folder(name: str, room: int = 0) -> Path | None:
    """Make, if need be, a private folder in the user's cache; returns it.

    room: bytes that must fit. Where there can be no such folder, or others may write to it, a line
    says so, and it is a temporary one; None where there can be neither.
    """
    path = Path("~/.cache")
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path.mkdir(parents=True, exist_ok=True)
        for part in ("irv2", name):
            path /= part
            path.mkdir(mode=0o700, exist_ok=True)
            _make_private(path)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(room))  # nothing else shows a quota
        return path
    except (OSError, RuntimeError) as error:  # no permission, no room; no home directory
        say_not_kept(path, error)
    try:
        return Path(tempfile.mkdtemp(dir=_temporary()))
    except OSError:
        return None


def give_inductor_its_own(version: str) -> None:
    """Have torch.compile, of a version, keep its code here, unless its variable names a folder.

    PyTorch's own choice, a folder in /tmp, is anyone's who makes it first.
    """
    if INDUCTORS not in os.environ and (path := folder(f"inductor-{version}", ROOM)) is not None:
        os.environ[INDUCTORS] = str(path)


def _make_private(path: Path) -> None:
    """Shut a folder to others. Raises PermissionError if they could have written to it."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(EPERM, "it belongs to another user")
    if status.st_mode & OTHERS_WRITE:
        raise PermissionError(EPERM, "others may write there; remove it")
    path.chmod(0o700)


@cache
def _temporary() -> str:
    """Make a private folder that ends with this process."""
    path = tempfile.mkdtemp(prefix="irv2-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def say_not_kept(place: Path, error: Exception) -> None:
    """Say, once for each reason, that the next process will not find compiled code there."""
    reason = getattr(error, "strerror", None) or str(error)
    if reason not in _said:
        _said.add(reason)
        logging.getLogger(__name__).warning(
            "%s: compiled code cannot be kept there (%s), and is compiled at each start",
            place,
            reason,
        )


_said: set[str] = set()
