"""Lists of classes: their names, one a line."""

from __future__ import annotations

from pathlib import Path

from data.errors import DataError
from data.files import read_user_text
from data.names import in_nfc

COMMENT = "# "  # begins a line that is no name


def read(path: str | Path) -> list[str]:
    """Read the names of classes as `parse` does. Raises DataError."""
    names = parse(read_user_text(path))
    if len(set(map(in_nfc, names))) < len(names) or not names:
        raise DataError(f"{path}: expected names of classes, one a line, all different")
    return names


def parse(text: str) -> list[str]:
    """Return the names in a text, one a line; a line that begins with "# " is a comment."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith(COMMENT)]
    return [line for line in lines if line]
