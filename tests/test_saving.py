"""Checkpoints written while training goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from small_meta import meta

from irv2.run import checkpoint, saving
from irv2.run.checkpoint import CheckpointError
from irv2.run.saving import BackgroundSaver


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path: Path, said: list[str]) -> BackgroundSaver:
    return BackgroundSaver(tmp_path, 2, 0, said.append, ("running_mean",))


@pytest.fixture
def gate() -> threading.Event:
    """Event that holds a saver's thread up until it is set."""
    return threading.Event()


def parts(value: float) -> checkpoint.Parts:
    weight, mean = torch.full((8,), value), torch.full((3,), value)
    return {"model": {"weight": weight, "bn.running_mean": mean}}


def loaded(directory: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(directory / f"step-{step:09d}").parts["model"]


def test_leaving_waits_until_everything_is_on_the_disk(tmp_path, saver, said):
    with saver:
        for step in (1, 2, 3):
            saver.begin(step, parts(step), meta(step))
    assert [checkpoint.step_of(path) for path in checkpoint.list_all(tmp_path)] == [2, 3]
    assert torch.equal(loaded(tmp_path, 3)["weight"], torch.full((8,), 3.0))
    assert saver.saved_step == 3
    assert said == []


def test_training_goes_on_while_the_disk_is_slow(tmp_path, saver, gate, monkeypatch):
    """Changes after the copy do not reach the checkpoint."""
    save = checkpoint.save

    def slow_save(*arguments) -> Path:
        assert gate.wait(timeout=30)
        return save(*arguments)

    work = BackgroundSaver._work

    def late_work(self, *arguments) -> None:
        time.sleep(0.2)  # else it may have copied before it is waited for
        work(self, *arguments)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(BackgroundSaver, "_work", late_work)
    state = parts(1.0)
    with saver:
        saver.begin(1, state, meta(1))
        saver.wait_for_copy()
        state["model"]["weight"].fill_(2.0)
        assert saver.saved_step == 0 and checkpoint.list_all(tmp_path) == []
        gate.set()
    assert torch.equal(loaded(tmp_path, 1)["weight"], torch.ones(8))


def test_what_a_forward_changes_is_copied_before_it_begins(tmp_path, saver, gate, monkeypatch):
    """The thread is held up before it copies anything."""
    work = BackgroundSaver._work

    def late_work(self, *arguments) -> None:
        assert gate.wait(timeout=30)
        work(self, *arguments)

    monkeypatch.setattr(BackgroundSaver, "_work", late_work)
    state = parts(1.0)
    with saver:
        saver.begin(1, state, meta(1))
        state["model"]["bn.running_mean"].fill_(2.0)  # as a forward does
        assert not saver._copied.is_set()
        gate.set()
        saver.wait_for_copy()
        state["model"]["weight"].fill_(2.0)  # as the update does
    assert all((tensor == 1).all() for tensor in loaded(tmp_path, 1).values())


def test_a_save_that_fails_is_said_and_the_next_one_tries_again(tmp_path, saver, said, monkeypatch):
    save = checkpoint.save

    def fail_once(directory, step, *arguments) -> Path:
        if step == 2:
            raise CheckpointError(f"step {step}: No space left on device")
        return save(directory, step, *arguments)

    monkeypatch.setattr(checkpoint, "save", fail_once)
    with saver:
        saver.begin(1, parts(1.0), meta(1))
        saver.begin(2, parts(2.0), meta(2))
        saver.finish()
        assert saver.saved_step == 1
        assert said == ["NOT SAVED, training goes on: step 2: No space left on device"]
        saver.begin(3, parts(3.0), meta(3))
    assert saver.saved_step == 3
    assert [checkpoint.step_of(path) for path in checkpoint.list_all(tmp_path)] == [1, 3]


def test_the_time_training_stood_still_is_added_up(saver, gate, monkeypatch):
    now = [0.0]

    def slow_save(*_arguments) -> None:
        assert gate.wait(timeout=30)
        now[0] += 2.0

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(saving.time, "perf_counter", lambda: now[0])
    with saver:
        saver.begin(1, parts(1.0), {})
        saver.wait_for_copy()
        join = saver._thread.join
        monkeypatch.setattr(saver._thread, "join", lambda: gate.set() or join())
        assert saver.stalled_s == 0  # not for the disk
    assert saver.stalled_s == 2  # but in the end for the disk


def test_a_save_that_breaks_in_any_way_is_said_and_survived(saver, said, monkeypatch):
    def fail(*_arguments) -> Path:
        raise MemoryError

    monkeypatch.setattr(checkpoint, "save", fail)
    with saver:
        saver.begin(1, parts(1.0), {})
    assert saver.saved_step == 0
    assert said == ["NOT SAVED, training goes on: MemoryError"]
