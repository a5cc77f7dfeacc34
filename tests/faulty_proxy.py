"""A proxy between a client and an HTTP server that puts faults into the answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PASS, SLOW, ERROR, CUT, WHOLE = "pass", "slow", "503", "cut", "whole"
SLOW_S = 0.6
KEPT = {"content-length", "content-range", "etag", "accept-ranges", "content-type", "last-modified"}


class FaultyProxy:
    """`fault(path, number)` says what befalls the request with this number, from 0 on, of GETs:

    pass; slow: wait first; 503: refuse; cut: end the connection in the middle of the content;
    whole: forget that a range was asked for. A HEAD has the number -1, and nothing but 503 is done
    to it.
    """

    def __init__(self, upstream: str, fault: Callable[[str, int], str]) -> None:
        self.upstream, self.fault = urlsplit(upstream), fault
        self.requests: list[str] = []  # paths of GETs in the order of their arrival
        self.injected: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def told(self, path: str) -> str:
        """Choose the fault of a GET."""
        with self.lock:
            self.requests.append(path)
            kind = self.fault(path, len(self.requests) - 1)
            if kind != PASS:
                self.injected.append(kind)
            return kind


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


@contextmanager
def faulty(
    upstream: str, fault: Callable[[str, int], str] = lambda path, number: PASS
) -> Iterator[tuple[str, FaultyProxy]]:
    """The proxy's URL, with the upstream's path, and the proxy."""
    proxy = FaultyProxy(upstream, fault)

    class Handler(_Handler):
        of = proxy

    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{proxy.upstream.path}", proxy
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    of: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        is_refused = self.of.fault(self.path, -1) == ERROR
        self._answer(ERROR if is_refused else PASS)

    def do_GET(self) -> None:
        with self.of.lock:
            self.of.in_flight += 1
            self.of.most_in_flight = max(self.of.most_in_flight, self.of.in_flight)
        try:
            self._answer(self.of.told(self.path))
        finally:
            with self.of.lock:
                self.of.in_flight -= 1

    def do_PUT(self) -> None:
        self._answer(PASS)

    def _answer(self, kind: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if kind == ERROR:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if kind == SLOW:
            time.sleep(SLOW_S)
        headers = dict(self.headers)  # Host, too: S3's signatures are over it
        if kind == WHOLE:
            headers = {name: text for name, text in headers.items() if name.lower() != "range"}
        connection = HTTPConnection(self.of.upstream.hostname, self.of.upstream.port, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        self.send_response(answer.status)
        for name, text in answer.getheaders():
            if name.lower() in KEPT:
                self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if kind == CUT else content)
        self.close_connection = self.close_connection or kind == CUT

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""
