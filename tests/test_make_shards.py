"""make_shards.py: the same bytes whoever makes them, whole shards or none, one-line mistakes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import programs
import pytest
from calling import call
from shard_makers import (
    IMAGES,
    SMALL,
    flip,
    ignore,
    members_of,
    sample,
    write_folder,
    write_set,
    write_tar,
)

from data.errors import DataError, ImageError
from data.prepare import processes
from data.prepare.shard_scan import index_folder
from data.prepare.shard_writer import RECORD, Options, write_shard, write_shards
from data.shards import index as shard_index
from data.shards.index import BLOCK, INDEX, PLAN
from data.shards.local import ShardSource
from data.sources import FolderSource, SyntheticSource
from scripts import make_shards

pytestmark = pytest.mark.slow
main = partial(call, make_shards)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    """Shards of the folder, made by the program on two processes; not to be changed."""
    out = tmp_path_factory.mktemp("shards") / "new" / "train"
    options = ("--images-per-shard", 4, "--workers", 2)
    finished = programs.run("scripts/make_shards.py", folder, "--out", out, *options)
    assert finished.returncode == 0, finished.stderr
    words = "14 images of 3 classes (n01440764, n01443537, zebra) in 4 shards, 0.1 MB"
    assert finished.stdout == f"{out}: {words}\n"
    assert finished.stderr == ""
    return out


# ---------------------------------------------------------------------------------- what is written


def test_members_are_webdatasets_with_the_files_bytes(folder, made):
    source, members = FolderSource(folder), members_of(made)
    kinds = {".jpeg": "jpg", ".jpg": "jpg", ".png": "png"}
    keys = sorted({name.partition(".")[0] for name in members})
    assert len(keys) == IMAGES
    assert len(members) == 3 * IMAGES
    for i, key in enumerate(keys):  # as many, so that each image has its own
        path = Path(source.name(i))
        encoded, label = source.read(i)
        assert key.startswith(f"{i:02d}-{path.stem[0] if path.stem[0].isascii() else '_'}")
        kind = kinds.get(path.suffix.lower(), path.suffix[1:])
        assert members[f"{key}.{kind}"] == encoded
        assert members[f"{key}.cls"] == str(label).encode()
        assert json.loads(members[f"{key}.json"]) == {
            "name": os.path.relpath(path, folder),
            "class": source.classes[label],
            "label": label,
            "width": 40,
            "height": 30,
        }


def test_a_samples_members_lie_together_and_classes_are_mixed(made):
    mixed = 0
    for path in made.glob("*.tar"):
        with tarfile.open(path) as tar:
            keys = [name.partition(".")[0] for name in tar.getnames()]
        assert all(len(set(keys[i : i + 3])) == 1 for i in range(0, len(keys), 3))
        mixed += keys != sorted(keys)
    assert mixed >= 2


def test_the_index_states_size_and_sha256_of_every_shard(made):
    for shard in shard_index.load(made).shards:
        content = (made / shard.name).read_bytes()
        assert shard.size == len(content)
        assert shard.sha256 == hashlib.sha256(content).hexdigest()


def test_headers_tell_nothing_of_who_wrote_them_and_when(made):
    with tarfile.open(made / "train-00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")


def test_one_process_writes_what_two_do(folder, made, tmp_path):
    assert contents(write_set(folder, tmp_path / "x")) == contents(made)


def test_any_source_can_be_written(made, tmp_path):
    shards, synthetic = ShardSource(made), SyntheticSource(7, 3)
    for name, source in (("shards", shards), ("synthetic", synthetic)):
        write_shards(source, tmp_path / name, SMALL, 1, ignore)
        written = ShardSource(tmp_path / name)
        expected = sorted(source.read(i)[::-1] for i in range(len(source)))
        assert sorted(written.read(i)[::-1] for i in range(len(source))) == expected
        assert written.classes == source.classes


# ---------------------------------------------------------------------------------- interrupted


class Cut(FolderSource):
    """A folder in which reading an image ends the process's work, by an error or a signal."""

    def __init__(self, root: Path, at: int, end) -> None:
        super().__init__(root)
        self.at, self.end = at, end

    def read(self, index: int) -> tuple[bytes, int]:
        if index == self.at:
            self.end()
        return super().read(index)


