"""One self-contained HTML file from a template, and files that are never seen half-written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

from irv2.statistics import Interval


def environment() -> jinja2.Environment:
    """Templates of report/templates; whatever they are given is escaped, and must be given."""
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
    """A percentage, "98.6"; what is less than 100 is not rounded up to it."""
    most = 100.0 if value == 100.0 else 100.0 - 10.0**-digits
    return f"{min(value, most):.{digits}f}"


def interval(bounds: Interval, digits: int = 1) -> str:
    """Both ends of a percentage's interval."""
    return f"{percent(bounds.low, digits)} \u2013 {percent(bounds.high, digits)}"


def count(value: int, one: str = "", many: str = "") -> str:
    """A number with thousands set apart, before its noun if one is given: "1,437 images"."""
    noun = one if value == 1 else many or f"{one}s"
    return f"{value:,} {noun}" if one else f"{value:,}"


def render(template: str, **content: Any) -> str:
    """The page that a template makes of its content."""
    return environment().get_template(template).render(**content)


def encoded(text: str) -> bytes:
    """UTF-8; names of files need not be text, and what is none in them is backslashed."""
    return text.encode("utf-8", "backslashreplace")


def write(path: Path, content: bytes | str) -> None:
    """Create or replace a file, whole or not at all; text as by `encoded`."""
    content = encoded(content) if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
