"""A run directory: whom it belongs to, from where a run goes on, and what its checkpoints tell."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calling import call
from torch import nn

from irv2.config_file import from_tree
from irv2.network import weights
from irv2.network.forms import metadata
from irv2.run import checkpoint, directory, jsonl, resume
from irv2.run.best import BestWeights
from irv2.run.checkpoint import CheckpointError
from irv2.training import optim
from irv2.training.state import TrainState, running_average
from scripts import inspect_checkpoint

BATCH = 10
CONFIG = from_tree(
    {"data": {"train": "a", "val": "b"}, "train": {"global_batch": BATCH, "micro_batch": BATCH}}
).model_dump()
EXPERIMENT = resume.Experiment(CONFIG, ["cat", "dog"], images_per_epoch=100)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that links lead to, and that no run may change."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def new_state(step: int = 0) -> TrainState:
    """A tiny network whose weights tell the step."""
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.constant_(model[0].weight, step)
    return TrainState(
        model,
        running_average(model, 0.9),
        optim.RMSpropTF(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", enabled=False),
        step,
        images_seen=BATCH * step,
    )


def save(directory: Path, *steps: int, experiment: resume.Experiment = EXPERIMENT) -> None:
    for step in steps:
        state = new_state(step)
        store = directory / "checkpoints"
        checkpoint.save(store, step, state.tensors(), resume.meta(state, experiment))


def restored(
    directory: Path, resume_from: str = "auto", experiment: resume.Experiment = EXPERIMENT
) -> tuple[int, int, float, list[str]]:
    """(step, images seen, a weight, what was said)."""
    state, said = new_state(), []
    world = SimpleNamespace(say=said.append, same=lambda step: True)
    resume.restore(state, directory, resume_from, experiment, world)
    return state.step, state.images_seen, state.model[0].weight[0, 0].item(), said


def with_config(section: str, **keys: object) -> resume.Experiment:
    """EXPERIMENT with other values in a section of its config."""
    return replace(EXPERIMENT, config={**CONFIG, section: {**CONFIG[section], **keys}})


def test_class_names_in_another_unicode_form_are_no_other_experiment():
    composed, on_a_mac = (replace(EXPERIMENT, classes=["a", c]) for c in ("\u00e7", "c\u0327"))
    saved = resume.meta(new_state(), composed)
    assert on_a_mac.changes_from(saved) == []
    swapped = replace(EXPERIMENT, classes=on_a_mac.classes[::-1])
    assert swapped.changes_from(saved) == ["classes: 2 before, 2 now, or renamed"]


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    assert restored(tmp_path) == (0, 0, 0.0, [])
    save(tmp_path, 3, 12)
    step, images_seen, weight, said = restored(tmp_path)
    assert (step, images_seen, weight) == (12, 120, 12.0)
    assert len(said) == 1 and "after step 12" in said[0]


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path: Path) -> None:
    save(tmp_path, 3, 12)
    newest = directory.checkpoints(tmp_path)[-1]
    (newest / "model.safetensors").write_bytes(b"")
    step, _, weight, said = restored(tmp_path)
    assert (step, weight) == (3, 3.0)
    assert said[0].startswith("passed over: ") and str(newest) in said[0]


def test_what_was_passed_over_is_set_aside(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for step in (12, 15, 12):
        save(tmp_path, step)
        directory.set_aside_unusable(tmp_path, 3)
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
    save(tmp_path, 12, experiment=with_config("model", blocks=[1, 2, 3]))
    step, _, _, said = restored(tmp_path)
    assert step == 3
    assert "passed over" in said[0] and "another experiment (model." in said[0]


def test_steps_that_will_repeat_otherwise_are_announced(tmp_path: Path) -> None:
    save(tmp_path, 12)
    said = restored(tmp_path, experiment=with_config("run", deterministic=True))[-1]
    assert said[0] == "run.deterministic: false -> true, from here on"
    assert not any("deterministic" in line for line in restored(tmp_path)[-1])


def test_a_run_may_begin_from_another_with_another_recipe_but_not_network(tmp_path: Path) -> None:
    save(tmp_path / "old", 5)
    origin = str(tmp_path / "old")
    step, _, _, said = restored(tmp_path / "new", origin, with_config("optim", lr=0.02))
    assert step == 5
    assert "optim.lr: 0.045 -> 0.02" in said[0]
    with pytest.raises(CheckpointError, match="another experiment"):
        restored(tmp_path / "new", origin, with_config("model", blocks=[1, 1, 1]))


def test_a_run_with_only_damaged_checkpoints_never_begins_anew(tmp_path: Path) -> None:
    save(tmp_path, 3, 12)
    for path in directory.checkpoints(tmp_path):
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
        ({"classes": ["cat", "cow"]}, "classes: 2 before, 2 now, or renamed"),
        ({"images_per_epoch": 99}, "training images: 100 -> 99"),
        (
            {"stored": {"shorter side, px": 400}},
            "training images, shorter side, px: none -> 400",
        ),
        ({"config": {**CONFIG, "ema": {"decay": 0.5}}}, "ema.decay: 0.9999 -> 0.5"),
    ],
)
def test_another_experiment_is_refused(tmp_path, other, words) -> None:
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=words):
        restored(tmp_path, experiment=replace(EXPERIMENT, **other))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    for name, words in {"weights.pt": "a file, not", "absent": "no such checkpoint"}.items():
        with pytest.raises(CheckpointError, match=f"{name}: {words}"):
            restored(tmp_path / "run", str(tmp_path / name))
    checkpoint.save(tmp_path, 1, {"model": {}}, {"step": 1})
    with pytest.raises(CheckpointError, match=r"step-000000001: meta\.json is not train\.py's"):
        restored(tmp_path / "run", str(tmp_path / "step-000000001"))


def hold(path: Path, children: Connection) -> None:
    """Take the lock, leave a child behind that has inherited its file, wait to be killed."""
    _held = directory.lock(path)
    if child := os.fork():
        children.send(child)
    time.sleep(60)


def test_two_programs_cannot_work_in_one_run_but_a_dead_one_does_not_hold_it(tmp_path) -> None:
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    holder = fork.Process(target=hold, args=(tmp_path / "run", sender))
    holder.start()
    assert receiver.poll(60)
    child = receiver.recv()
    try:
        with pytest.raises(CheckpointError, match=r"another train\.py is at work"):
            directory.lock(tmp_path / "run")
        holder.kill()
        holder.join()
        directory.lock(tmp_path / "run").close()
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_ledger_is_cut_back_for_every_rank(tmp_path: Path) -> None:
    for rank in range(3):
        ledger = directory.open_ledger(tmp_path, rank, 3, 0, print)
        for step in (1, 2, 3):
            ledger.append({"step": step, "indices": [rank]})
        ledger.close()
    for rank in range(2):
        directory.open_ledger(tmp_path, rank, 2, 2, print).close()
    for rank in range(3):
        lines = jsonl.read(tmp_path / "ledger" / f"rank-{rank}.jsonl")
        assert [line["step"] for line in lines] == [1, 2]


# ------------------------------------------------------------------- scripts/inspect_checkpoint.py


def test_a_run_shows_its_newest_checkpoint_and_every_files_sha256(tmp_path):
    save(tmp_path, 3, 12)
    status, out, _ = call(inspect_checkpoint, tmp_path)
    assert status == 0
    newest = directory.checkpoints(tmp_path)[-1]
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["step"].split() == ["step", "12"]
    assert rows["images"].split() == ["images", "seen", "120"]
    assert "torch" in rows["written"]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "meta.json"):
        content = (newest / name).read_bytes()
        assert rows[name].split()[-1] == hashlib.sha256(content).hexdigest()
        assert rows[name].split()[-2] == f"{len(content):,}"
    assert rows["model.safetensors"].split()[1] == "2"  # weight and bias


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_shown(tmp_path):
    save(tmp_path, 3, 12)
    newest = directory.checkpoints(tmp_path)[-1]
    (newest / "ema.safetensors").write_bytes(b"")
    status, out, _ = call(inspect_checkpoint, tmp_path)
    assert status == 0
    assert f"passed over: {newest}: ema.safetensors does not match" in out
    assert "step-000000003" in out
    status, _, error = call(inspect_checkpoint, newest)
    assert status == 1 and "ema.safetensors does not match" in error


def test_what_is_no_checkpoint_is_told_in_a_line(tmp_path):
    (tmp_path / "empty").mkdir()
    other = checkpoint.save(tmp_path, 1, {"model": {}}, {"step": 1})
    for path in (tmp_path / "absent", tmp_path / "empty", other):
        status, _, error = call(inspect_checkpoint, path)
        assert status == 1
        assert str(path) in error and error.count("\n") == 1


# ---------------------------------------------------------------------- best.safetensors


def test_best_weights_without_room_wait_as_they_were(tmp_path, monkeypatch):
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = []
    best = BestWeights(tmp_path, EXPERIMENT, said.append)
    state = {"weight": torch.ones(2), "aux.weight": torch.ones(1)}
    with monkeypatch.context() as disk:
        disk.setattr(weights, "write", full)
        best.write(state, {"top1": 50.0, "step": 3, "loss": float("inf")})
    assert "will be tried again" in said[0] and list(tmp_path.iterdir()) == []
    state["weight"].zero_()  # training goes on
    assert best.flush()
    saved, told, _ = weights.read(str(tmp_path / "best.safetensors"))
    assert {name: value.tolist() for name, value in saved.items()} == {"weight": [1.0, 1.0]}
    assert json.loads(told["classes"]) == ["cat", "dog"]
    assert metadata.parsed(told, "best").result.step == 3


# ------------------------------------------------------------------------- links that were planted


def test_a_lock_that_is_a_link_is_refused_by_name(tmp_path, victim):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"is a symbolic link; remove it: '.*/run/\.lock'"):
        directory.lock(run)


@pytest.mark.parametrize("name", ["checkpoints", "ledger", "tensorboard"])
def test_a_folder_of_a_run_that_leads_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(CheckpointError, match=f"run/{name}: a symbolic link"):
        directory.lock(tmp_path / "run")


def test_a_run_directory_may_be_ones_own_link_and_not_another_users(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch", target_is_directory=True)
    directory.lock(tmp_path / "run").close()
    if os.geteuid() != 0:
        pytest.skip("only root can give a link away: another user's is NOT tried")
    os.chown(tmp_path / "run", 12345, -1, follow_symlinks=False)
    with pytest.raises(CheckpointError, match="another user"):
        directory.lock(tmp_path / "run")


def test_what_a_run_writes_follows_no_link(tmp_path, victim):
    run, store = tmp_path / "run", tmp_path / "run" / "checkpoints"
    store.mkdir(parents=True)
    left = f".{'0' * 16}.tmp"
    for name in (left, "config.yaml", "log.jsonl"):
        (run / name).symlink_to(victim)
    (store / ".step-000000004.new").symlink_to(tmp_path, target_is_directory=True)
    directory.lock(run).close()
    directory.write_config(run, CONFIG)
    save(run, 4)
    said = []
    lines = jsonl.JsonLines(run / "bad.jsonl", 4, said.append)
    (run / "bad.jsonl").symlink_to(victim)
    lines.append({"step": 4})
    assert "is a symbolic link" in said[0]
    assert [path.name for path in directory.checkpoints(run)] == ["step-000000004"]
    assert not (run / left).is_symlink() and not (run / "config.yaml").is_symlink()


@pytest.mark.parametrize("name", ["log.jsonl", "bad_images.jsonl", ".lock"])
def test_a_pipe_among_a_runs_files_is_told_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=f"not a regular file: '.*{name}'"):
        directory.lock(tmp_path)
        jsonl.JsonLines(tmp_path / name, 0, print)
