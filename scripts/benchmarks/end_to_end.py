"""Training from JPEG files against training from a batch that lies in memory, on a GPU."""

from __future__ import annotations

import faulthandler
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import nn

from data import sources
from irv2 import build, config_file, input_pipeline
from irv2.config import Config
from irv2.report import markdown
from irv2.training import distributed, prepare, step
from irv2.training.distributed import World
from irv2.training.state import TrainState
from irv2.training.step import StepOptions
from scripts.benchmarks.alternation import Way, alternate, rate, table_row
from scripts.benchmarks.loading import write_photographs

ROOT = Path(__file__).resolve().parents[2]
QUALITY = 98
BATCH, STEPS = 128, 40  # images a step, and steps a window


def measure(rounds: int) -> dict[str, Any]:
    """Compare on the recipe's network and views, compiled, in bf16, on one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), QUALITY)
        batch = [f"train.global_batch={BATCH}", f"train.micro_batch={BATCH}", "train.compile=graph"]
        data = [f"data.train={folder}", f"data.val={folder}", "run.device=cuda"]
        return compare(
            config_file.load(ROOT / "configs" / "irv2_rmsprop.yaml", [*data, *batch]), rounds
        )


def compare(cfg: Config, rounds: int) -> dict[str, Any]:
    """Images per second of a config's steps, from its loader and from one batch of it."""
    source = sources.open_source(cfg.data.train)
    with distributed.start(cfg.run.device) as world:
        order, size = input_pipeline.training_order(cfg, source), cfg.train.global_batch
        batches = input_pipeline.training_batches(cfg, source, order, 0, size, world)
        with closing(batches):
            pairs = ((batch.images, batch.labels) for batch in batches)
            state = build.new_state(cfg, len(source.classes), world.device)
            options = build.step_options(cfg, 1, source, world)
            network = prepare.network(state, size, cfg.data.image_size, options, world)

            def way(pairs: Iterator) -> Way:
                return rate(
                    STEPS * size, lambda: steps(state, network, pairs, cfg.optim.lr, options, world)
                )

            return alternate(way(pairs), way(repeat(next(pairs))), rounds)


def steps(
    state: TrainState,
    network: nn.Module,
    pairs: Iterator,
    lr: float,
    options: StepOptions,
    world: World,
) -> None:
    for _ in range(STEPS):
        step.train_step(state, network, pairs, lr, options, world)
    state.read_bad_steps()  # waits for a GPU


def table(figures: dict[str, Any]) -> str:
    head = "measured | from JPEGs, images/s | from memory | ratio (range) | goal"
    return markdown.table(head, [table_row("training on a GPU", figures, "≥ 0.97")])


def main() -> None:
    """Measure as a part of `benchmark.py gpu`, which rehearses on a CPU, where this has no way."""
    if "--rehearsal" not in sys.argv:
        faulthandler.dump_traceback_later(20, repeat=True)  # should the loader hang: where
        figures = measure(1)
        print(
            json.dumps({"from_files": figures["ours_per_s"], "from_memory": figures["peer_per_s"]})
        )


if __name__ == "__main__":
    main()
