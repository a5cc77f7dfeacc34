"""Errors that a person can mend; programs print them in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from data.names import shown


class UserError(ValueError):
    """Something its user can mend, in a line or several: programs print it without a traceback.

    Each argument is a line.
    """

    one_rank = False  # True: only the rank that met it knows, and so that rank must speak

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class DataError(UserError):
    """Data that cannot be used; the message names the file or folder and what to do."""


class ImageError(DataError):
    """One image that cannot be read or decoded."""

    one_rank = True


def unreadable(name: str, error: OSError) -> DataError:
    """Make the error for an image that cannot be read.

    An ImageError, unless the system has run out of something: that says nothing about the image,
    for which none may stand in.
    """
    reason = f"{name}: cannot be read ({error.strerror})"
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return StorageError(f"{reason}; this is the system's limit, not the image's fault")
    return ImageError(reason)


class StorageError(DataError):
    """Storage that does not answer, or holds other objects than were indexed.

    Nothing stands in for these images: they will be there again as soon as it answers.
    """

    one_rank = True


class WorkerError(DataError):
    """A loader process that died or hangs."""

    one_rank = True


def enumeration(names: Sequence[str]) -> str:
    """List the first three of some names, for a message."""
    return ", ".join(map(shown, names[:3])) + (", …" if len(names) > 3 else "")


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise ValueError for a panic of a library in Rust (safetensors), which is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None
