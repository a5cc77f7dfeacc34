"""Errors that a person can mend; programs print them in one line."""

from __future__ import annotations

from collections.abc import Sequence

from data.names import shown


class UserError(ValueError):
    """Something its user can mend: programs print it in one line, without a traceback."""

    one_rank = False  # True: only the rank that met it knows, and so that rank must speak


class DataError(UserError):
    """Data that cannot be used; the message names the file or folder and what to do."""


class ImageError(DataError):
    """One image that cannot be read or decoded."""

    one_rank = True


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
