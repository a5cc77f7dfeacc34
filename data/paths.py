"""Paths as people write them."""

from __future__ import annotations

import os
import re

from data.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expanded(text: str) -> str:
    """Expand ~ and variables such as $HOME in a path; https:…, timm:… and the like are none.

    Raises DataError for a user or a variable that there is not, unless such a file is there: else a
    folder of that very name would be made.
    """
    if _SCHEME.match(text):
        return text
    path = os.path.expandvars(text)
    if text.startswith("~"):
        path = os.path.expanduser(path)
    names = [first or second for first, second in _VARIABLE.findall(text)]
    unknown = [f"environment has no variable {name}" for name in names if name not in os.environ]
    if text.startswith("~") and path.startswith("~"):
        unknown.append(f"system has no user {path[1:].partition('/')[0]}")
    if unknown and not os.path.lexists(text):
        raise DataError(f"{text}: the {unknown[0]}")
    if not path:
        raise DataError(f"{text}: expands to nothing")
    return path
