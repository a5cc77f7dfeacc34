"""Libraries that only some uses need, imported when one of these begins."""

from __future__ import annotations

import importlib
from typing import Any

from data.errors import DataError

REQUIREMENTS = "requirements-data.txt"


def needed(module: str, why: str) -> Any:
    """Import a library. Raises DataError that says how to install it, and `why` it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise DataError(f"{why} needs {name}: pip install -r {REQUIREMENTS}") from None
