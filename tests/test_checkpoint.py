"""Checkpoints are written whole or not at all, checksummed, rotated by step, never executed."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small_meta
import torch

from irv2.run import checkpoint
from irv2.run.checkpoint import CheckpointError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def parts(step: int) -> checkpoint.Parts:
    weights = torch.full((64, 64), float(step))
    return {"model": {"weight": weights, "count": torch.tensor(step)}, "ema": {"weight": -weights}}


def save(directory: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(directory, n, parts(n), small_meta.meta(n)) for n in steps]


def kept_steps(directory: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_all(directory)]


# ---------------------------------------------------------------------------------- a run's


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    (path,) = save(tmp_path / "checkpoints", 7)
    loaded = checkpoint.load(path)
    assert loaded.path == path
    assert loaded.parts.keys() == {"model", "ema"}
    for part, tensors in parts(7).items():
        assert loaded.parts[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded.parts[part][name].dtype == tensor.dtype
            assert torch.equal(loaded.parts[part][name], tensor)
    assert loaded.meta == {**small_meta.meta(7), "parts": ["model", "ema"]}
    assert checkpoint.load(path, only=["ema"]).parts.keys() == {"ema"}


def test_the_checksums_are_those_of_sha256sum(tmp_path):
    (path,) = save(tmp_path, 7)
    command = ["sha256sum", "--check", "--strict", checkpoint.SUMS]
    output = subprocess.run(command, cwd=path, capture_output=True, text=True, check=True).stdout
    assert output.count(": OK") == 3
    listed = dict(line.split("  ")[::-1] for line in (path / "SHA256SUMS").read_text().splitlines())
    assert checkpoint.load(path).sums == listed


def test_everything_reaches_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, events
):
    save(tmp_path, 1)
    new, final = tmp_path / ".step-000000001.new", tmp_path / "step-000000001"
    files = ["model.safetensors", "ema.safetensors", "meta.json", "SHA256SUMS"]
    assert [event[:2] for event in events] == [
        *(("fsync", new / name) for name in files),
        ("fsync", new),
        ("rename", final),
        ("fsync", tmp_path),
    ]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_by_step_not_by_name_or_time(tmp_path, keep):
    steps = [9, 10, 99, 100, 1000]
    for step in steps:
        (path,) = save(tmp_path, step)
        os.utime(path, (0, 10_000 - step))
        checkpoint.prune(tmp_path, keep)
    assert kept_steps(tmp_path) == steps[-keep:]
    assert names(tmp_path) == [path.name for path in checkpoint.list_all(tmp_path)]


def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path):
    """Else two damaged new ones would push out the last good one."""
    paths = save(tmp_path, 1, 2, 3, 4)
    for path in paths[2:]:
        (path / "model.safetensors").write_bytes(b"")
    checkpoint.prune(tmp_path, keep=1)
    assert kept_steps(tmp_path) == [2, 3, 4]
    (paths[1] / "meta.json").unlink()
    checkpoint.prune(tmp_path, keep=1)
    assert kept_steps(tmp_path) == [2, 3, 4]


def test_rotation_leaves_other_files_alone_and_clears_what_killed_saves_left(tmp_path):
    others = ["notes.txt", "step-5", "step-000000005.bak", "log.jsonl", ".step-notes"]
    for name in others:
        (tmp_path / name).touch()
    for name in (".step-000000002.new", ".step-000000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    save(tmp_path, 1, 2, 3)
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == sorted([*others, "step-000000003"])


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (path,) = save(tmp_path, 3)
    (path / "ema.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    assert checkpoint.load(path).meta["step"] == 3
    assert names(tmp_path) == ["step-000000003"]


@pytest.mark.parametrize("call", range(6))
def test_a_save_that_fails_leaves_the_old_checkpoints_and_nothing_else(tmp_path, monkeypatch, call):
    """An input/output error in each of the calls that flush a file or folder."""
    save(tmp_path, 1)
    calls, fsync = iter(range(9)), os.fsync

    def fail(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"step-000000002: cannot be written .*output error"):
        save(tmp_path, 2)
    assert checkpoint.load(tmp_path / "step-000000001").meta["step"] == 1
    if call < 5:  # the last call flushes the new name itself
        assert names(tmp_path) == ["step-000000001"]


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert checkpoint.list_all(tmp_path) == []
    assert checkpoint.list_all(tmp_path / "absent") == []


def test_a_directory_that_cannot_be_listed_does_not_look_empty(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(NotADirectoryError):
        checkpoint.list_all(tmp_path / "checkpoints")


def test_nothing_is_read_where_nothing_is_to_be_removed(tmp_path, monkeypatch):
    save(tmp_path, 1, 2, 3)
    monkeypatch.setattr(checkpoint, "is_whole", lambda path: pytest.fail("read"))
    checkpoint.prune(tmp_path, keep=3)
    assert kept_steps(tmp_path) == [1, 2, 3]


def test_of_many_to_keep_two_are_read_back(tmp_path, monkeypatch):
    save(tmp_path, *range(1, 9))
    is_whole, seen = checkpoint.is_whole, []
    monkeypatch.setattr(checkpoint, "is_whole", lambda p: seen.append(p) or is_whole(p))
    checkpoint.prune(tmp_path, keep=6)
    assert kept_steps(tmp_path) == [3, 4, 5, 6, 7, 8]
    assert [checkpoint.step_of(path) for path in seen] == [8, 7]


def test_a_read_error_of_the_moment_is_not_taken_for_damage(tmp_path, monkeypatch):
    (path,) = save(tmp_path, 1)

    def fail(_path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "read_regular", fail)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["meta.json", "SHA256SUMS", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_is_damage(tmp_path, name):
    (path,) = save(tmp_path, 1)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read \\(not a regular file\\)"):
        checkpoint.load(path)


def test_the_step_is_read_from_the_name_alone():
    assert checkpoint.step_of(Path("elsewhere/step-000001234")) == 1234
    for name in ("best.safetensors", "step-1234", "step-000001234.unusable"):
        with pytest.raises(CheckpointError, match=re.escape(name)):
            checkpoint.step_of(Path(name))


# ---------------------------------------------------------------------------------- reading


def refused(path: Path) -> str:
    """The message of the error that loading a checkpoint must raise; it names the checkpoint."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert not checkpoint.is_whole(path)
    return message


