"""Names of files and classes: how they are shown, and when two of them are one."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

LONGEST = 60  # columns of a name in a table
LONGEST_LINE = 4000  # columns of an error, which may repeat what a file holds
_SCHEME = r"(\w:/{1,2})"  # a URL that was taken for a path has lost a slash


def shown(name: str, most: int | None = None) -> str:
    """A name or a message with names as a program may print it, in one line.

    It acts on no terminal and forges no line: control characters, line ends, marks that turn the
    direction of writing, and bytes that are no UTF-8 are escaped. Secrets in URLs are left out.
    With `most` it has so many columns at most: what is too long is left out in the middle.
    """
    text = "".join(c if c.isprintable() else _escaped(c) for c in without_secrets(name))
    if most is None or width(text) <= most:
        return text
    head, tail = _fitting(text, most // 2), _fitting(text[::-1], most - most // 2 - 1)[::-1]
    return f"{head}…{tail}"


def without_secrets(text: str) -> str:
    """Remove user, password, query and fragment from the URLs in a text."""
    text = re.sub(rf"{_SCHEME}[^/\s]*@", r"\1…@", text)
    # Keys of S3 may hold a slash: what stands behind the colon is one unless it is a port.
    text = re.sub(rf"{_SCHEME}[^/\s]*:(?!\d+(/|$))\S*@", r"\1…@", text)
    return re.sub(rf"({_SCHEME}[^\s?#'\"]*[?#])[^\s'\"]+?(?=:?([\s'\"]|$))", r"\1…", text)


def _escaped(character: str) -> str:
    """Escape a character as Python does; a byte that is no UTF-8 as that byte."""
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # os.fsdecode's
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def width(text: str) -> int:
    """Columns that a terminal gives a printable text."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(text: str, most: int) -> str:
    """The beginning of a text, of `most` columns."""
    used = 0
    for place, character in enumerate(text):
        used += _columns(character)
        if used > most:
            return text[:place]
    return text


def same_but_for_case(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that a disk without case, or of another Unicode form, takes for one."""
    keys = [name.lower() if name.isascii() else in_nfc(name).casefold() for name in names]
    if len(set(keys)) == len(keys):
        return []
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key, name in zip(keys, names):
        groups[key].append(name)
    return [group for group in groups.values() if len(group) > 1]


def in_nfc(name: str) -> str:
    """A name in the Unicode form that has é as one character; on disks of Macs it is two."""
    return unicodedata.normalize("NFC", name)


def are_same(names: Sequence[str] | None, others: Sequence[str] | None) -> bool:
    """True for the same names in the same order, whatever Unicode form they are written in."""
    if names is None or others is None:
        return names is others
    return list(map(in_nfc, names)) == list(map(in_nfc, others))


def natural(name: str) -> list[str | int]:
    """Make a key that sorts digits as numbers, and upper case as lower: class2 before class10.

    So timm sorts class folders (timm/utils/misc.py, natural_key).
    """
    parts = re.split(r"(\d+)", name.lower())
    return [int(part[:4000]) if i % 2 else part for i, part in enumerate(parts)]  # Python's limit


def in_order(classes: Sequence[str]) -> str:
    """The first and the last of a network's classes, as its outputs are numbered."""
    names = [shown(name, LONGEST) for name in classes]
    text = ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} … {names[-1]}"
    are_numbers = all(name.isdecimal() for name in classes)
    if are_numbers and list(classes) != sorted(classes, key=natural):
        text += " (numbers, sorted as text)"
    return text
