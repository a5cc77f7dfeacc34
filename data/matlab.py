"""Struct arrays out of MATLAB's files of version 5, which hold arrays and no code.

SciPy reads them, too, but one that is damaged can end its process (seen with 1.17). Source of the
format: MathWorks, MAT-File Format, level 5.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

HEADER = 128  # bytes, of which the last two are IM where numbers are little-endian
MATRIX, COMPRESSED = 14, 15  # types of elements
STRUCT, TEXT = 2, 4  # classes of arrays
INT32, UINT32 = 5, 6
NUMBERS = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", INT32: "i4", UINT32: "u4", 12: "i8", 13: "u8"},
    **{7: "f4", 9: "f8"},
}
ENCODINGS = {2: "utf-8", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
MOST, FIELDS = 16 << 20, 100  # bytes of what was compressed; fields of a struct

Value = np.ndarray | str | None  # None: of another class, such as a struct in the struct


class Element(NamedTuple):
    """A part of a file: its type, and its bytes."""

    kind: int
    content: bytes


class Matrix(NamedTuple):
    """An array: what all of them begin with, and the elements that follow."""

    kind: int
    size: int  # how many values it has
    name: bytes
    parts: Iterator[Element]


def read_struct(content: bytes, name: str) -> list[dict[str, Value]]:
    """Read the struct array of a name, in MATLAB's order: a value for each field.

    Raises ValueError for what is damaged, of another version, or not there.
    """
    if content[HEADER - 2 : HEADER] != b"IM":
        raise ValueError("not a little-endian file of MATLAB's, version 5")
    for element in _elements(content[HEADER:]):
        if element.kind == COMPRESSED:
            element = next(_elements(_expanded(element.content)), None)
        if element is None or element.kind != MATRIX:
            continue
        matrix = _matrix(element)
        if (matrix.kind, matrix.name) == (STRUCT, name.encode()):
            return _rows(matrix)
    raise ValueError(f"holds no struct {name}")


def _elements(content: bytes) -> Iterator[Element]:
    """Yield elements that lie one after another. Raises ValueError for one that is cut short."""
    place = 0
    while place + 8 <= len(content):
        kind, size = np.frombuffer(content, "<u4", 2, place).tolist()
        if kind >> 16:  # a small one: type and size in one number, and then its bytes
            kind, size, begin = kind & 0xFFFF, kind >> 16, place + 4
            place += 8
        else:
            begin = place + 8
            place = begin + (size if kind == COMPRESSED else -(-size // 8) * 8)
        if begin + size > len(content):
            raise ValueError("is cut short")
        yield Element(kind, content[begin : begin + size])


def _expanded(content: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        expanded = inflater.decompress(content, MOST)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if inflater.unconsumed_tail:
        raise ValueError(f"holds over {MOST:,} bytes")
    return expanded


def _matrix(element: Element) -> Matrix:
    parts = _elements(element.content)
    try:
        flags, sides, name = next(parts), next(parts), next(parts)
    except StopIteration:
        raise ValueError("holds an array without its beginning") from None
    if (flags.kind, sides.kind) != (UINT32, INT32):
        raise ValueError("holds an array of an unknown kind")
    first, _ = _numbers(flags).tolist()
    return Matrix(first & 0xFF, math.prod(_numbers(sides).tolist()), name.content, parts)


def _rows(matrix: Matrix) -> list[dict[str, Value]]:
    """Read a struct array: the width of its fields' names, these, and a matrix for each value."""
    parts = matrix.parts
    try:
        (width,) = _numbers(next(parts)).tolist()
        names = next(parts).content
        if not 0 < width <= len(names) <= FIELDS * width:
            raise ValueError("holds a struct of no fields, or too many")
        starts = range(0, len(names), width)
        fields = [names[i : i + width].partition(b"\0")[0].decode() for i in starts]
        return [{field: _value(next(parts)) for field in fields} for _ in range(matrix.size)]
    except StopIteration:
        raise ValueError("holds fewer values than it says") from None


def _value(element: Element) -> Value:
    if element.kind != MATRIX:
        raise ValueError("holds something else in place of an array")
    if not element.content:  # as MATLAB has what is empty
        return None
    matrix = _matrix(element)
    values = next(matrix.parts, None)
    if values is None:
        return None
    if matrix.kind == TEXT and (encoding := ENCODINGS.get(values.kind)):
        return values.content.decode(encoding)
    return _numbers(values) if values.kind in NUMBERS else None


def _numbers(element: Element) -> np.ndarray:
    """Read numbers of any type. Raises ValueError."""
    if element.kind not in NUMBERS:
        raise ValueError(f"holds something else in place of numbers (type {element.kind})")
    return np.frombuffer(element.content, "<" + NUMBERS[element.kind])
