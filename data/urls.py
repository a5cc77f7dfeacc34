"""URLs of images, which hold no secret, and URLs in messages, which must not repeat one."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from data.errors import DataError

_SCHEME = r"(\w:/{1,2})"  # a URL that was taken for a path has lost a slash
_HOST = re.compile(r"([^@:]+|\[[\w:.]+\])(:\d+)?")


def check_url(url: str) -> None:
    """Raise DataError, which repeats no secret, unless images could lie at a URL."""
    scheme = url.partition("://")[0]
    if scheme not in ("http", "https", "s3"):
        raise DataError(
            f"{scheme}://…: images are read from folders, https://, http:// and s3:// only"
        )
    if not _holds_no_secret(url):
        raise DataError(
            f"{scheme}://…: the URL of images is written as {scheme}://HOST/FOLDER/, without user, "
            "password, ? and #; credentials are taken from where the libraries look for them: the "
            "environment, ~/.aws, the machine's role, ~/.netrc"
        )


def _holds_no_secret(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return bool(_HOST.fullmatch(parts.netloc)) and not (parts.query or parts.fragment)


def without_secrets(text: str) -> str:
    """Remove user, password, query and fragment from the URLs in a text."""
    text = re.sub(rf"{_SCHEME}[^/\s]*@", r"\1…@", text)
    # Keys of S3 may hold a slash: what stands behind the colon is one unless it is a port.
    text = re.sub(rf"{_SCHEME}[^/\s]*:(?!\d+(/|$))\S*@", r"\1…@", text)
    return re.sub(rf"({_SCHEME}[^\s?#'\"]*[?#])[^\s'\"]+?(?=:?([\s'\"]|$))", r"\1…", text)
