"""Pictures that a command line names, as a network sees them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from io import BufferedReader
from itertools import islice
from queue import Queue
from typing import NamedTuple

import numpy as np

from data import workers
from data.errors import DataError
from data.files import read_regular
from data.folders import images_below
from data.image_formats import MAX_BYTES, begins_an_image
from data.transforms import DecodeError, EvalView, as_evaluated, decode

STANDARD_INPUT = "-"
HEAD = 1 << 13  # bytes by which a list is known from a picture
LONGEST_NAME = 1 << 16  # bytes in a list; systems have paths of 4,096


class Picture(NamedTuple):
    """A picture as the network sees it, or why it cannot."""

    path: str
    pixels: np.ndarray | None  # uint8 [size, size, 3]
    error: str = ""


class Encoded(NamedTuple):
    """A picture that has been read, and is still to be decoded."""

    path: str
    content: bytes


Unseen = str | Encoded | Picture  # a file's name, its content, or why there is neither


def named(names: Iterable[str]) -> Iterator[Unseen]:
    """Yield the pictures that a command line names; a folder's files are sorted.

    "-" is standard input: a picture, or a list of files and folders as `listed` reads it.
    """
    for name in names:
        yield from _standard_input() if name == STANDARD_INPUT else _below(name)


def listed(path: str) -> Iterator[Unseen]:
    """Yield the pictures that a file names, or standard input for "-": one a line, or each ended
    by NUL, as `find -print0` does."""
    # Not sys.stdin, which Python cannot close at its end while a thread waits for a line.
    is_standard_input = path == STANDARD_INPUT
    try:
        with open(0 if is_standard_input else path, "rb", closefd=not is_standard_input) as stream:
            yield from _list(path, stream)
    except OSError as error:
        yield Picture(path, None, f"cannot be read ({error.strerror})")


def _standard_input() -> Iterator[Unseen]:
    with open(0, "rb", closefd=False) as stream:
        head = stream.peek(HEAD)
        if _is_image(head) and not _begins_with_a_name(head):
            parts = list(islice(iter(lambda: stream.read(HEAD), b""), MAX_BYTES // HEAD + 1))
            if sum(map(len, parts)) > MAX_BYTES:
                yield Picture(STANDARD_INPUT, None, f"cannot be read (over {MAX_BYTES:,} bytes)")
            else:
                yield Encoded(STANDARD_INPUT, b"".join(parts))
        else:
            yield from _list(STANDARD_INPUT, stream)


def _list(path: str, stream: BufferedReader) -> Iterator[Unseen]:
    """Yield what a list names as soon as it is read. A name in a list is never standard input."""
    head = stream.peek(HEAD)
    if not head:
        yield Picture(path, None, "is empty")
    if _has_controls(head) and not _begins_with_a_name(head):
        yield Picture(path, None, "is neither a picture nor a list of their names")
        return
    end, rest = _end_of_names(head), b""
    while chunk := stream.read1(HEAD):
        *whole, rest = (rest + chunk).split(end)
        for name in filter(None, whole):
            yield from _below(os.fsdecode(name))
        if len(rest) > LONGEST_NAME:
            yield Picture(path, None, f"holds a name of over {LONGEST_NAME:,} bytes")
            return
    if rest:
        yield from _below(os.fsdecode(rest))


def _end_of_names(head: bytes) -> bytes:
    return b"\0" if b"\0" in head else b"\n"


def _has_controls(head: bytes) -> bool:
    """True for control characters, which a name may hold but hardly ever does."""
    return any(byte < 32 and byte not in b"\t\n\r" for byte in head)


def _begins_with_a_name(head: bytes) -> bool:
    """True for the beginning of a list whose first name is there."""
    return os.path.exists(os.fsdecode(head.split(_end_of_names(head), 1)[0]))


def _is_image(head: bytes) -> bool:
    """True for the beginning of a file that Pillow would try to decode, and that is no text."""
    return _has_controls(head[:64]) and begins_an_image(head)


def _below(name: str) -> Iterator[Unseen]:
    """Yield a file's name, or those of the images below a folder."""
    if not os.path.isdir(name):
        yield name
        return
    try:
        yield from (os.path.join(name, path) for path in images_below(name))
    except DataError as error:
        yield Picture(name, None, str(error).removeprefix(f"{name}: "))


def see(picture: Unseen, view: EvalView) -> Picture:
    """Read, decode and scale a picture, unless it is known to be unusable."""
    if isinstance(picture, Picture):
        return picture
    path = picture if isinstance(picture, str) else picture.path
    try:
        pixels = decode(_content(picture))
    except OSError as error:
        return Picture(path, None, f"cannot be read ({error.strerror})")
    except (DecodeError, ValueError) as error:  # a path may hold what none can
        return Picture(path, None, " ".join(str(error).split()))
    return Picture(path, as_evaluated(pixels, view))


def _content(picture: str | Encoded) -> bytes:
    if isinstance(picture, Encoded):
        return picture.content
    return read_regular(picture, MAX_BYTES)


@contextmanager
def read_ahead(paths: Iterable[Unseen], view: EvalView, depth: int) -> Iterator[Iterator[Picture]]:
    """Give the pictures in order, up to `depth` of them made ready by threads ahead of time.

    A thread of its own takes the paths, so that a slow list of them delays no picture that is
    known. A line says which picture is waited for, if that takes long.
    """
    pool = ThreadPoolExecutor(workers.default_workers())
    waiting: Queue[tuple[str, Future[Picture]] | None] = Queue(depth)

    def submit() -> None:
        fault: Future[Picture] = Future()
        try:
            with suppress(RuntimeError):  # of the pool, once it has been shut down
                for unseen in paths:
                    path = unseen if isinstance(unseen, str) else unseen.path
                    waiting.put((path, pool.submit(see, unseen, view)))
        except Exception as error:
            fault.set_exception(error)
            waiting.put(("", fault))
        finally:
            waiting.put(None)

    threading.Thread(target=submit, daemon=True).start()
    try:
        yield (_arrived(*each) for each in iter(waiting.get, None))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _arrived(path: str, coming: Future[Picture]) -> Picture:
    wait([coming], workers.SLOW_S)
    if not coming.done():
        workers.say_waiting(workers.SLOW_S, [path])
    return coming.result()
