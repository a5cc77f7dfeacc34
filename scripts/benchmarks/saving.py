"""Cost of saving during training, on the quickstart."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from irv2 import build, config_file
from irv2.report import markdown
from irv2.run import checkpoint, resume
from irv2.run.saving import BackgroundSaver
from irv2.training import distributed, prepare
from irv2.training.step import RUNNING, StepOptions, begin, forward_backward, update

ROOT = Path(__file__).resolve().parents[2]
PER_STEPS = 100  # steps for which the cost of one save is stated
STEPS = 5  # a window


def measure(rounds: int) -> dict[str, Any]:
    """Time windows of STEPS steps of the quickstart, in turn without a save and with one.

    The images are noise in memory, so that nothing else holds training up.
    """
    cfg = config_file.load(ROOT / "configs" / "quickstart.yaml")
    experiment = resume.Experiment(cfg.model_dump(), [str(n) for n in range(10)], 1437)
    windows: dict[bool, list[float]] = {False: [], True: []}
    stalls = []
    with (
        distributed.start(cfg.run.device) as world,
        tempfile.TemporaryDirectory(dir=".") as directory,
        BackgroundSaver(Path(directory), cfg.checkpoint.keep, 0, tqdm.write, RUNNING) as saver,
    ):
        state = build.new_state(cfg, 10, world.device)
        images, side = cfg.train.global_batch, cfg.data.image_size
        batch = torch.rand((images, 3, side, side), device=world.device), torch.arange(images) % 10
        options = StepOptions(clip_norm=cfg.optim.clip_norm)
        network = prepare.network(state, images, side, options, world)

        def window(saving: bool) -> float:
            started, stalled_before = time.perf_counter(), saver.stalled_s
            if saving:
                state.read_bad_steps()
                saver.begin(state.step, state.tensors(), resume.meta(state, experiment))
            for _ in range(STEPS):
                before = begin(state, options)
                loss = forward_backward(state, network, *batch, 0, options, world)
                saver.wait_for_copy()
                update(state, loss, before, cfg.optim.lr, options, world)
            state.read_bad_steps()  # waits for a GPU
            elapsed = time.perf_counter() - started
            stalls.extend([saver.stalled_s - stalled_before] if saving else [])
            saver.finish()
            return elapsed

        window(saving=True)  # warm-up: memory, and the host's copy
        stalls.clear()
        for _ in tqdm(range(rounds), unit="round", disable=None):
            for saving in (False, True):
                windows[saving].append(window(saving))
        newest = checkpoint.list_all(Path(directory))[-1]
        size_mb = sum(path.stat().st_size for path in newest.iterdir()) / 1e6

    step = statistics.median(windows[False]) / STEPS
    slower = statistics.median(windows[True]) - statistics.median(windows[False])
    return {
        "step_s": step,
        "stall_s": statistics.median(stalls),
        "stall_s_range": [min(stalls), max(stalls)],
        "stall_percent_of_a_step": 100 * statistics.median(stalls) / step,
        "slower_s_per_save": slower,
        "slower_percent": 100 * slower / (PER_STEPS * step),
        "megabytes": size_mb,
        "rounds": rounds,
        "steps_per_window": STEPS,
    }


def table(figures: dict[str, Any]) -> str:
    low, high = (100 * value / figures["step_s"] for value in figures["stall_s_range"])
    rows = (
        f"a step | {figures['step_s'] * 1000:.0f} ms",
        f"a checkpoint | {figures['megabytes']:.0f} MB",
        f"training stands still, per save ({PER_STEPS} steps) | "
        f"{figures['stall_s'] * 1000:.1f} ms = {figures['stall_percent_of_a_step']:.1f} % of "
        f"a step ({low:.1f} to {high:.1f} %)",
        f"training takes longer in all, per save ({PER_STEPS} steps) | "
        f"{figures['slower_s_per_save'] * 1000:.0f} ms = {figures['slower_percent']:.2f} %",
    )
    return markdown.table("measured |", rows)