def test_a_missing_checkpoint_is_refused_by_name(tmp_path):
    assert "no such checkpoint" in refused(tmp_path / "step-000000001")
    assert "no such checkpoint" in refused(tmp_path / "absent" / "step-000000001")
    (tmp_path / "file").touch()
    assert "a file, not a checkpoint's folder" in refused(tmp_path / "file")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "meta.json", "SHA256SUMS"]
)
def test_a_missing_or_emptied_file_is_named(tmp_path, file):
    (path,) = save(tmp_path, 1)
    (path / file).write_bytes(b"")
    assert file in refused(path)
    (path / file).unlink()
    assert f"{file} cannot be read (No such file" in refused(path)


def positions(path: Path, count: int, rng: random.Random) -> list[tuple[Path, int]]:
    """`count` bytes of a checkpoint, every file in turn so that small ones get their share."""
    files = sorted(path.iterdir())
    chosen = (files[i % len(files)] for i in range(count))
    return [(file, rng.randrange(file.stat().st_size)) for file in chosen]


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_harm_at_any_of_200_places_is_noticed(tmp_path, harm):
    (path,) = save(tmp_path, 1)
    rng = random.Random(0)
    unnoticed = []
    for file, offset in positions(path, 200, rng):
        whole = file.read_bytes()
        harmed = bytearray(whole[:offset] if harm == "truncated" else whole)
        if harm == "flipped":
            harmed[offset] ^= 1 << rng.randrange(8)
        file.write_bytes(harmed)
        try:
            checkpoint.load(path)
            unnoticed.append((file.name, offset))
        except CheckpointError:
            file.write_bytes(whole)
    assert unnoticed == []
    assert checkpoint.load(path).meta["step"] == 1  # and without harm it loads


def test_a_part_that_its_checksums_leave_out_is_missed(tmp_path):
    (path,) = save(tmp_path, 1)
    sums = (path / "SHA256SUMS").read_text().splitlines(keepends=True)
    (path / "SHA256SUMS").write_text("".join(line for line in sums if "ema" not in line))
    assert "does not name the parts" in refused(path)


def sign(path: Path, *more: str) -> None:
    """Write a checkpoint's checksums anew, of its files and `more`, as sha256sum makes them."""
    files = sorted([*(file.name for file in path.iterdir() if file.name != checkpoint.SUMS), *more])
    command = ["sha256sum", *files]
    sums = subprocess.run(command, cwd=path, capture_output=True, text=True, check=True).stdout
    (path / checkpoint.SUMS).write_text(sums)