def tars(folder: Path) -> list[str]:
    return sorted(name for name in contents(folder) if "tar" in name)


def test_killed_and_started_again_writes_the_same_bytes(folder, made, tmp_path):
    out, last = tmp_path / "x", int(ShardSource(made).storage_order[-1])
    if (child := os.fork()) == 0:
        kill = lambda: os.kill(os.getppid(), signal.SIGKILL) or threading.Event().wait()  # noqa: E731
        write_shards(Cut(folder, last, kill), out, SMALL, 1, ignore)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert tars(out) == [f"train-0000{i}.tar" for i in range(3)]
    assert len(list(out.glob(".*.tmp"))) == 1  # of a shard that is not whole
    assert not (out / INDEX).exists()
    before = {name: (out / name).stat().st_mtime_ns for name in tars(out)}

    with pytest.raises(DataError, match="start the command that writes them again"):
        index_folder(out, None, 1, ignore)
    assert contents(write_set(folder, out)) == contents(made)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_an_image_that_cannot_be_read_is_named_and_nothing_of_its_shard_is_seen(
    folder, made, tmp_path
):
    out, second = tmp_path / "x", int(ShardSource(made).storage_order[6])

    def end() -> None:
        raise ImageError("zebra.jpg: cannot be read (Input/output error)")

    with pytest.raises(DataError, match=r"zebra.jpg: cannot be read \(Input/output error\)"):
        write_shards(Cut(folder, second, end), out, SMALL, 1, ignore)
    assert "train-00000.tar" in tars(out)  # perhaps later ones, too
    assert not [name for name in contents(out) if "train-00001" in name or "tmp" in name]
    assert contents(write_set(folder, out)) == contents(made)


def test_a_worker_that_dies_is_told(folder, tmp_path):
    source = Cut(folder, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="a worker process has died"):
        write_shards(source, tmp_path / "x", SMALL, 2, ignore)


def test_a_process_that_hangs_is_told_with_the_image_that_it_has_in_hand(
    folder, tmp_path, monkeypatch, caplog
):
    for name, seconds in (("TIMEOUT_S", 2.0), ("SLOW_S", 0.5), ("LOOK_S", 0.1)):
        monkeypatch.setattr(processes, name, seconds)
    source = Cut(folder, 3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    with pytest.raises(DataError, match=rf"timed out after 2 seconds at {source.name(3)};"):
        write_shards(source, tmp_path / "x", SMALL, 2, ignore)
    assert f"waiting since 0.5 s for {source.name(3)}" in caplog.text


def test_a_full_disk_is_told_by_the_shard_and_leaves_nothing_half_written(
    folder, made, tmp_path, monkeypatch
):
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "train-00001.tar":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    out = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=f"No space left on device: '{out}/train-00001.tar'"):
            write_set(folder, out)
    assert not [name for name in contents(out) if "train-00001" in name or "tmp" in name]
    assert contents(write_set(folder, out)) == contents(made)


def test_a_finished_set_is_left_as_it_is(folder, made):
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    status, told, _ = main(folder, "--out", made, "--images-per-shard", 4)
    assert (status, told.partition(":")[0]) == (0, str(made))
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


OTHERS = {
    "options": ({"images_per_shard": 5}, "images_per_shard is 4, not 5"),
    "resized": ({"images_per_shard": 4, "shorter_side": 20}, "shorter_side is None, not 20"),
}


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("what", OTHERS)
def test_shards_with_other_options_are_refused(folder, made, tmp_path, what, is_finished):
    out = shutil.copytree(made, tmp_path / "x")
    if not is_finished:
        (out / INDEX).unlink()
    changes, words = OTHERS[what]
    before = contents(out)
    with pytest.raises(DataError, match=re.escape(words)):
        write_set(folder, out, Options("train", **changes))
    assert contents(out) == before


def test_shards_of_other_images_are_refused(folder, made, tmp_path):
    other = write_folder(tmp_path / "train")
    (other / "zebra" / "1.jpg").rename(other / "zebra" / "2.jpg")
    with pytest.raises(DataError, match=r"holds shards of other images or options .*names_sha256"):
        write_set(other, made)


