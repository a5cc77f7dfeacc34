"""Libraries that only some uses need, imported when one of these begins."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from data.errors import DataError

REQUIREMENTS = "requirements-data.txt"


def is_installed(module: str) -> bool:
    """True if there is a library; a mere folder of its name, such as W&B's ./wandb, is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even what it would be a part of
        return False
    return spec is not None and spec.loader is not None


def needed(module: str, why: str) -> Any:
    """Import a library. Raises DataError that says how to install it, and `why` it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise DataError(f"{why} needs {name}: pip install -r {REQUIREMENTS}") from None