def test_names_in_a_checkpoint_cannot_lead_out_of_it(tmp_path):
    (path,) = save(tmp_path, 1)
    (path / "ema.safetensors").rename(tmp_path / "outside.safetensors")
    meta = small_meta.meta(1, parts=["model", "../outside"])
    (path / "meta.json").write_text(json.dumps(meta))
    sign(path, "../outside.safetensors")
    assert "meta.json is not train.py's (parts: 1: " in refused(path)


@pytest.mark.parametrize("content", [b"<html>404 not found</html>", bytes(1000), b"[]", b"\xff{}"])
def test_files_of_another_kind_are_refused_though_their_checksums_match(tmp_path, content):
    (path,) = save(tmp_path, 1)
    for file in ("ema.safetensors", "meta.json"):
        (path / file).write_bytes(content)
        sign(path)
        with pytest.raises(CheckpointError, match=r"step-000000001: "):
            checkpoint.load(path)


# What meta.json may be changed to, by whoever writes its checksum anew, and what is said of it.
HARMED: list[tuple[dict[str, Any], str]] = [
    ({"step": -1}, "step: "),
    ({"step": 2, "images_seen": 8}, "step: 2, in a folder of step 1"),
    ({"step": True}, "step: "),
    ({"step": "1"}, "step: "),
    ({"step": None}, "step: "),
    ({"images_seen": 5}, "images_seen: 5, where the steps make 4"),
    ({"images_seen": 4.0}, "images_seen: "),
    ({"images_seen": math.nan}, "NaN is no number"),
    ({"images_seen": 10**40}, "images_seen: "),
    ({"bad_images": -1}, "bad_images: "),
    ({"bad_steps": [0]}, "bad_steps: "),
    ({"bad_steps_in_a_row": {}}, "bad_steps_in_a_row: "),
    ({"scaler": {"scale": math.inf}}, "Infinity is no number"),
    ({"scaler": 1}, "scaler: "),
    ({"images_per_epoch": 0}, "images_per_epoch: "),
    ({"classes": "ab"}, "classes: "),
    ({"classes": []}, "classes: "),
    ({"classes": ["a", 1]}, "classes: 1: "),
    ({"stored": {"px": "400"}}, "stored: px: "),
    ({"software": ["torch"]}, "software: "),
    ({"software": {"torch": 2}}, "software: torch: "),
    ({"parts": []}, "parts: "),
    ({"parts": "model"}, "parts: "),
    ({"config": []}, "config: "),
    ({"config": small_meta.config(optim=1)}, "config: optim: "),
    ({"config": small_meta.config(data=1)}, "config: data: "),
    ({"config": small_meta.config(model={})}, "config: .*model: blocks: "),
    ({"config": small_meta.config(model={"blocks": [1, 1]})}, "config: .*model: blocks: "),
    ({"config": small_meta.config(model={"blocks": [1, 1, -1]})}, "config: .*blocks: 2: "),
    ({"config": small_meta.config(train={"global_batch": 0})}, "config: .*global_batch: "),
    ({"config": small_meta.config(schedule={"kind": 1})}, "config: .*schedule: kind: "),
]


def rewrite(path: Path, content: bytes) -> None:
    (path / "meta.json").write_bytes(content)
    sign(path)


@pytest.mark.parametrize(("changes", "words"), HARMED)
def test_a_value_that_train_does_not_write_is_refused_by_its_key(tmp_path, changes, words):
    (path,) = save(tmp_path, 1)
    parts = {"parts": ["model", "ema"]}
    rewrite(path, json.dumps({**small_meta.meta(1), **parts, **changes}).encode())
    assert re.search(rf"meta\.json is not train\.py's \(.*{words}", refused(path))


def test_a_key_that_is_missing_is_named(tmp_path):
    (path,) = save(tmp_path, 1)
    whole = json.loads((path / "meta.json").read_bytes())
    for key in whole.keys() - {"stored"}:
        rewrite(path, json.dumps({k: v for k, v in whole.items() if k != key}).encode())
        assert f"({key}: Field required)" in refused(path)
    rewrite(path, json.dumps({**whole, "of another version": [1]}).encode())
    assert checkpoint.load(path).meta == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested too deep"),
        (b'{"step": ' + b"1" * 5000 + b"}", "limit .* digits"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_text_that_a_parser_chokes_on_is_refused(tmp_path, content, words):
    (path,) = save(tmp_path, 1)
    rewrite(path, content)
    assert re.search(words, refused(path))


def test_a_checkpoint_under_another_name_is_read(tmp_path):
    """A checkpoint that people set aside, to begin from it."""
    (path,) = save(tmp_path, 1)
    assert checkpoint.load(path.rename(tmp_path / "the-best")).meta["step"] == 1