def test_a_folder_that_holds_something_else_is_refused(folder, tmp_path):
    write_tar(tmp_path / "x-0.tar", sample("x", 0))
    for prepare in (lambda: None, lambda: index_folder(tmp_path, None, 1, ignore)):
        prepare()
        before = contents(tmp_path)
        with pytest.raises(DataError, match="holds something else already"):
            write_set(folder, tmp_path)
        assert contents(tmp_path) == before


def test_a_finished_shard_with_other_images_is_refused(folder, made, tmp_path):
    (tmp_path / PLAN).write_bytes((made / PLAN).read_bytes())
    write_tar(tmp_path / "train-00001.tar", sample("x", 0))
    with pytest.raises(DataError, match=r"train-00001.tar: not the shard that was planned"):
        write_set(folder, tmp_path)


def test_two_programs_do_not_write_into_one_folder(folder, tmp_path):
    ready, done = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        wait = lambda: (os.write(ready[1], b"."), os.read(done[0], 1))  # noqa: E731
        write_shards(Cut(folder, 3, wait), tmp_path / "x", SMALL, 1, ignore)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(DataError, match="another process is writing to it"):
            write_set(folder, tmp_path / "x")
    finally:
        os.write(done[1], b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---------------------------------------------------------------------------------- the program


def test_others_shards_are_indexed_verified_and_damage_is_named(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"v-{i}.tar", sample(f"x{i}", i))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    status, told, _ = main("--index", tmp_path, "--classes", names)
    assert status == 0
    assert told.startswith(f"{tmp_path}: 3 images of 3 classes (ant, bee, cat) in 3 shards, ")
    sound = (0, f"{tmp_path}: 3 shards, every byte as indexed\n", "")
    assert main("--verify", tmp_path) == sound

    flip(tmp_path / "v-1.tar", -1)
    (tmp_path / "v-2.tar").unlink()
    damaged = (
        f"make_shards.py: {tmp_path}: 2 of 3 shards are missing, unreadable or damaged: v-1.tar, "
        "v-2.tar; copy or make them anew\n"
    )
    assert main("--verify", tmp_path) == (1, "", damaged)


@pytest.mark.parametrize("option", ["--index", "--verify"])
def test_a_missing_folder_is_one_line_and_exit_status_1(tmp_path, option):
    status, told, error = main(option, tmp_path / "nowhere")
    assert (status, told) == (1, "")
    assert error.startswith(f"make_shards.py: {tmp_path / 'nowhere'}")
    assert error.count("\n") == 1


def test_ctrl_c_ends_the_program_with_nothing_half_written(folder, made, tmp_path):
    images = shutil.copytree(folder, tmp_path / "train")
    blocked = Path(FolderSource(images).name(int(ShardSource(made).storage_order[6])))
    blocked.unlink()
    os.mkfifo(blocked)  # reading it waits for a writer
    out = tmp_path / "x"
    options = ("--images-per-shard", 4, "--workers", 1)
    process = programs.start("scripts/make_shards.py", images, "--out", out, *options)
    with open(blocked, "wb"):
        process.send_signal(signal.SIGINT)
    finished = programs.finish(process)
    assert (finished.returncode, finished.stdout) == (130, "")
    assert finished.stderr == "make_shards.py: stopped; the same command continues\n"
    assert "train-00000.tar" in contents(out)
    assert not [name for name in contents(out) if name == INDEX or "tmp" in name]


@pytest.mark.parametrize(
    "arguments", [[], ["a"], ["a", "--out", "b", "--index", "c"], ["--classes", "a"]]
)
def test_arguments_that_do_not_go_together_are_refused(arguments):
    assert main(*arguments).status == 2


def test_a_shard_of_any_size_ends_as_tar_archives_do(tmp_path):
    """Two blocks of zeros, though what comes before fills its last record."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for blocks in range(RECORD // BLOCK):
        (tmp_path / "images" / "a" / "0.jpg").write_bytes(b"x" * BLOCK * blocks)
        source = FolderSource(tmp_path / "images")
        write_shard(source, np.array([0]), tmp_path / "shard.tar", SMALL)
        content = (tmp_path / "shard.tar").read_bytes()
        assert len(content) % RECORD == 0 and content.endswith(bytes(2 * BLOCK)), blocks
