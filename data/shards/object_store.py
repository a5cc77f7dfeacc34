"""Ranges of bytes out of an object store, over HTTP or S3: many at once, and again where a fault
may pass. fsspec speaks with the store, in one thread of each process."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, wait
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from data.errors import DataError, StorageError
from data.names import shown
from data.shards.clients import CONCURRENT, S3, Http
from data.urls import check_url

Result = TypeVar("Result")

ATTEMPT_S = 30.0  # after which an answer is asked for again
OPEN_S = 60.0  # for which faults are taken as passing while a run begins
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
QUIET_S = 30.0  # between two lines that report faults
# Codes of errors that s3fs raises for what no second attempt mends.
LASTING = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG}

# Never freed before the process ends: if a forked process freed its parent's, the sockets would be
# taken from under the parent, as both share the descriptor by which its thread waits for them.
_connections: list[_Connection] = []


class NoSuchObject(StorageError):
    """The store answers that there is no such object."""


class ObjectStore:
    """The objects below one URL. May be forked at any time, and pickled: each process makes a
    connection of its own. Raises DataError for a URL that cannot be used."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """`timeout_s`: how long the faults of one read are waited out."""
        check_url(url)
        self.url, self.timeout_s = url.rstrip("/") + "/", timeout_s
        self._connection: _Connection | None = None
        self._told: set[str] = set()  # what has been said once, here or in a parent

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_connection": None}

    def read(self, name: str, most: int) -> bytes:
        """Read a whole object, of up to `most` bytes. Raises StorageError."""
        here, path = self._connected(), self._path(name)
        open_s = min(OPEN_S, self.timeout_s)
        content = here.start(
            self._lasting(name, lambda: here.client.read(path, most), open_s, open_s)
        ).result()
        if len(content) > most:
            raise StorageError(f"{self.url}{name}: is longer than {most:,} bytes; not what it says")
        return content

    def sizes(self, names: list[str]) -> list[int]:
        """Look up the bytes of objects. Raises StorageError for the first that has none."""
        here, open_s = self._connected(), min(OPEN_S, self.timeout_s)

        async def size(name: str) -> int:
            path = self._path(name)
            return await self._lasting(name, lambda: here.client.size(path), open_s, ATTEMPT_S)

        started = [here.start(size(name)) for name in names]
        wait(started)
        return [future.result() for future in started]

    def begin(self, name: str, start: int, size: int, whole: int) -> Future[bytes]:
        """Begin to read `size` bytes of an object of `whole` bytes.

        The result raises StorageError, naming the object: when faults have not passed in time, and
        at once when it is not there or has another size.
        """
        return self.start(self.range(name, start, size, whole))

    def start(self, work: Awaitable[Result]) -> Future[Result]:
        """Have the thread that speaks with the store do something."""
        return self._connected().start(work)

    async def range(self, name: str, start: int, size: int, whole: int) -> bytes:
        """Read as `begin` does; to be awaited within `start`."""
        here, path = self._connected(), self._path(name)

        async def attempt() -> bytes:
            try:
                content = await here.client.read(path, size, start)
            except Exception as error:
                if not _is_beyond_end(error):
                    raise
                content = b""
            if len(content) == size:
                return content
            if len(content) > size:
                raise StorageError(
                    f"{self.url}{name}: the server gives more than the part that is asked for; one "
                    "that answers range requests is needed"
                )
            now = await here.client.size(path)
            if now != whole:
                raise StorageError(
                    f"{self.url}{name}: has {now:,} bytes, not {whole:,} as it was indexed with: "
                    "truncated or replaced; copy it anew"
                )
            raise ConnectionError(errno.EIO, "cut short")

        return await self._lasting(name, attempt, self.timeout_s, ATTEMPT_S)

    async def _lasting(
        self,
        name: str,
        attempt: Callable[[], Awaitable[Result]],
        timeout_s: float,
        attempt_s: float,
    ) -> Result:
        """Repeat an attempt until faults have passed. Raises StorageError."""
        here = self._connected()
        until = time.monotonic() + timeout_s
        limit = min(attempt_s, timeout_s)
        for pause in _pauses():
            try:
                async with here.slots:
                    return await asyncio.wait_for(attempt(), limit)
            except StorageError:
                raise
            except Exception as error:
                fault = error
            reason = _words(fault, limit)
            if isinstance(fault, FileNotFoundError) or getattr(fault, "status", None) == 404:
                raise NoSuchObject(f"{self.url}{name}: {reason}")
            if not here.may_pass(fault):
                raise StorageError(f"{self.url}{name}: {reason}")
            if time.monotonic() + pause > until:
                raise StorageError(
                    f"{self.url}{name}: {reason}, tried again for {timeout_s:g} s; the same "
                    "command continues once the storage answers"
                )
            here.report(f"{self.url}{name}: {reason}; trying again")
            await asyncio.sleep(pause)
        raise AssertionError("pauses have no end")

    def _connected(self) -> _Connection:
        """Return this process's connection."""
        if self._connection is None or self._connection.pid != os.getpid():
            self._connection = _Connection(self.url, self._say_once)
            _connections.append(self._connection)
        return self._connection

    def _say_once(self, host: str) -> None:
        """Say on stderr that objects come from another host."""
        if host not in self._told:
            self._told.add(host)
            line = f"{self.url}: its objects are read from {host}, to which it redirects"
            print(shown(line), file=sys.stderr, flush=True)

    def _path(self, name: str) -> str:
        """Name an object as fsspec wants it."""
        return self.url + (name if self.url.startswith("s3:") else quote(name))


