"""Files are written whole or not at all, and only regular ones are opened."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from data.files import open_own, read_regular, remove_leftovers, write_atomically


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_created_and_replaced(tmp_path):
    path = tmp_path / "file"
    for content in (b"first, and longer", b"second"):
        write_atomically(path, content)
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
    write_atomically(path, "12345")
    (flush, _, size), *rest = events
    assert (flush, size) == ("fsync", 5)
    assert rest == [("rename", path), ("fsync", tmp_path, None)]


def test_a_failed_fsync_leaves_the_old_file(old, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        write_atomically(old, b"new")
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


# ------------------------------------------------------------------------- what others put there


@pytest.fixture(params=["pipe", "link to a device", "link to a pipe"])
def trap(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Something under a file's name of which a reader would see no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to a device").symlink_to("/dev/zero")
    (tmp_path / "link to a pipe").symlink_to(tmp_path / "pipe")
    return tmp_path / request.param


def test_neither_a_pipe_nor_a_device_is_read(trap):
    with pytest.raises(OSError, match="not a regular file") as caught:
        read_regular(trap)
    assert caught.value.filename == str(trap)
    with pytest.raises(IsADirectoryError):
        read_regular(trap.parent)


def test_a_file_is_read_through_a_link_up_to_the_size_that_is_allowed(old):
    link = old.with_name("link")
    link.symlink_to(old)
    assert read_regular(link, 3) == b"old"
    with pytest.raises(OSError, match="over 2 bytes"):
        read_regular(link, 2)


def test_a_file_of_the_programs_own_is_made_and_added_to(tmp_path):
    for content in (b"a", b"b"):
        with open_own(tmp_path / "own", "ab") as file:
            file.write(content)
    with open_own(tmp_path / "own", "rb+") as file:
        assert file.read() == b"ab"


@pytest.mark.parametrize("mode", ["ab", "rb+"])
def test_what_is_planted_under_the_name_of_an_own_file_is_not_opened(old, mode):
    link, pipe = old.with_name("link"), old.with_name("pipe")
    link.symlink_to(old)
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is a symbolic link; remove it"):
        open_own(link, mode)
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        open_own(pipe, mode)
    assert old.read_bytes() == b"old"


def test_leftovers_of_killed_writers_are_removed_and_not_what_they_link_to(old):
    (old.parent / ".0123456789abcdef.tmp").symlink_to(old)
    (old.parent / ".fedcba9876543210.tmp").touch()
    (old.parent / ".mine.tmp").touch()
    remove_leftovers(old.parent)
    assert names(old.parent) == [".mine.tmp", "file"] and old.read_bytes() == b"old"
