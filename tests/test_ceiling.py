"""The multiply-adds of training and its ceiling, counted; the trace of some steps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from irv2 import build, config
from irv2.run.profile import Profile
from irv2.training import ceiling
from irv2.training.distributed import World

SMALL = {"blocks": [1, 1, 1], "width": 0.25}
SIZE = 75


def counted(**section: object) -> int:
    with torch.device("meta"):
        model = build.network(config.Model(**SMALL | section), 7)
    return ceiling.training_multiply_adds(model, SIZE)


@pytest.fixture(scope="module")
def forward() -> int:
    """Multiply-adds of an image's forward, by PyTorch's counter."""
    with torch.device("meta"), torch.no_grad():
        model = build.network(config.Model(**SMALL), 7).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, SIZE, SIZE))
    return counter.get_total_flops() // 2


def test_training_takes_three_forwards_but_for_the_images_gradient(forward):
    first = 37 * 37 * 8 * 3 * 9  # conv2d_1a: 3 to 8 channels, 3x3 at every second of 75 px
    assert counted() == 3 * forward - first


def test_what_is_frozen_has_no_backward(forward):
    frozen = counted(freeze="backbone", init="weights")
    assert frozen == forward + 384 * 7  # the gradient of the classifier's matrix


def test_the_ceiling_is_what_all_devices_would_allow(monkeypatch):
    monkeypatch.setattr(
        ceiling, "matrix_rate", lambda dtype, device: 1e9 if dtype is torch.bfloat16 else 0
    )
    sections = {"data": {"train": "a", "val": "b", "image_size": SIZE}, "model": SMALL}
    cfg = config.Config(**sections, train={"precision": "bf16"})
    world = World(0, 3, torch.device("cpu"))
    assert build.pace_ceiling(cfg, 7, world) == pytest.approx(3e9 / counted())
    silent = config.Config(**sections, log={"utilisation": False})
    assert build.pace_ceiling(silent, 7, world) is None


def test_the_matrix_rate_is_one_that_a_cpu_may_have():
    assert 1e8 < ceiling.matrix_rate(torch.float32, torch.device("cpu")) < 1e14


def traced(folder: Path, steps: list[int], first: int, last: int) -> set[str]:
    """Go from step `first` to `last`; returns the steps that the trace has."""
    said: list[str] = []
    profile = Profile(steps, folder, 0, said.append)
    profile.between_steps(first)
    for step in range(first + 1, last + 1):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(2).sum()
        profile.between_steps(step)
    profile.close()
    path = folder / "profile" / "rank0.pt.trace.json"
    if not path.exists():
        assert said == []
        return set()
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    return {name for name in names if name.startswith("step ")}


@pytest.mark.parametrize(
    "begins, ends, expected",
    [(0, 5, {"step 2", "step 3"}), (2, 5, {"step 3"}), (0, 2, {"step 2"}), (3, 5, set())],
)
def test_a_trace_has_the_steps_asked_for_that_this_start_takes(tmp_path, begins, ends, expected):
    assert traced(tmp_path, [2, 3], begins, ends) == expected


def test_a_trace_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "profile").touch()
    said: list[str] = []
    profile = Profile([1, 1], tmp_path, 0, said.append)
    profile.between_steps(0)
    profile.between_steps(1)
    assert len(said) == 1 and "no trace" in said[0] and os.fspath(tmp_path) in said[0]
