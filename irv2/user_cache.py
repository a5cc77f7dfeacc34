"""Where things that were costly to compile are kept for the next process."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path | None:
    """A folder of the user's cache that can be written, made if need be; None: there is none."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = base / "irv2" / name
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no permission, no room; no home directory
        return None
    return path if os.access(path, os.W_OK | os.X_OK) else None
