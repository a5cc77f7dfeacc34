"""prepare_imagenet.py: torchvision's tree from the same archives; nothing half-written, ever."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import imagenet_miniature as miniature
import pytest
import torchvision.datasets.imagenet as peer
from imagenet_miniature import tree, write_archives
from programs import run as run_program
from shard_makers import flip

from data.ilsvrc import BLACKLIST, ILSVRC2012, Expected
from data.prepare import checksums, folder_writer
from data.prepare.progress import byte_bar
from data.shards.local import ShardSource
from data.sources import open_source
from scripts import prepare_imagenet
from scripts.prepare_imagenet import STATE

CLASSES = sorted(miniature.NUMBERS)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Not to wait for all that this machine has to write."""
    monkeypatch.setattr(os, "sync", lambda: None)


def below(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """Contents of a folder's files by their names in it."""
    return {
        name.removeprefix(folder): content
        for name, content in files.items()
        if name.startswith(folder)
    }


@pytest.fixture(scope="module")
def expected_tree(tmp_path_factory) -> dict[str, bytes]:
    """The data set that torchvision makes of the archives."""
    folder = tmp_path_factory.mktemp("peer")
    expected = write_archives(folder)
    with pytest.MonkeyPatch.context() as patch:
        meta = {role: getattr(expected, role)[:2] for role in ("train", "val", "devkit")}
        patch.setattr(peer, "ARCHIVE_META", meta)
        for split in ("train", "val"):
            peer.ImageNet(folder, split)
    files = tree(folder)
    return {name: files[name] for name in files if name.startswith(("train/", "val/"))}


class Preparation:
    """The archives in a folder and what becomes of them."""

    def __init__(self, folder: Path) -> None:
        self.archives, self.out = folder / "archives", folder / "out"
        self.expected: Expected = write_archives(self.archives)

    def arguments(self, *more: str) -> list[str]:
        return ["--from", str(self.archives), "--out", str(self.out), "--workers", "2", *more]

    def run(self, *more: str) -> int:
        return prepare_imagenet.main(self.arguments(*more), self.expected)

    def images(self) -> dict[str, bytes]:
        """Everything in the result but the program's own notes."""
        files = tree(self.out)
        return {name: files[name] for name in files if name not in (STATE, BLACKLIST)}


@pytest.fixture
def preparation(tmp_path) -> Preparation:
    return Preparation(tmp_path)


# ---------------------------------------------------------------------------------- the result


def test_the_tree_is_torchvisions(preparation, expected_tree, capsys):
    assert preparation.run() == 0
    assert preparation.images() == expected_tree
    assert sorted(os.listdir(preparation.out)) == [STATE, BLACKLIST, "train", "val"]
    assert (preparation.out / BLACKLIST).read_bytes() == miniature.BLACKLIST
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"{preparation.out}/train: 14 images of 4 classes",
        f"{preparation.out}/val: 8 images of 4 classes",
    ]


def test_a_second_run_reads_no_archive_through_and_changes_nothing(preparation, capsys):
    assert preparation.run() == 0
    before = {path: path.stat().st_mtime_ns for path in preparation.out.rglob("*/*")}
    capsys.readouterr()
    assert preparation.run() == 0
    assert capsys.readouterr().out.count("md5 was right") == 3
    assert {path: path.stat().st_mtime_ns for path in preparation.out.rglob("*/*")} == before


def test_the_validation_images_alone_need_no_training_archive(preparation, expected_tree):
    (preparation.archives / ILSVRC2012.train.name).unlink()
    assert preparation.run("--only", "val") == 0
    assert {*preparation.images()} == {name for name in expected_tree if name[:4] == "val/"}
    assert below(preparation.images(), "val/") == below(expected_tree, "val/")
    preparation.expected = write_archives(preparation.archives)
    assert preparation.run("--only", "train") == 0
    assert preparation.images() == expected_tree


def test_an_original_archive_may_be_named_itself(preparation, expected_tree):
    preparation.archives /= ILSVRC2012.val.name
    assert preparation.run("--only", "val") == 0
    assert below(preparation.images(), "val/") == below(expected_tree, "val/")


def test_a_class_that_was_removed_is_written_anew(preparation, expected_tree):
    assert preparation.run() == 0
    shutil.rmtree(preparation.out / "train" / CLASSES[1])
    assert preparation.run() == 0
    assert preparation.images() == expected_tree


# ---------------------------------------------------------------------------------- interruption


def harmed(preparation: Preparation, *more: str, where: object = Path, **faults: Callable) -> int:
    """Run in another process in which `faults` replace functions; returns its exit status."""

    def child() -> None:
        for name, fault in faults.items():
            setattr(where, name, fault)
        os._exit(preparation.run(*more))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode


