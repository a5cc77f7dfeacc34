"""Markdown: names in it, and tables in the docs that a command writes, each between two marks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from data.names import shown


def escaped(text: str) -> str:
    """Write a name so that it is shown as it is, in one line; in a cell of a table, too."""
    return re.sub(r"[\\`*_{}\[\]<>#|~&]", r"\\\g<0>", shown(text))


def code(text: str) -> str:
    """Write a command as code, in one line, whatever is in it."""
    text = shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def table(head: str, rows: Iterable[str]) -> str:
    """Make a Markdown table; its head and its rows are written "a | b | c"."""
    first, *others = (f"| {cells} |" for cells in (head, *rows))
    return "\n".join([first, f"|{'---|' * (head.count('|') + 1)}", *others])


def replace_section(page: Path, name: str, text: str) -> None:
    """Put text between `<!-- name: begin -->` and `<!-- name: end -->` of a Markdown page.

    Raises ValueError if the page lacks one of the marks.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, has_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise ValueError(f"{page}: no section '{name}' in it")
    page.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}", encoding="utf-8")


def has_section(page: Path, name: str) -> bool:
    """True if a page has the two marks."""
    text = page.read_text(encoding="utf-8")
    return f"<!-- {name}: begin -->" in text and f"<!-- {name}: end -->" in text
