"""Training from JPEG files against training from a batch that lies in memory, on a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from pathlib import Path
from typing import Any

import feed
import recipe
from data import sources
from irv2 import config, distributed, engine
from irv2.config import Config
from irv2.distributed import World
from scripts.benchmarks.alternation import Way, alternate, rate, table_row
from scripts.benchmarks.loading import write_photographs

ROOT = Path(__file__).resolve().parents[2]
QUALITY = 98
BATCH, STEPS = 128, 40  # images a step, and steps a window


def measure(rounds: int) -> dict[str, Any]:
    """The recipe's network and views, compiled, in bf16, on one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), QUALITY)
        batch = [f"train.global_batch={BATCH}", f"train.micro_batch={BATCH}", "train.compile=true"]
        data = [f"data.train={folder}", f"data.val={folder}", "run.device=cuda"]
        return compare(config.load(ROOT / "configs" / "irv2_rmsprop.yaml", [*data, *batch]), rounds)


def compare(cfg: Config, rounds: int) -> dict[str, Any]:
    """Images a second of a config's steps, from its loader and from one batch of it."""
    source = sources.open_source(cfg.data.train)
    with distributed.start(cfg.run.device) as world:
        order, size = feed.training_order(cfg, source), cfg.train.global_batch
        batches = feed.training_batches(cfg, source, order, 0, size, world)
        with closing(batches):
            pairs = ((batch.images, batch.labels) for batch in batches)
            state = recipe.new_state(cfg, len(source.classes), world.device)
            network = distributed.parallel(state.model, cfg.train.compile, world)

            def way(pairs: Iterator) -> Way:
                return rate(STEPS * size, lambda: steps(cfg, state, network, pairs, world))

            return alternate(way(pairs), way(repeat(next(pairs))), rounds)


def steps(
    cfg: Config, state: engine.TrainState, network: Any, pairs: Iterator, world: World
) -> None:
    options = engine.StepOptions(clip_norm=cfg.optim.clip_norm, precision=cfg.train.precision)
    for _ in range(STEPS):
        engine.train_step(state, network, pairs, cfg.optim.lr, options, world)
    engine.read_bad_steps(state)  # waits for a GPU


def table(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            "| measured | from JPEGs, images/s | from memory | ratio (range) | goal |",
            "|---|---|---|---|---|",
            table_row("training on a GPU", found, "≥ 0.97"),
        ]
    )
