"""HTTP and S3 as asked for one object: its size, or a limited part of what it holds.

Both speak within fsspec's thread. What the other side sends is never taken for more than it can be:
no answer is read further than one byte beyond what was asked for, and none is decompressed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import Any

from data.errors import StorageError

CONCURRENT = 64  # reads at a time, of each process; at 20 ms each, 3,200 a second
REDIRECTS = 10  # of one request, the most that aiohttp follows


class StatusError(Exception):
    """An answer of HTTP that is a refusal."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Http:
    """Objects by their URLs. Raises ImportError where aiohttp is missing."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """say: called with the hosts that others redirect to."""
        import aiohttp
        import fsspec

        # identity: a part of what was compressed is no part of the object; trust_env: ~/.netrc.
        options = {
            "trust_env": True,
            "auto_decompress": False,
            "headers": {"Accept-Encoding": "identity"},
        }
        self.fs = fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=options)
        self.passing = (aiohttp.ClientError,)
        self._say, self._aiohttp = say, aiohttp

    async def size(self, url: str) -> int:
        """Ask for an object's size by HEAD, and by GET where there is no answer to that.

        Raises StatusError, StorageError, or what a fault raises.
        """
        try:
            stated = await self._ask("HEAD", url, {}, _length)
        except StatusError:
            stated = None
        if stated is None:
            stated = await self._ask("GET", url, {}, _length)
        if stated is None:
            raise StorageError(f"{url}: the server does not say its size")
        return stated

    async def read(self, url: str, most: int, start: int | None = None) -> bytes:
        """Read `most` bytes from `start` on, or a whole object; one more shows that there is more.

        Raises StatusError, StorageError, or what a fault raises.
        """
        headers = {} if start is None else {"Range": _range(start, most)}

        async def content(answer: Any) -> bytes:
            return await _begin(answer.content, most)

        return await self._ask("GET", url, headers, content)

    async def _ask(self, method: str, url: str, headers: dict[str, str], take: Callable) -> Any:
        """Send a request; returns what `take` makes of a good answer."""
        session, kinds = await self.fs.set_session(), self._aiohttp
        try:
            asked = session.request(method, url, headers=headers, max_redirects=REDIRECTS)
            async with asked as answer:
                if answer.history and answer.url.host != answer.history[0].url.host:
                    self._say(f"{answer.url.scheme}://{answer.url.host}")
                if not 200 <= answer.status < 300:
                    raise StatusError(answer.status)
                if answer.headers.get("Content-Encoding", "identity") != "identity":
                    raise StorageError(
                        f"{url}: the server compresses what it sends, unasked; one that gives "
                        "objects as they are is needed"
                    )
                return await take(answer)
        except kinds.TooManyRedirects:
            raise StorageError(f"{url}: is redirected more than {REDIRECTS - 1} times") from None
        except (kinds.NonHttpUrlClientError, kinds.InvalidURL):
            raise StorageError(
                f"{url}: is redirected to a URL that is neither https:// nor http://"
            ) from None
        except kinds.ClientResponseError:  # a status of aiohttp's own
            raise ConnectionError(errno.EPROTO, "an answer that is not HTTP") from None


async def _begin(stream: Any, most: int) -> bytes:
    """Read the beginning of a stream, up to one byte more than `most`."""
    parts, left = [], most + 1
    while left and (part := await stream.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


async def _length(answer: Any) -> int | None:
    """Read an object's size off an answer, if that states one."""
    stated = answer.headers.get("Content-Length", "")
    return int(stated) if re.fullmatch("[0-9]{1,18}", stated) else None


def _range(start: int, size: int) -> str:
    return f"bytes={start}-{start + size - 1}"


class S3:
    """Objects by s3://BUCKET/KEY. Raises ImportError where a library is missing."""

    def __init__(self) -> None:
        import aiohttp
        import fsspec
        from s3fs.core import S3_RETRYABLE_ERRORS

        # Attempts are made again in one place, ObjectStore: the libraries' own are switched off.
        options = {"max_pool_connections": CONCURRENT, "retries": {"total_max_attempts": 1}}
        self.fs = fsspec.filesystem("s3", skip_instance_cache=True, config_kwargs=options)
        self.fs.retries = 1
        self.passing = (aiohttp.ClientError, *S3_RETRYABLE_ERRORS)

    async def size(self, url: str) -> int:
        """Ask for an object's size."""
        self.fs.invalidate_cache()
        return int((await self.fs._info(url))["size"])

    async def read(self, url: str, most: int, start: int | None = None) -> bytes:
        """Read as `Http.read` does."""
        bucket, key, _ = self.fs.split_path(url)
        part = {} if start is None else {"Range": _range(start, most)}
        answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, **part)
        try:
            return await _begin(answer["Body"], most)
        finally:
            answer["Body"].close()
