"""A server of files over HTTP for measurements: ranges, a delay before each answer, and one link of
limited width that all connections share."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote

from data.workers import end_with_parent

CHUNK = 1 << 15  # bytes that are sent at a time where the link is limited
SAVED_S = 0.02  # of a link's time that may be made up for, as its processes wake up late


@contextmanager
def serving(root: Path, delay_s: float = 0.0, bytes_per_s: float | None = None) -> Iterator[str]:
    """Yield the URL of a folder, served by a process of its own until the context ends."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(root, delay_s, bytes_per_s, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/"
    finally:
        process.kill()
        process.join()


def _serve(root: Path, delay_s: float, bytes_per_s: float | None, ready: Connection) -> None:
    end_with_parent()

    async def main() -> None:
        files = _Files(root, delay_s, bytes_per_s)
        server = await asyncio.start_server(files.connected, "127.0.0.1", 0, backlog=1024)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


class _Files:
    """Files that the server sends."""

    def __init__(self, root: Path, delay_s: float, bytes_per_s: float | None) -> None:
        self.root, self.delay_s, self.bytes_per_s = root, delay_s, bytes_per_s
        self._free_at = 0.0  # when the link has sent all that waits for it

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(self.delay_s)
                status, headers, content = self._answer(head.decode("latin-1"))
                lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(content)}", "", ""]
                writer.write("\r\n".join(lines).encode())
                if not head.startswith(b"HEAD "):
                    await self._send(writer, content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, head: str) -> tuple[str, list[str], bytes]:
        """Return status, headers and content for a request."""
        path = self.root / unquote(head.split(" ")[1]).lstrip("/")
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return "404 Not Found", [], b""
        try:
            size = os.fstat(file).st_size
            if (wanted := re.search(r"\r\nrange: bytes=(\d+)-(\d+)", head, re.IGNORECASE)) is None:
                return "200 OK", [], os.pread(file, size, 0)
            first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
            if first >= size:
                return "416 Range Not Satisfiable", [f"Content-Range: bytes */{size}"], b""
            content_range = f"Content-Range: bytes {first}-{last}/{size}"
            return "206 Partial Content", [content_range], os.pread(file, last - first + 1, first)
        finally:
            os.close(file)

    async def _send(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        if self.bytes_per_s is None:
            writer.write(content)
            return
        for begin in range(0, len(content), CHUNK):
            part = content[begin : begin + CHUNK]
            since = max(self._free_at, time.monotonic() - SAVED_S)
            self._free_at = since + len(part) / self.bytes_per_s
            await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))
            writer.write(part)
            await writer.drain()
