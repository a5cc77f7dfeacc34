"""A run directory: whom it belongs to, and from where a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from irv2 import engine, optim, rundir
from irv2.checkpoint import CheckpointError
from irv2.config import build

CONFIG = build({"data": {"train": "a", "val": "b"}}).model_dump()
EXPERIMENT = rundir.Experiment(CONFIG, ["cat", "dog"], images_per_epoch=100)


def new_state(step: int = 0) -> engine.TrainState:
    """A tiny network whose weights tell the step."""
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.constant_(model[0].weight, step)
    return engine.TrainState(
        model,
        engine.running_average(model, 0.9),
        optim.RMSpropTF(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", enabled=False),
        step,
        images_seen=10 * step,
    )


def save(directory: Path, *steps: int) -> None:
    for step in steps:
        rundir.save(new_state(step), directory, EXPERIMENT, keep=9)


def restored(
    directory: Path, resume: str = "auto", experiment: rundir.Experiment = EXPERIMENT
) -> tuple[int, int, float, list[str]]:
    """(step, images seen, a weight, what was said)."""
    state, said = new_state(), []
    rundir.restore(state, directory, resume, experiment, said.append)
    return state.step, state.images_seen, state.model[0].weight[0, 0].item(), said


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    assert restored(tmp_path) == (0, 0, 0.0, [])
    save(tmp_path, 3, 12)
    step, images_seen, weight, said = restored(tmp_path)
    assert (step, images_seen, weight) == (12, 120, 12.0)
    assert len(said) == 1 and "after step 12" in said[0]


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path: Path) -> None:
    save(tmp_path, 3, 12)
    newest = rundir.checkpoints(tmp_path)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    step, _, weight, said = restored(tmp_path)
    assert (step, weight) == (3, 3.0)
    assert said[0].startswith("passed over: ") and str(newest) in said[0]


def test_a_run_with_only_damaged_checkpoints_never_begins_anew(tmp_path: Path) -> None:
    save(tmp_path, 3, 12)
    for path in rundir.checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be read"):
        restored(tmp_path)


def test_the_same_resume_path_begins_and_then_continues(tmp_path: Path) -> None:
    save(tmp_path / "old", 5)
    origin = str(tmp_path / "old")
    assert restored(tmp_path / "new", origin)[0] == 5
    save(tmp_path / "new", 8)
    assert restored(tmp_path / "new", origin)[0] == 8


def test_never_refuses_a_run_that_is_there(tmp_path: Path) -> None:
    assert restored(tmp_path, "never")[0] == 0
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="already holds a run up to step 5"):
        restored(tmp_path, "never")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (rundir.Experiment(CONFIG, ["cat", "cow"], 100), "classes: 2 before, 2 now, or renamed"),
        (rundir.Experiment(CONFIG, ["cat", "dog"], 99), "training images: 100 -> 99"),
        (
            rundir.Experiment({**CONFIG, "ema": {"decay": 0.5}}, ["cat", "dog"], 100),
            "ema.decay: 0.9999 -> 0.5",
        ),
    ],
)
def test_another_experiment_is_refused(tmp_path, other, words) -> None:
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=words):
        restored(tmp_path, experiment=other)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt: not a checkpoint of train\.py"):
        restored(tmp_path / "run", str(tmp_path / "weights.pt"))
    with pytest.raises(CheckpointError, match=r"absent\.pt: no such checkpoint"):
        restored(tmp_path / "run", str(tmp_path / "absent.pt"))


def test_two_programs_cannot_work_in_one_run(tmp_path: Path) -> None:
    first = rundir.lock(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"another train\.py is at work"):
        rundir.lock(tmp_path / "run")
    first.close()
    rundir.lock(tmp_path / "run").close()
