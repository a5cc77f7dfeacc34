"""Answers of HTTP servers: no more is taken than was asked for, and nonsense has an end."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from itertools import count, repeat

import pytest
from rude_server import Answer, answering, redirect, whole

from data.errors import StorageError
from data.shards import object_store
from data.shards.object_store import ObjectStore

pytest.importorskip("aiohttp", reason="remote shards are NOT tested: requirements-remote.txt")

NAME = "index.safetensors"
IN_FLIGHT = 16 << 20  # bytes that may lie in a connection's buffers
NOT_HTTP = b"SSH-2.0-OpenSSH_9.2\r\n\r\n"


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(object_store, "FIRST_PAUSE_S", 0.01)


def refused(url: str, timeout_s: float = 5.0) -> str:
    """The error for an index of at most 1,000 bytes."""
    with pytest.raises(StorageError) as caught:
        ObjectStore(url, timeout_s).read(NAME, 1000)
    assert str(caught.value).startswith(f"{url}{NAME}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def endless(sent: list[bytes]) -> Answer:
    """An answer that has no end; adds what it sends to `sent`."""

    def answer(_method: str, _path: str) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n\r\n"
        yield from (sent.append(part) or part for part in repeat(bytes(1 << 16)))

    return answer


def test_an_answer_without_an_end_is_left():
    with answering(endless(sent := [])) as url:
        assert "longer than 1,000 bytes" in refused(url)
        part = ObjectStore(url, 5).begin("a.tar", 512, 100, 10_000)
        with pytest.raises(StorageError, match="more than the part that is asked for"):
            part.result()
    assert len(sent) < 2 * IN_FLIGHT >> 16


def test_an_answer_of_s3_without_an_end_is_left(monkeypatch):
    pytest.importorskip("s3fs", reason="S3 is NOT tested: requirements-remote.txt")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "any")
    with answering(endless(sent := [])) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = ObjectStore("s3://bucket/", 5)
        with pytest.raises(StorageError, match="longer than 1,000 bytes"):
            store.read(NAME, 1000)
        with pytest.raises(StorageError, match="more than the part that is asked for"):
            store.begin("a.tar", 512, 100, 10_000).result()
    assert len(sent) < 2 * IN_FLIGHT >> 16


def test_a_compressed_answer_is_not_unpacked():
    packed = gzip.compress(bytes(64 << 20))
    with answering(lambda *_: iter([whole(packed, "Content-Encoding: gzip")])) as url:
        assert "compresses what it sends" in refused(url)


@pytest.mark.parametrize("headers", [b"", b"Content-Length: 1e9\r\n", b"Content-Length: -1\r\n"])
def test_a_size_that_is_none_is_told(headers):
    answer = b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n"
    with answering(lambda *_: iter([answer])) as url, pytest.raises(StorageError, match=NAME):
        ObjectStore(url, 0.3).sizes([NAME])


def test_what_is_no_http_is_asked_for_again(capfd):
    numbers = count()

    def answer(_method: str, _path: str) -> Iterator[bytes]:
        yield NOT_HTTP if next(numbers) < 2 else whole(b"content")

    with answering(answer) as url:
        assert ObjectStore(url, 5).read(NAME, 1000) == b"content"
    assert "an answer that is not HTTP; trying again" in capfd.readouterr().err
    with answering(lambda *_: iter([NOT_HTTP])) as url:
        assert "an answer that is not HTTP, tried again" in refused(url, 0.2)


def test_a_redirect_to_another_host_is_said_once(capfd):
    def answer(_method: str, path: str) -> Iterator[bytes]:
        if path.startswith("/moved/"):
            yield whole(b"content")
        else:
            yield redirect(f"{url.replace('127.0.0.1', 'localhost')}moved{path}?X-Signature=secret")

    with answering(answer) as url:
        store = ObjectStore(url, 5)
        assert [store.read(NAME, 1000) for _ in range(2)] == [b"content"] * 2
    said = capfd.readouterr().err
    assert said == f"{url}: its objects are read from http://localhost, to which it redirects\n"


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://host/x", "http://[", "gopher:x"])
def test_a_redirect_away_from_http_is_refused(to):
    with answering(lambda *_: iter([redirect(to)])) as url:
        assert "redirected to a URL that is neither https:// nor http://" in refused(url)


def test_redirects_in_a_circle_end():
    with answering(lambda *_: iter([redirect("/again")])) as url:
        assert "redirected more than 9 times" in refused(url)