def kill_at(event: int) -> dict[str, Callable]:
    """Functions of Path with SIGKILL in the n-th write, half-way, or rename."""
    count, lock = iter(range(1, 1000)), threading.Lock()
    write, rename = Path.write_bytes, Path.rename

    def write_bytes(path: Path, content: bytes) -> int:
        with lock:
            if next(count) == event:
                write(path, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    def rename_to(path: Path, target: Path) -> Path:
        with lock:
            if next(count) == event:
                os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    return {"write_bytes": write_bytes, "rename": rename_to}


def check_nothing_half_written(out: Path, whole: dict[str, bytes]) -> None:
    """Whatever has its final name is as it should be."""
    for split in ("train", "val"):
        for folder, names in ((out / split, CLASSES), (out / f"{split}.partial", [])):
            if not folder.exists():
                continue
            present = {path.name for path in folder.iterdir() if path.suffix != ".partial"}
            assert present >= set(names)
            for name in present:
                assert tree(folder / name) == below(whole, f"{split}/{name}/")


@pytest.mark.slow
def test_killed_anywhere_and_run_again_the_tree_is_the_same(
    preparation, expected_tree, monkeypatch
):
    monkeypatch.setattr(folder_writer, "FLUSH_BYTES", 2000)  # two classes or so
    events = 22 + 8 + 2  # images, classes, splits
    for event in (*range(1, events, 3), events - 1, events):
        shutil.rmtree(preparation.out, ignore_errors=True)
        assert harmed(preparation, **kill_at(event)) == -signal.SIGKILL
        check_nothing_half_written(preparation.out, expected_tree)
        assert preparation.images() != expected_tree
        assert preparation.run() == 0
        assert preparation.images() == expected_tree
    shutil.rmtree(preparation.out)
    assert harmed(preparation, **kill_at(events + 1)) == 0


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(preparation, expected_tree, capfd):
    write = Path.write_bytes

    def interrupted(path: Path, content: bytes) -> int:
        if path.name == "n02119789_7.JPEG":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # for the main thread to hear it
        return write(path, content)

    assert harmed(preparation, write_bytes=interrupted) == 130
    assert "the same command goes on" in capfd.readouterr().err
    begun = preparation.out / "train.partial" / "n02119789.partial"
    assert os.listdir(begun) == ["n02119789_7.JPEG"]  # none of its class after that
    check_nothing_half_written(preparation.out, expected_tree)
    assert preparation.run() == 0
    assert preparation.images() == expected_tree


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    preparation, expected_tree, monkeypatch, capsys
):
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert preparation.run() == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    assert preparation.run() == 0
    assert preparation.images() == expected_tree


# ---------------------------------------------------------------------------------- shards


def check_shards_are_the_folders(out: Path, whole: dict[str, bytes], folder: Path) -> None:
    """Image by image, in the same order."""
    for name, content in whole.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for split in ("train", "val"):
        shards, files = open_source(str(out / split)), open_source(str(folder / split))
        assert isinstance(shards, ShardSource)
        assert shards.classes == files.classes
        assert len(shards) == len(files)
        for i in range(len(files)):
            assert shards.read(i) == files.read(i)


def test_shards_hold_the_images_of_the_folders(preparation, expected_tree, tmp_path, capsys):
    assert preparation.run("--shards", "--images-per-shard", "5") == 0
    assert len(list(preparation.out.glob("train/train-*.tar"))) == 3
    check_shards_are_the_folders(preparation.out, expected_tree, tmp_path / "folders")
    assert f"{preparation.out}/train: 14 images of 4 classes" in capsys.readouterr().out
    before = tree(preparation.out)
    assert preparation.run("--shards", "--images-per-shard", "5") == 0
    assert tree(preparation.out) == before


def test_shards_are_gone_on_with(preparation, expected_tree, tmp_path):
    replace = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if Path(target).name == "index.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    status = harmed(preparation, "--shards", where=os, replace=replace_or_die)
    assert status == -signal.SIGKILL
    written = {p: p.stat().st_mtime_ns for p in preparation.out.glob("train/*.tar")}
    assert written
    assert preparation.run("--shards") == 0
    assert {p: p.stat().st_mtime_ns for p in preparation.out.glob("train/*.tar")} == written
    check_shards_are_the_folders(preparation.out, expected_tree, tmp_path / "folders")


def test_only_training_images_are_scaled_down(preparation):
    assert preparation.run("--shards", "--shorter-side", "9") == 0
    assert open_source(str(preparation.out / "train")).resized_to == 9
    assert open_source(str(preparation.out / "val")).resized_to is None


def test_shards_and_class_folders_do_not_mix(preparation, capsys):
    assert preparation.run() == 0
    assert "train: holds other things than shards" in refusal(preparation, capsys, "--shards")
    shutil.rmtree(preparation.out)
    assert preparation.run("--shards") == 0
    assert "train: holds other things (index.safetensors, " in refusal(preparation, capsys)


def test_options_of_shards_go_with_shards(preparation, capsys):
    for option in ("--images-per-shard", "--shorter-side"):
        with pytest.raises(SystemExit):
            preparation.run(option, "5")
        assert "go with --shards" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- refusals


def refusal(preparation: Preparation, capsys, *more: str) -> str:
    """The message of a run that is refused with no image written."""
    before = tree(preparation.out)
    assert preparation.run(*more) == 1
    state = {STATE: b""}  # it may change
    assert tree(preparation.out) | state == before | state
    return capsys.readouterr().err


