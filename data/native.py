"""Python functions over arrays, compiled to machine code by Numba when they are first called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba

Function = TypeVar("Function", bound=Callable)


def native(function: Function) -> Function:
    """Compile with C's rules for division; keep the result on disk where that is possible.

    The next process then loads it, in milliseconds. No fast mathematics: results are the source's.
    """
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # neither the source's folder nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy")(function)
