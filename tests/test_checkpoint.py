"""Checkpoints are written whole or not at all, rotated by step, and never executed."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from irv2 import checkpoint
from irv2.checkpoint import CheckpointError, write_atomically


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def state(step: int) -> dict:
    return {"weights": torch.full((64, 64), float(step)), "step": step, "names": ["a", "b"]}


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---------------------------------------------------------------------------------- writing


def test_a_file_is_created_and_replaced(tmp_path):
    path = tmp_path / "file"
    for content in (b"first, and longer", b"second"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_writer_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file) -> None:
        file.write(b"half of the n")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []

    def write(file) -> None:
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    write_atomically(path, write)
    assert seen == [b"old"]


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch
):
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        size = target.stat().st_size if target.is_file() else None
        events.append(("fsync", "directory" if size is None else size))
        fsync(descriptor)

    def spy_replace(source, target) -> None:
        events.append(("replace", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_atomically(path, lambda file: file.write(b"12345"))
    assert events == [("fsync", 5), ("replace", path), ("fsync", "directory")]


def test_a_failed_fsync_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


# ---------------------------------------------------------------------------------- a run's


def test_a_state_comes_back_as_it_was_saved(tmp_path):
    path = checkpoint.save(tmp_path / "checkpoints", 7, state(7), keep=2)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.pop("weights"), state(7)["weights"])
    assert loaded == {"step": 7, "names": ["a", "b"]}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_by_step_not_by_name_or_time(tmp_path, keep):
    steps = [9, 10, 99, 100, 1000]
    for step in steps:
        checkpoint.save(tmp_path, step, state(step), keep)
        os.utime(tmp_path / f"step-{step:09d}.pt", (0, 10_000 - step))
    kept = checkpoint.found(tmp_path)
    assert [checkpoint.step_of(path) for path in kept] == steps[-keep:]
    assert [checkpoint.load(path)["step"] for path in kept] == steps[-keep:]
    assert names(tmp_path) == [path.name for path in kept]


def test_rotation_leaves_other_files_alone(tmp_path):
    others = ["notes.txt", "step-5.pt", "step-000000005.pt.bak", "log.jsonl"]
    for name in others:
        (tmp_path / name).touch()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step), keep=1)
    assert names(tmp_path) == sorted([*others, "step-000000003.pt"])
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-000000003.pt"]


def test_a_save_that_fails_removes_no_older_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        checkpoint.save(tmp_path, 2, {"unsaveable": lambda: None}, keep=1)
    assert names(tmp_path) == ["step-000000001.pt"]
    assert checkpoint.load(tmp_path / "step-000000001.pt")["step"] == 1


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert checkpoint.found(tmp_path) == []
    assert checkpoint.found(tmp_path / "absent") == []


def test_the_step_is_read_from_the_name_alone():
    assert checkpoint.step_of(Path("elsewhere/step-000001234.pt")) == 1234
    for name in ("best.safetensors", "step-1234.pt", "step-000001234.pt.tmp"):
        with pytest.raises(CheckpointError, match=re.escape(name)):
            checkpoint.step_of(Path(name))


# ---------------------------------------------------------------------------------- reading


def refused(path: Path) -> str:
    """The message of the error that loading a file must raise; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_a_missing_checkpoint_is_refused_by_name(tmp_path):
    assert "no such checkpoint" in refused(tmp_path / "step-000000001.pt")
    assert "no such checkpoint" in refused(tmp_path / "absent" / "step-000000001.pt")


def test_a_directory_is_refused_by_name(tmp_path):
    refused(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_file_that_would_execute_something_is_refused_and_not_run(tmp_path, form):
    path, witness = tmp_path / "step-000000001.pt", tmp_path / "executed"
    if form == "torch":
        torch.save({**state(1), "extra": Touch(witness)}, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Touch(witness)}))
    refused(path)
    assert not witness.exists()
    if form == "torch":  # the file is armed: an unsafe reader would have run it
        torch.load(path, weights_only=False)
        assert witness.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path, share):
    path = checkpoint.save(tmp_path, 1, state(1), keep=1)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


def test_a_single_flipped_bit_is_noticed(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1), keep=1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40  # inside the weights
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("content", [b"<html>404 not found</html>", bytes(1000), b"\x80\x02."])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, content):
    path = tmp_path / "step-000000001.pt"
    path.write_bytes(content)
    refused(path)
