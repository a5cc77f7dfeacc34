"""What saving costs training, on the quickstart."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import recipe
from irv2 import checkpoint, config, distributed, engine, rundir
from irv2.saving import BackgroundSaver

ROOT = Path(__file__).resolve().parents[2]
PER_STEPS = 100  # steps for which the cost of one save is stated
STEPS = 5  # a window


def measure(rounds: int) -> dict[str, Any]:
    """Windows of STEPS steps of the quickstart, in turn without a save and with one at the start.

    The images are noise that lies in memory, so that nothing else holds training up.
    """
    cfg = config.load(ROOT / "configs" / "quickstart.yaml")
    experiment = rundir.Experiment(cfg.model_dump(), [str(n) for n in range(10)], 1437)
    windows: dict[bool, list[float]] = {False: [], True: []}
    stalls = []
    with (
        distributed.start(cfg.run.device) as world,
        tempfile.TemporaryDirectory(dir=".") as directory,
        BackgroundSaver(
            Path(directory), cfg.checkpoint.keep, 0, tqdm.write, engine.RUNNING
        ) as saver,
    ):
        state = recipe.new_state(cfg, 10, world.device)
        network = distributed.parallel(state.model, cfg.train.compile, world)
        size = (cfg.train.global_batch, 3, cfg.data.image_size, cfg.data.image_size)
        batch = torch.rand(size, device=world.device), torch.arange(size[0]) % 10
        options = engine.StepOptions(clip_norm=cfg.optim.clip_norm)

        def window(saving: bool) -> float:
            started, stalled_before = time.perf_counter(), saver.stalled_s
            if saving:
                engine.read_bad_steps(state)
                saver.begin(state.step, state.tensors(), rundir.meta(state, experiment))
            for _ in range(STEPS):
                batches = iter([batch])
                engine.train_step(
                    state, network, batches, cfg.optim.lr, options, world, saver.wait_for_copy
                )
            engine.read_bad_steps(state)  # waits for a GPU
            elapsed = time.perf_counter() - started
            stalls.extend([saver.stalled_s - stalled_before] if saving else [])
            saver.finish()
            return elapsed

        window(saving=True)  # warm-up: memory, and the host's copy
        stalls.clear()
        for _ in tqdm(range(rounds), unit="round", disable=not sys.stderr.isatty()):
            for saving in (False, True):
                windows[saving].append(window(saving))
        newest = checkpoint.found(Path(directory))[-1]
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


def table(found: dict[str, Any]) -> str:
    low, high = (100 * value / found["step_s"] for value in found["stall_s_range"])
    rows = (
        ("a step", f"{found['step_s'] * 1000:.0f} ms"),
        ("a checkpoint", f"{found['megabytes']:.0f} MB"),
        (
            f"training stands still, per save ({PER_STEPS} steps)",
            f"{found['stall_s'] * 1000:.1f} ms = {found['stall_percent_of_a_step']:.1f} % of a "
            f"step ({low:.1f} to {high:.1f} %)",
        ),
        (
            f"training takes longer in all, per save ({PER_STEPS} steps)",
            f"{found['slower_s_per_save'] * 1000:.0f} ms = {found['slower_percent']:.2f} %",
        ),
    )
    lines = ["| measured | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
