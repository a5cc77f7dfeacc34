"""scripts/inspect_checkpoint.py on a run and on single checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from programs import run
from test_rundir import save

from irv2 import checkpoint, rundir

SCRIPT = "scripts/inspect_checkpoint.py"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3 and 12."""
    save(tmp_path, 3, 12)
    return tmp_path


def test_a_run_shows_its_newest_checkpoint_and_every_files_sha256(directory):
    result = run(SCRIPT, directory)
    assert result.returncode == 0, result.stderr
    newest = rundir.checkpoints(directory)[-1]
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert rows["step"].split() == ["step", "12"]
    assert rows["images"].split() == ["images", "seen", "120"]
    assert "torch" in rows["written"]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "meta.json"):
        content = (newest / name).read_bytes()
        assert rows[name].split()[-1] == hashlib.sha256(content).hexdigest()
        assert rows[name].split()[-2] == f"{len(content):,}"
    assert rows["model.safetensors"].split()[1] == "2"  # weight and bias


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_shown(directory):
    newest = rundir.checkpoints(directory)[-1]
    (newest / "ema.safetensors").write_bytes(b"")
    result = run(SCRIPT, directory)
    assert result.returncode == 0
    assert f"passed over: {newest}: ema.safetensors does not match" in result.stdout
    assert "step-000000003" in result.stdout
    result = run(SCRIPT, newest)
    assert result.returncode == 1 and "ema.safetensors does not match" in result.stderr


@pytest.mark.parametrize("kind", ["absent", "empty folder", "another's checkpoint"])
def test_what_is_no_checkpoint_is_told_in_a_line(tmp_path, kind):
    path = tmp_path / "absent"
    if kind == "empty folder":
        path = tmp_path
    elif kind == "another's checkpoint":
        path = checkpoint.save(tmp_path, 1, {"model": {}}, {"step": 1})
    result = run(SCRIPT, path)
    assert result.returncode == 1
    assert str(path) in result.stderr and result.stderr.count("\n") == 1
