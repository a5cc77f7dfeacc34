"""The user's cache of compiled code: private, or a temporary one, or none."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile

from data import user_cache
from data.native import native


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(user_cache, "_said", set())
    return tmp_path / "cache"


def doubled(values: np.ndarray) -> np.ndarray:
    return values * 2


def test_a_folder_of_the_users_cache_is_made_for_the_user_alone(home, caplog):
    assert user_cache.folder("native") == home / "irv2" / "native"
    assert {path.stat().st_mode & 0o777 for path in home.rglob("*")} == {0o700}
    assert caplog.messages == []


@pytest.mark.parametrize("harmed", ["irv2", "irv2/native"])
def test_a_cache_that_others_can_write_to_is_not_used(home, caplog, harmed):
    (home / "irv2" / "native").mkdir(parents=True)
    (home / harmed).chmod(0o777)
    path = user_cache.folder("native")
    assert home not in path.parents and path.parent.stat().st_mode & 0o777 == 0o700
    assert "others may write there" in caplog.text


def test_another_users_cache_is_not_used(home, caplog, monkeypatch):
    (home / "irv2").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: (home / "irv2").stat().st_uid + 1)
    assert home not in user_cache.folder("native").parents
    assert "it belongs to another user" in caplog.text


def test_a_cache_that_cannot_be_made_is_a_temporary_one_or_none(home, caplog, monkeypatch):
    home.touch()
    assert user_cache.folder("native").is_dir()
    monkeypatch.setattr(user_cache, "_temporary", lambda: str(home))
    assert user_cache.folder("native") is None
    assert len(caplog.messages) == 1


def test_compiled_code_is_found_again():
    first, second = native(doubled), native(doubled)
    assert first(np.ones(2)).tolist() == second(np.ones(2)).tolist() == [2, 2]
    assert sum(first.stats.cache_misses.values()) == sum(second.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_function_whose_kept_code_was_cut_short_is_compiled_and_kept_again(home, suffix, share):
    native(doubled)(np.ones(2))
    (path,) = home.rglob(f"*{suffix}")
    os.truncate(path, int(share * path.stat().st_size))
    functions = [native(doubled) for _ in range(2)]
    assert all(function(np.ones(2)).tolist() == [2, 2] for function in functions)
    hits = [sum(function.stats.cache_hits.values()) for function in functions]
    assert hits == [0, 1]


def test_a_function_is_compiled_also_where_its_code_finds_no_room(caplog, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexDataCacheFile, "save", refuse)
    for _ in range(2):
        assert native(doubled)(np.ones(2)).tolist() == [2, 2]
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.text


def test_torch_compile_gets_a_folder_of_the_cache_that_has_room(home, caplog, monkeypatch):
    """Never PyTorch's own choice, whose name in /tmp anyone can foresee."""
    given = []
    monkeypatch.setenv(user_cache.INDUCTORS, "")  # and at the end as it was
    for disk in (tempfile.TemporaryFile, lambda **_: open("/dev/full", "wb")):  # noqa: SIM115
        monkeypatch.delenv(user_cache.INDUCTORS)
        monkeypatch.setattr(tempfile, "TemporaryFile", disk)
        user_cache.give_inductor_its_own("2.0")
        given.append(Path(os.environ[user_cache.INDUCTORS]))
    assert given[0] == home / "irv2" / "inductor-2.0" and home not in given[1].parents
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.text
    user_cache.give_inductor_its_own("2.0")
    assert os.environ[user_cache.INDUCTORS] == str(given[1])  # one that is named is kept
