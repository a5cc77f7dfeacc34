"""A run directory: whom it belongs to, and from where a run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import ROOT
from torch import nn

from irv2 import checkpoint, engine, jsonl, optim, rundir
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
        state = new_state(step)
        store = directory / "checkpoints"
        checkpoint.save(store, step, state.tensors(), rundir.meta(state, EXPERIMENT))


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
    (newest / "model.safetensors").write_bytes(b"")
    step, _, weight, said = restored(tmp_path)
    assert (step, weight) == (3, 3.0)
    assert said[0].startswith("passed over: ") and str(newest) in said[0]


def test_what_was_passed_over_is_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for step in (12, 15, 12):
        save(tmp_path, step)
        rundir.set_aside_unusable(tmp_path, 3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [
        "step-000000003",
        "step-000000012.unusable",
        "step-000000012.unusable2",
        "step-000000015.unusable",
    ]


@pytest.mark.parametrize("name", ["step-000000900.pt", "step-000000900.unusable"])
def test_a_run_whose_checkpoints_are_none_any_more_never_begins_anew(tmp_path: Path, name) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).touch()
    with pytest.raises(CheckpointError, match=f"holds {name}, but no checkpoint to go on from"):
        restored(tmp_path)


def test_a_checkpoint_of_another_network_among_them_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 3)
    other = rundir.Experiment({**CONFIG, "model": {"blocks": [1, 2, 3]}}, ["cat", "dog"], 100)
    state = new_state(12)
    meta = rundir.meta(state, other)
    checkpoint.save(tmp_path / "checkpoints", 12, state.tensors(), meta)
    step, _, _, said = restored(tmp_path)
    assert step == 3
    assert "passed over" in said[0] and "another experiment (model." in said[0]


def test_a_run_may_begin_from_another_with_another_recipe_but_not_network(tmp_path: Path) -> None:
    save(tmp_path / "old", 5)
    origin = str(tmp_path / "old")
    slower = {**CONFIG, "optim": {**CONFIG["optim"], "lr": 0.02}}
    step, _, _, said = restored(
        tmp_path / "new", origin, rundir.Experiment(slower, ["cat", "dog"], 100)
    )
    assert step == 5
    assert "optim.lr: 0.045 -> 0.02" in said[0]
    other = {**CONFIG, "model": {**CONFIG["model"], "blocks": [1, 1, 1]}}
    with pytest.raises(CheckpointError, match="another experiment"):
        restored(tmp_path / "new", origin, rundir.Experiment(other, ["cat", "dog"], 100))


def test_a_run_with_only_damaged_checkpoints_never_begins_anew(tmp_path: Path) -> None:
    save(tmp_path, 3, 12)
    for path in rundir.checkpoints(tmp_path):
        (path / "meta.json").unlink()
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
            rundir.Experiment(CONFIG, ["cat", "dog"], 100, {"shorter side, px": 400}),
            "training images, shorter side, px: none -> 400",
        ),
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
    for name, words in {"weights.pt": "a file, not", "absent": "no such checkpoint"}.items():
        with pytest.raises(CheckpointError, match=f"{name}: {words}"):
            restored(tmp_path / "run", str(tmp_path / name))
    checkpoint.save(tmp_path, 1, {"model": {}}, {})
    with pytest.raises(CheckpointError, match=r"step-000000001: not a checkpoint of train\.py"):
        restored(tmp_path / "run", str(tmp_path / "step-000000001"))


# Takes the lock, leaves a child behind that has inherited its file, waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from irv2 import rundir
held = rundir.lock(Path(sys.argv[1]))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def test_two_programs_cannot_work_in_one_run_but_a_dead_one_does_not_hold_it(tmp_path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        with pytest.raises(CheckpointError, match=r"another train\.py is at work"):
            rundir.lock(tmp_path / "run")
        holder.kill()
        holder.wait()
        rundir.lock(tmp_path / "run").close()
        os.kill(child, signal.SIGKILL)


def test_a_ledger_is_cut_back_for_every_rank(tmp_path: Path) -> None:
    for rank in range(3):
        ledger = rundir.open_ledger(tmp_path, rank, 3, 0, print)
        for step in (1, 2, 3):
            ledger.append({"step": step, "indices": [rank]})
        ledger.close()
    for rank in range(2):
        rundir.open_ledger(tmp_path, rank, 2, 2, print).close()
    for rank in range(3):
        lines = jsonl.read(tmp_path / "ledger" / f"rank-{rank}.jsonl")
        assert [line["step"] for line in lines] == [1, 2]
