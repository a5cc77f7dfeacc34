"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from data.files import write_atomically


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_created_and_replaced(tmp_path):
    path = tmp_path / "file"
    for content in (b"first, and longer", b"second"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert names(tmp_path) == ["file"]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file with something in it."""
    (tmp_path / "file").write_bytes(b"old")
    return tmp_path / "file"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_writer_that_fails_half_way_leaves_the_old_file_and_nothing_else(old, error):
    def write(file) -> None:
        file.write(b"half of the n")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomically(old, write)
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["file"]


def test_the_old_file_is_there_until_the_new_one_is_whole(old):
    seen = []

    def write(file) -> None:
        file.write(b"new")
        file.flush()
        seen.append(old.read_bytes())

    write_atomically(old, write)
    assert seen == [b"old"]


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, events):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"12345"))
    (flush, _, size), *rest = events
    assert (flush, size) == ("fsync", 5)
    assert rest == [("rename", path), ("fsync", tmp_path, None)]


def test_a_failed_fsync_leaves_the_old_file(old, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        write_atomically(old, lambda file: file.write(b"new"))
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["file"]


def test_a_full_disk_is_told_by_the_name_of_the_file(old):
    def write(file) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as caught:
        write_atomically(old, write)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(old))
    with pytest.raises(NotADirectoryError, match=f"{old}/below'"):
        write_atomically(old / "below", write)
