"""The disk cache: bounded whatever happens, never in the way, never trusted."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.shards import disk_cache
from data.shards.disk_cache import SECTOR, CacheError, DiskCache

OURS, THEIRS = "0" * 16, "f" * 16
FOLDERS, ROOM = 4, 4  # sectors of each folder
NUMBERS = range(0, 2 * ROOM * FOLDERS, FOLDERS)  # of one folder, twice its room


@pytest.fixture(autouse=True)
def few_folders(monkeypatch) -> None:
    monkeypatch.setattr(disk_cache, "FOLDERS", FOLDERS)


def content(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def cache_in(root: Path, data_set: str = OURS, sectors: int = ROOM) -> DiskCache:
    return DiskCache(str(root), sectors * SECTOR * FOLDERS, data_set)


def sectors(root: Path) -> int:
    """The most sectors that the files of any folder take, those without a name among them."""
    return max(
        sum(-(-path.stat().st_size // SECTOR) for path in folder.iterdir() if path.name != ".tally")
        for folder in root.iterdir()
    )


def test_what_was_put_is_found_by_others_under_its_number_and_data_set(tmp_path):
    cache_in(tmp_path).put(7, content(7))
    other = cache_in(tmp_path)
    assert other.has(7)
    assert other.get(7) == content(7)
    assert other.get(8) is None
    assert cache_in(tmp_path, THEIRS).get(7) is None
    other.discard(7)
    assert not other.has(7)
    other.discard(7)


def test_a_data_set_larger_than_the_cache_keeps_what_it_has(tmp_path):
    cache = cache_in(tmp_path)
    for number in NUMBERS:
        cache.put(number, content(number))
    assert [number for number in NUMBERS if cache.has(number)] == [*NUMBERS[:ROOM]]
    assert sectors(tmp_path) == ROOM


def test_the_least_recently_used_of_other_data_sets_make_way(tmp_path):
    others, numbers = cache_in(tmp_path, THEIRS), NUMBERS[:ROOM]
    for age, number in enumerate(numbers):
        others.put(number, content(number))
        day = time.time() - 86400 * (10 - age)
        os.utime(others._path(number), (day, day))
    assert others.get(0) == content(0)  # the oldest is used again
    ours = cache_in(tmp_path)
    ours.put(0, content(0))  # to 0.9 of the room
    assert [others.has(number) for number in numbers] == [True, False, False, True]
    assert ours.get(0) == content(0)
    for number in numbers:
        ours.put(number, content(number))
    assert [ours.has(number) for number in numbers] == [True] * ROOM
    assert sectors(tmp_path) == ROOM


def test_keeping_finds_a_share_again_where_making_way_would_not():
    """The reason for keeping, computed for both: half of the images fit."""
    rng, count = np.random.default_rng(0), 2000
    kept: list[int] = []  # least recently used first
    for _ in range(4):
        found = 0
        for image in rng.permutation(count).tolist():
            if image in kept:
                found += 1
                kept.remove(image)
            kept.append(image)
            del kept[: -count // 2]
    f = 0.5
    assert found / count == pytest.approx(f + (1 - f) * np.log(1 - f), abs=0.03)
    assert found / count < 0.2 < f


def test_other_files_are_neither_counted_nor_removed(tmp_path):
    cache = cache_in(tmp_path)
    (tmp_path / "00" / "thesis.tex").write_bytes(b"x" * ROOM * SECTOR)
    for number in NUMBERS:
        cache.put(number, content(number))
    assert cache.has(0)
    assert (tmp_path / "00" / "thesis.tex").exists()


def test_a_lost_or_wrong_tally_is_counted_again(tmp_path):
    for damage in (b"", b"?" * 20, b"%020d" % 10**15):
        (tmp_path / "00").mkdir(exist_ok=True)
        (tmp_path / "00" / ".tally").write_bytes(damage)
        cache = cache_in(tmp_path)
        cache.put(0, content(0))
        assert cache.get(0) == content(0)
        cache.discard(0)


def hammer(root: Path, seed: int) -> None:
    """Put and get without end; exit status 1 at a content that is not whole."""
    rng, caches = random.Random(seed), [cache_in(root, name) for name in (OURS, THEIRS)]
    while True:
        cache, number = rng.choice(caches), rng.randrange(2 * FOLDERS, 16 * FOLDERS, FOLDERS)
        cache.put(number, content(number, 3000 + number))
        found = cache.get(number)
        if found is not None and found != content(number, 3000 + number):
            os._exit(1)


@pytest.mark.slow
def test_killed_at_any_time_among_others_it_stays_bounded_and_whole(tmp_path):
    cache_in(tmp_path)
    rng = random.Random(0)
    for round_ in range(12):
        children = []
        for worker in range(3):
            if (child := os.fork()) == 0:
                try:
                    hammer(tmp_path, 10 * round_ + worker)
                finally:
                    os._exit(2)
            children.append(child)
        time.sleep(rng.uniform(0.01, 0.1))
        for child in children:
            os.kill(child, signal.SIGKILL)
        ends = [os.waitpid(child, 0)[1] for child in children]
        assert [os.WTERMSIG(end) for end in ends] == [signal.SIGKILL] * 3
        # One file that was being written may remain without a name.
        assert sectors(tmp_path) <= ROOM + 1
    cache = cache_in(tmp_path)
    for number in range(2 * FOLDERS, 16 * FOLDERS, FOLDERS):
        assert cache.get(number) in (None, content(number, 3000 + number))


def test_a_folder_that_cannot_be_written_is_refused_with_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'file'}: ") + ".*data.cache_dir"):
        cache_in(tmp_path / "file")


def test_the_size_of_a_cache_is_that_of_its_files_in_sectors(tmp_path):
    assert disk_cache.size_of(str(tmp_path / "none")) == 0
    for number, size in enumerate((1, SECTOR, SECTOR + 1)):
        cache_in(tmp_path).put(number, content(number, size))
    assert disk_cache.size_of(str(tmp_path)) == 4 * SECTOR


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    cache = cache_in(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        cache.put(3, content(3))
    assert [path.name for path in (tmp_path / "03").iterdir()] == [".tally"]


# ------------------------------------------------------------------------- what others put there


def test_links_that_were_planted_change_nothing_elsewhere(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache, root = cache_in(tmp_path / "cache"), tmp_path / "cache"
    (root / "03" / ".new").symlink_to(victim)
    (root / "03" / f"{OURS}-7").symlink_to(victim)
    cache.put(7, content(7))
    assert cache.get(7) == content(7)
    (root / "02" / ".tally").unlink()
    (root / "02" / ".tally").symlink_to(victim)
    with pytest.raises(OSError, match="is a symbolic link"):
        cache.put(6, content(6))
    with pytest.raises(CacheError, match="is a symbolic link"):
        cache_in(root)
    assert victim.read_bytes() == b"precious"


def test_a_folder_of_the_cache_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "00").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(CacheError, match="00 is a symbolic link"):
        cache_in(tmp_path / "cache")


def test_a_content_that_is_a_pipe_is_as_good_as_none(tmp_path):
    cache = cache_in(tmp_path)
    os.mkfifo(cache._path(7))
    assert cache.get(7) is None
