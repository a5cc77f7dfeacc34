"""The JSON of files that others may have written: few levels, numbers that are numbers, a schema.

`json` alone ends in a RecursionError where brackets are nested deep, and reads NaN.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, Strict, TypeAdapter, ValidationError

from data.files import read_regular

Made = TypeVar("Made")

MAX_DEPTH = 32  # levels; the deepest file that is read here has 5
FLOAT32 = 3.4028235e38  # the largest; what a float64 holds beyond it has no use here

Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Number = Annotated[float, Strict(), Field(ge=-FLOAT32, le=FLOAT32)]
NonNegative = Annotated[float, Strict(), Field(ge=0, le=FLOAT32)]
Percent = Annotated[float, Strict(), Field(ge=0, le=100)]


def load(path: Path, limit: int) -> Any:
    """Read a file of at most `limit` bytes of JSON. Raises OSError, or ValueError in one line."""
    return parse(read_regular(path, limit))


def parse(text: str | bytes) -> Any:
    """JSON text -> plain Python values. Raises ValueError, in one line, for anything else."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:  # of a number with thousands of digits, Python adds a remedy
        raise ValueError(f"not JSON: {str(error).partition(';')[0]}") from None
    _check_depth(value)
    return value


def checked(value: Any, schema: TypeAdapter[Made]) -> Made:
    """Return a parsed value as a schema has it. Raises ValueError, in one line, with the place."""
    try:
        return schema.validate_python(value)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"{part}: " for part in fault["loc"])
        raise ValueError(f"{place}{fault['msg']}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        level = [item for each in level if isinstance(each, (dict, list)) for item in _items(each)]
        depth += 1


def _items(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
