"""Pictures that a command line names, as a network sees them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Queue
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.folders import images_below
from data.transforms import DecodeError, EvalView, decode, shown
from data.workers import default_workers


class Picture(NamedTuple):
    """A picture as the network sees it, or why it cannot."""

    path: str
    pixels: np.ndarray | None  # uint8 [size, size, 3]
    error: str = ""


def named(names: Iterable[str]) -> Iterator[Picture | str]:
    """Yield the files that a command line names; a folder's are sorted, "-" reads more names."""
    for name in names:
        if name == "-":
            # Not sys.stdin, which Python cannot close at its end while a thread waits for a line.
            with open(0, "rb", closefd=False) as lines:
                paths = (os.fsdecode(line.removesuffix(b"\n")) for line in lines)
                yield from named(path for path in paths if path)
        elif os.path.isdir(name):
            try:
                yield from (os.path.join(name, path) for path in images_below(name))
            except DataError as error:
                yield Picture(name, None, str(error).removeprefix(f"{name}: "))
        else:
            yield name


def see(path: Picture | str, view: EvalView) -> Picture:
    """Read, decode and scale a picture, unless it is known to be unusable."""
    if isinstance(path, Picture):
        return path
    try:
        with open(path, "rb") as file:
            pixels = decode(file.read())
    except OSError as error:
        return Picture(path, None, f"cannot be read ({error.strerror})")
    except (DecodeError, ValueError) as error:  # a path may hold what none can
        return Picture(path, None, " ".join(str(error).split()))
    return Picture(path, shown(pixels, view))


@contextmanager
def read_ahead(
    paths: Iterable[Picture | str], view: EvalView, depth: int
) -> Iterator[Iterator[Picture]]:
    """Give the pictures in order, up to `depth` of them made ready by threads ahead of time.

    A thread of its own takes the paths, so that a slow list of them delays no picture that is
    known.
    """
    pool = ThreadPoolExecutor(default_workers())
    waiting: Queue[Future[Picture] | None] = Queue(depth)

    def submit() -> None:
        try:
            with suppress(RuntimeError):  # of the pool, once it has been shut down
                for path in paths:
                    waiting.put(pool.submit(see, path, view))
        finally:
            waiting.put(None)

    threading.Thread(target=submit, daemon=True).start()
    try:
        yield (future.result() for future in iter(waiting.get, None))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
