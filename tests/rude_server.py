"""An HTTP server that sends whatever bytes a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socketserver import StreamRequestHandler, ThreadingTCPServer

ENOUGH = 1 << 28  # bytes; who takes more from an endless answer collects it

Answer = Callable[[str, str], Iterator[bytes]]  # method, path -> parts of an answer


class _Server(ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Yield the URL of a server that answers each request so, and then ends the connection."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            lines = iter(self.rfile.readline, b"")
            first = next(lines, b"")
            if not first:  # the client has given up before it asked
                return
            method, path, _ = first.decode("latin-1").split(" ")
            while next(lines, b"").strip():
                pass
            sent = 0
            with suppress(OSError):  # the client has seen enough
                for part in answer(method, path):
                    sent += self.wfile.write(part)
                    assert sent < ENOUGH

    with _Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


def whole(content: bytes, *headers: str) -> bytes:
    """Make an ordinary answer."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def redirect(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()
