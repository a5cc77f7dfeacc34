"""URLs of images, which hold no secret."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from data.errors import DataError

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