class _Connection:
    """A client and fsspec's thread, in the process that made them."""

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        self.pid = os.getpid()
        self.slots = asyncio.Semaphore(CONCURRENT)
        self._reported_at = -QUIET_S
        try:
            self.client = S3() if urlsplit(url).scheme == "s3" else Http(say)
        except ImportError as error:
            raise DataError(
                f"{url}: to read it, {error.name or error} is missing: "
                "pip install -r requirements-remote.txt"
            ) from None

    def start(self, work: Awaitable[Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self.client.fs.loop)

    def may_pass(self, fault: BaseException) -> bool:
        """Return whether a second attempt may do better."""
        status = getattr(fault, "status", None)
        if isinstance(status, int):
            return not 400 <= status < 500 or status in (408, 429)
        if isinstance(fault, OSError) and fault.errno in LASTING:
            return False
        passing = (OSError, asyncio.TimeoutError, *self.client.passing)
        return isinstance(fault, passing) and not isinstance(
            fault, (FileNotFoundError, PermissionError)
        )

    def report(self, line: str) -> None:
        """Say on stderr that faults are being waited out, now and then."""
        if time.monotonic() - self._reported_at >= QUIET_S:
            self._reported_at = time.monotonic()
            print(shown(line), file=sys.stderr, flush=True)


def _pauses() -> Iterator[float]:
    """Yield the seconds before each further attempt: doubled each time, and spread, as all
    processes meet the same fault at once."""
    longest = FIRST_PAUSE_S
    while True:
        yield random.uniform(longest / 2, longest)
        longest = min(2 * longest, LONGEST_PAUSE_S)


def _is_beyond_end(error: Exception) -> bool:
    """Return whether the object ends before a range: HTTP's 416, S3's InvalidRange."""
    if getattr(error, "status", None) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return True
    answer = getattr(error.__cause__, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") in (
        "InvalidRange",
        "416",
    )


def _words(fault: BaseException, limit: float) -> str:
    """Put a fault in words of our own: what servers and libraries say may hold a signed URL."""
    status = getattr(fault, "status", None)
    if isinstance(fault, FileNotFoundError) or status == HTTPStatus.NOT_FOUND:
        return "no such object"
    if isinstance(status, int) and status in set(HTTPStatus):
        return f"{status} {HTTPStatus(status).phrase}"
    if isinstance(fault, (asyncio.TimeoutError, TimeoutError)):
        return f"no answer within {limit:g} s"
    if isinstance(fault, PermissionError):
        return (
            "access is refused; credentials are taken from the environment, ~/.aws or the "
            "machine's role"
        )
    said = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
    return re.sub(r"\S*(://|[?&]\w+=)\S*", "…", str(said))