@pytest.mark.slow
def test_all_that_is_missing_is_told_at_once(tmp_path):
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / ILSVRC2012.train.name).write_bytes(b"a piece")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    places = ("--from", tmp_path / "archives", "--out", tmp_path / "out")
    result = run_program("scripts/prepare_imagenet.py", *places)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for part in (
        f"{ILSVRC2012.devkit.name}: not there",
        f"{ILSVRC2012.train.name}: 7 bytes, not 147,897,477,120; download it anew",
        f"{ILSVRC2012.val.name}: not there",
        "https://image-net.org/",
        "holds other things (thesis.txt)",
    ):
        assert part in result.stderr
    assert tree(tmp_path / "out") == {"thesis.txt": b"mine"}


def test_too_little_room_is_told_before_any_work(preparation, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    error = refusal(preparation, capsys)
    assert "0.0 GB are free, 0.0 GB are needed" in error
    assert not preparation.out.exists()


def test_what_is_written_already_needs_no_more_room(preparation, monkeypatch):
    assert preparation.run() == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert preparation.run() == 0


def test_a_wrong_md5_is_refused_unless_told(preparation, expected_tree, capsys):
    path = preparation.archives / ILSVRC2012.train.name
    flip(path, -1)  # after the archive's end
    assert f"{path}: its md5 is" in refusal(preparation, capsys)
    assert preparation.run("--skip-md5") == 0
    assert preparation.images() == expected_tree


def test_a_right_md5_is_forgotten_when_the_file_changes(preparation, capsys):
    assert preparation.run() == 0
    path = preparation.archives / ILSVRC2012.val.name
    flip(path, 600)
    assert f"{path}: its md5 is" in refusal(preparation, capsys)


def test_a_state_file_cut_short_and_hidden_files_are_no_harm(preparation):
    preparation.out.mkdir()
    (preparation.out / STATE).write_text('{"a": [')
    (preparation.out / ".DS_Store").touch()
    assert preparation.run() == 0
    assert preparation.run() == 0


def test_a_second_program_at_work_in_the_same_folder_is_refused(preparation, capsys):
    def other() -> None:
        with checksums.remembered(preparation.out / STATE):
            ready.set()
            done.wait(30)

    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=other)
    process.start()
    try:
        assert ready.wait(30)
        assert "out: another process is at work in it" in refusal(preparation, capsys)
    finally:
        done.set()
        process.join()


def test_foreign_things_in_the_result_are_left_alone_and_named(preparation, capsys):
    (preparation.out / "train" / "cats").mkdir(parents=True)
    (preparation.out / "train" / "cats" / "tom.jpg").touch()
    assert "train: holds other things (cats)" in refusal(preparation, capsys)


def test_files_that_differ_are_counted_by_class(preparation, expected_tree, capsys):
    assert preparation.run() == 0
    folder = preparation.out / "train" / "n02100735"
    (folder / "n02100735_9.JPEG").unlink()
    (folder / "n02100735_10.JPEG").write_bytes(b"short")
    (folder / "mine.txt").touch()
    (preparation.out / "val" / "n01440764" / "ILSVRC2012_val_00000004.JPEG").unlink()
    assert (
        "  n02100735: 4 images expected, 1 missing (n02100735_9.JPEG), "
        "1 of another size (n02100735_10.JPEG), 1 extra (mine.txt)\n"
    ) in refusal(preparation, capsys)
    shutil.rmtree(folder)
    assert preparation.run() == 1
    assert "n01440764: 2 images expected, 1 missing" in capsys.readouterr().err
    shutil.rmtree(preparation.out / "val" / "n01440764")
    assert preparation.run() == 0
    assert preparation.images() == expected_tree


def test_a_write_that_loses_bytes_is_noticed_at_the_end(preparation, monkeypatch, capsys):
    write = Path.write_bytes

    def losing(path: Path, content: bytes) -> int:
        return write(path, content[: 4 * len(content) // 5])

    monkeypatch.setattr(Path, "write_bytes", losing)
    assert preparation.run() == 1
    assert "2 of another size" in capsys.readouterr().err
    assert not (preparation.out / "train").exists()


def test_classes_reach_the_disk_before_they_have_their_names(preparation, monkeypatch):
    events, rename = [], Path.rename

    def spy(path: Path, target: Path) -> Path:
        events.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(os, "sync", lambda: events.append("flushed"))
    monkeypatch.setattr(Path, "rename", spy)
    assert preparation.run("--only", "val") == 0
    classes, rest = events[1:5], events[5:]
    assert (events[0], sorted(classes), rest) == ("flushed", CLASSES, ["val", "flushed"])


def test_bars_are_shown_on_terminals_only(monkeypatch):
    for is_terminal in (False, True):
        stderr = io.StringIO()
        monkeypatch.setattr(stderr, "isatty", lambda shown=is_terminal: shown, raising=False)
        monkeypatch.setattr(sys, "stderr", stderr)
        with byte_bar("md5 of x.tar", 2000) as bar:
            bar.update(1000)
        assert ("md5 of x.tar" in stderr.getvalue()) == is_terminal
