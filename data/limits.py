"""Limits of the system that worker processes meet: open files, and how long a socket's path is."""

from __future__ import annotations

import os
import resource
import tempfile
from multiprocessing import util

from data.errors import WorkerError

ENOUGH = 65_536  # files; some systems allow a billion, and some programs try to close them all
FILES_A_WORKER = 6  # pipes, and batches on their way: five were seen
SPARE_FILES = 24  # that are opened now and then
LONGEST_SOCKET = 103  # bytes of a path: macOS; Linux has four more
SOCKET = "/pymp-12345678/listener-12345678"  # multiprocessing's, below TMPDIR
WORKERS = "the number of workers (data.workers, --workers)"
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def raise_open_files() -> int:
    """Raise the number of files that may be open as far as this process may; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return ENOUGH if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # macOS says "infinite" and means something else
        return soft
    return most


def check_open_files(processes: int, later: int = 0) -> None:
    """Raise WorkerError unless this process may have open what so many of its own will need.

    later: how many will be started beside them.
    """
    needed = len(os.listdir("/dev/fd")) + FILES_A_WORKER * (processes + later) + SPARE_FILES
    if (allowed := raise_open_files()) < needed:
        both = f", and {later} more beside them," if later else ""
        raise WorkerError(
            f"{processes} worker processes{both} need {needed} open files, and {allowed} are "
            f"allowed: raise that limit (ulimit -n {needed}), or lower {WORKERS}"
        )


def shorten_sockets() -> None:
    """Have the sockets of worker processes lie where their paths are short enough.

    They lie in a private folder, which multiprocessing makes below TMPDIR at first need; where that
    would be too long, it is made now and elsewhere, and worker processes inherit it. Raises
    WorkerError if there is no such place.
    """
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual + SOCKET)) <= LONGEST_SOCKET:
        return
    short = [folder for folder in SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)]
    if not short:
        raise WorkerError(
            f"{usual}: too long a path for the sockets of worker processes: have TMPDIR name a "
            f"folder of at most {LONGEST_SOCKET - len(SOCKET)} bytes, or do without workers"
        )
    tempfile.tempdir = short[0]
    try:
        util.get_temp_dir()
    finally:
        tempfile.tempdir = usual
