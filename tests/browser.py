"""Look at a page in headless Chromium as a reader does, who has no network."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

WIDTHS = (1280, 390)


@contextmanager
def opened(browser, path: Path, width: int) -> Iterator:
    """The page of a file, `width` px wide; fails if anything is asked of a network, or goes wrong.

    `browser`: the fixture `chromium`.
    """
    faults: list[str] = []

    def note_request(request) -> None:
        if not request.url.startswith(("file:", "data:")):
            faults.append(request.url)

    viewport = {"width": width, "height": 900}
    with browser.new_context(viewport=viewport, offline=True, color_scheme="light") as context:
        page = context.new_page()
        page.on("request", note_request)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(path.as_uri())
        yield page
    assert faults == []


def assert_shown(page, sections: list[str]) -> None:
    """Each section is there, has a size and something drawn in it; the page scrolls only down."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for name in sections:
        section = page.locator(f"#{name}")
        assert section.is_visible(), name
        box = section.bounding_box()
        assert box["width"] > 300 and box["height"] > 40, name
        pixels = np.asarray(Image.open(io.BytesIO(section.screenshot())).convert("L"))
        assert (pixels < 128).mean() > 0.0005 and pixels.std() > 3, name


def cells(page, table: str) -> list[list[str]]:
    """Text of a table's body, row by row."""
    return page.eval_on_selector_all(
        f"{table} tbody tr",
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))",
    )
