"""The standard streams of a program, whatever the shell has made of them.

One that is closed (`>&-`, `<&-`) is empty or takes everything, as /dev/null does, and its number is
given to no file. Text that an encoding cannot show is escaped. What is said on stderr may be lost;
stdout is the program's result, so that its loss ends the program, unless that works for files.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class OutputLostError(Exception):
    """Standard output that nobody reads any more, or that cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.errno, self.strerror = error.errno, error.strerror


class _Output(io.FileIO):
    """A descriptor for output whose first error is raised, if it `is_vital`, and no other."""

    def __init__(self, number: int, is_vital: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._is_vital = is_vital

    def write(self, content: bytes | memoryview) -> int | None:
        try:
            return super().write(content)
        except OSError as error:
            if self._is_vital:
                self._is_vital = False
                raise OutputLostError(error) from None
            return memoryview(content).nbytes


@contextmanager
def guarded(outlives_output: bool) -> Iterator[None]:
    """Make the streams fit to use, and flush them at the end. Raises OutputLostError.

    Names of classes and files may hold any letter, and bytes that are none; a terminal or the log
    of a cluster may be ASCII.
    """
    _take_closed_numbers()
    before = sys.stdin, sys.stdout, sys.stderr
    with open(os.devnull, "r+") as nothing:
        sys.stdin = sys.stdin or nothing
        sys.stdout = _fit(sys.stdout or nothing, is_vital=not outlives_output)
        sys.stderr = _fit(sys.stderr or nothing, is_vital=False)
        try:
            yield
        finally:
            try:
                sys.stderr.flush()
                sys.stdout.flush()
            finally:
                sys.stdin, sys.stdout, sys.stderr = before


def _take_closed_numbers() -> None:
    """Have 0, 1 and 2 be open, so that no file gets one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free one


def _fit(stream: TextIO, is_vital: bool) -> TextIO:
    """Return a stream that takes any text, and whose errors are those of `_Output`."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO):
        return stream
    own = _Output(raw.fileno(), is_vital)
    return io.TextIOWrapper(
        own if raw is stream.buffer else io.BufferedWriter(own),
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
