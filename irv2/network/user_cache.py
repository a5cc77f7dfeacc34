"""The user's cache, which keeps for the next process what was costly to compile."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path | None:
    """Make, if need be, a writable folder in the user's cache; None if there cannot be one."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = base / "irv2" / name
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no permission, no room; no home directory
        return None
    return path if os.access(path, os.W_OK | os.X_OK) else None
