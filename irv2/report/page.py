"""One self-contained HTML file from a template, and files that are never seen half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from data.files import write_atomically
from irv2.report.statistics import Interval


def environment() -> jinja2.Environment:
    """Return the templates of the folder; their content is escaped, and none may be missing."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = percent
    made.filters["interval"] = interval
    made.filters["count"] = count
    return made


def percent(value: float, digits: int = 1) -> str:
    """Format a percentage, "98.6"; less than 100 is never rounded up to it."""
    most = 100.0 if value == 100.0 else 100.0 - 10.0**-digits
    return f"{min(value, most):.{digits}f}"


def interval(bounds: Interval, digits: int = 1) -> str:
    """Format both ends of a percentage's interval."""
    return f"{percent(bounds.low, digits)} \u2013 {percent(bounds.high, digits)}"


def count(value: int, one: str = "", many: str = "") -> str:
    """Format a number with separators, before its noun if one is given: "1,437 images"."""
    noun = one if value == 1 else many or f"{one}s"
    return f"{value:,} {noun}" if one else f"{value:,}"


def render(template: str, **content: Any) -> str:
    """Fill a template with its content."""
    return environment().get_template(template).render(**content)


def encoded(text: str) -> bytes:
    """Encode as UTF-8; bytes of file names that are not UTF-8 are backslash-escaped."""
    return text.encode("utf-8", "backslashreplace")


def write(path: Path, content: bytes | str) -> None:
    """Create or replace a file, whole or not at all; text as by `encoded`."""
    write_atomically(path, encoded(content) if isinstance(content, str) else content)
