"""Python functions over arrays, compiled to machine code by Numba when they are first called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache, NullCache

from data import user_cache

Function = TypeVar("Function", bound=Callable)


def native(function: Function) -> Function:
    """Compile with C's rules for division; the next process finds the result in the user's cache.

    No fast mathematics: results are the source's.
    """
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    compiled._cache = KeptCode(function, "native")
    return compiled


class KeptCode(NullCache):
    """Machine code of a function in the user's cache; what finds no room there is compiled anew."""

    def __init__(self, function: Callable, name: str) -> None:
        self._function, self._name = function, name

    @cached_property
    def _folder(self) -> Path | None:
        return user_cache.folder(self._name)

    @cached_property
    def _files(self) -> NullCache:
        """Numba's cache in that folder; one that keeps nothing where there can be no files."""
        if self._folder is None:
            return NullCache()
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(self._folder)
        try:
            files = FunctionCache(self._function)
        except RuntimeError:  # no place was found that can be written
            return NullCache()
        finally:
            numba.config.CACHE_DIR = before
        return files if Path(files.cache_path).parent == self._folder else NullCache()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return self._files.load_overload(sig, target_context)
        except Exception:  # anything: a file that a power cut left half-written, unpickled
            with suppress(OSError):
                self._files.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            self._files.save_overload(sig, data)
        except OSError as error:
            user_cache.say_not_kept(self._folder, error)
