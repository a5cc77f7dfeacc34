"""URLs in messages, which others may read."""

from __future__ import annotations

import re

_SCHEME = r"(\w:/{1,2})"  # a URL that was taken for a path has lost a slash


def without_secrets(text: str) -> str:
    """A text whose URLs have lost user, password, query and fragment."""
    text = re.sub(rf"{_SCHEME}[^/\s]*@", r"\1…@", text)
    # Keys of S3 may hold a slash: what stands behind the colon is one unless it is a port.
    text = re.sub(rf"{_SCHEME}[^/\s]*:(?!\d+(/|$))\S*@", r"\1…@", text)
    return re.sub(rf"({_SCHEME}[^\s?#'\"]*[?#])[^\s'\"]+?(?=:?([\s'\"]|$))", r"\1…", text)
