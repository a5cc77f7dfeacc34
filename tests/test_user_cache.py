"""The user's cache: a folder, or none where there can be none."""

from __future__ import annotations

from pathlib import Path

import pytest

from irv2.network import user_cache


def test_a_folder_of_the_users_cache_is_made_or_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache.folder("native") == tmp_path / "irv2" / "native"
    assert (tmp_path / "irv2" / "native").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache.folder("native") is None
