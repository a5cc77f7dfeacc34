"""scripts/inspect_checkpoint.py on a run and on single checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from test_rundir import save

from irv2 import checkpoint, rundir
from scripts import inspect_checkpoint


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The script called with a path -> (exit status, stdout, stderr)."""

    def call(path: Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["inspect_checkpoint.py", str(path)])
        return inspect_checkpoint.main(), *capsys.readouterr()

    return call


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3 and 12."""
    save(tmp_path, 3, 12)
    return tmp_path


def test_a_run_shows_its_newest_checkpoint_and_every_files_sha256(directory, inspect):
    status, out, _ = inspect(directory)
    assert status == 0
    newest = rundir.checkpoints(directory)[-1]
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["step"].split() == ["step", "12"]
    assert rows["images"].split() == ["images", "seen", "120"]
    assert "torch" in rows["written"]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "meta.json"):
        content = (newest / name).read_bytes()
        assert rows[name].split()[-1] == hashlib.sha256(content).hexdigest()
        assert rows[name].split()[-2] == f"{len(content):,}"
    assert rows["model.safetensors"].split()[1] == "2"  # weight and bias


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_shown(directory, inspect):
    newest = rundir.checkpoints(directory)[-1]
    (newest / "ema.safetensors").write_bytes(b"")
    status, out, _ = inspect(directory)
    assert status == 0
    assert f"passed over: {newest}: ema.safetensors does not match" in out
    assert "step-000000003" in out
    status, _, error = inspect(newest)
    assert status == 1 and "ema.safetensors does not match" in error


@pytest.mark.parametrize("kind", ["absent", "empty folder", "another's checkpoint"])
def test_what_is_no_checkpoint_is_told_in_a_line(tmp_path, inspect, kind):
    path = tmp_path / "absent"
    if kind == "empty folder":
        path = tmp_path
    elif kind == "another's checkpoint":
        path = checkpoint.save(tmp_path, 1, {"model": {}}, {"step": 1})
    status, _, error = inspect(path)
    assert status == 1
    assert str(path) in error and error.count("\n") == 1
