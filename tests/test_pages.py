"""Tables that commands write into the docs."""

import pytest

from scripts.pages import replace_section


def test_only_the_named_section_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "top\n<!-- a: begin -->\nold\n<!-- a: end -->\n<!-- b: begin -->\n<!-- b: end -->"
    )
    for text in ("new\n", "newer"):
        replace_section(page, "a", text)
    expected = "top\n<!-- a: begin -->\nnewer\n<!-- a: end -->\n<!-- b: begin -->\n<!-- b: end -->"
    assert page.read_text() == expected
    with pytest.raises(ValueError, match="no section 'c'"):
        replace_section(page, "c", "lost")
    assert page.read_text() == expected
