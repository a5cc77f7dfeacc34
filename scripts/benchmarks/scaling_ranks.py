"""Program of each of the two ranks that scripts/benchmarks/scaling.py measures.

Started by torchrun. Rank 0 alone is the one process; the other then waits in a collective, which
takes no core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data.files import write_atomically
from irv2 import build, config_file
from irv2.training import distributed, exchange, prepare, step
from irv2.training.distributed import World
from irv2.training.loss import Loss
from scripts.benchmarks.alternation import seconds
from scripts.planning.steptime import BUCKET_BYTES

CLASSES, LR = 1000, 0.045
MESSAGES = 50  # small all-reduces of a window
MESSAGE = 1024  # numbers of one
Way = Callable[[], None]


class RankTrainer:
    """The network on one rank of a world, with one batch of noise to train on."""

    def __init__(self, case: dict[str, Any], world: World) -> None:
        size, batch = case["image_size"], case["batch"]
        self.cfg = config_file.from_tree(
            {
                "run": {"device": "cpu"},
                "model": {"blocks": case["blocks"]},
                "data": {"train": "noise", "val": "noise", "image_size": size},
                "train": {"global_batch": batch * world.size, "micro_batch": batch},
            }
        )
        self.world = world
        self.state = build.new_state(self.cfg, CLASSES, world.device)
        self.network = exchange.wrapped(self.state.model, world)
        generator = torch.Generator().manual_seed(world.rank)
        x = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.labels = torch.arange(batch) % CLASSES
        self.options = step.StepOptions(clip_norm=self.cfg.optim.clip_norm)
        prepare.settle(self.state, self.network, batch, size, self.options)

    def step(self) -> None:
        batches = cycle([(self.x, self.labels)])
        step.train_step(self.state, self.network, batches, LR, self.options, self.world)
        self.state.read_bad_steps()

    def passes(self, images: int | None = None) -> tuple[float, float]:
        """Seconds of forward and of backward of so many images (None: the batch), no exchange."""
        x, labels = self.x[:images], self.labels[:images]
        step.train_mode(self.state.model, freeze_bn=False)
        network: nn.Module = self.network
        with network.no_sync() if self.world.size > 1 else nullcontext():
            started = time.perf_counter()
            loss = Loss()(network(x), labels)
            half_way = time.perf_counter()
            loss.backward()
            ended = time.perf_counter()
        self.state.optimizer.zero_grad(set_to_none=True)
        return half_way - started, ended - half_way


class Exchange:
    """All-reduces of as many numbers as the network has gradients, and nothing beside them."""

    def __init__(self, numbers: int, dtype: torch.dtype, group: dist.ProcessGroup | None) -> None:
        size = BUCKET_BYTES // dtype.itemsize
        self.buckets = torch.zeros(numbers, dtype=dtype).split(size)
        self.group = group

    def run(self) -> None:
        for bucket in self.buckets:
            dist.all_reduce(bucket, group=self.group)


def together(work: Way) -> float:
    """Seconds until the last rank has done some work that all begin at once."""
    dist.barrier()
    return slowest(seconds(work))


def slowest(own: float) -> float:
    longest = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def measure(case: dict[str, Any], rounds: int, world: World) -> dict[str, list[float]]:
    """Measure seconds of each part, one a round, without the first round. Rank 0's count."""
    alone = RankTrainer(case, World(0, 1, world.device)) if world.is_main else None
    both = RankTrainer(case, world)
    numbers = sum(p.numel() for p in both.state.model.parameters())
    only_main = dist.new_group([0])
    exchanges = {
        "reduce_s": Exchange(numbers, torch.float32, None),
        "reduce_bf16_s": Exchange(numbers, torch.bfloat16, None),
    }
    exchange_of_one = Exchange(numbers, torch.float32, only_main)
    message = torch.zeros(MESSAGE)
    times: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        times.setdefault(name, []).append(value)

    words = f"{case['image_size']} px"
    quiet = not (world.is_main and sys.stderr.isatty())
    for number in tqdm(range(rounds + 1), words, unit="round", disable=quiet):
        if number == 1:
            times.clear()
        dist.barrier()
        if alone is not None:
            note("one_s", seconds(alone.step))
        note("two_s", together(both.step))
        dist.barrier()
        if alone is not None:
            for name, value in zip(("forward_s", "backward_s"), alone.passes()):
                note(name, value)
            note("half_batch_s", sum(alone.passes(case["batch"] // 2)))
            note("reduce_of_one_s", seconds(exchange_of_one.run))
        note("apart_s", together(lambda: both.passes()))
        for name, each in exchanges.items():
            note(name, together(each.run))
        note("message_s", together(lambda: send(message)) / MESSAGES)
    return {**times, "gradient_bytes": 4 * numbers}


def send(message: Tensor) -> None:
    for _ in range(MESSAGES):
        dist.all_reduce(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with distributed.start("cpu") as world:
        measured = [measure(case, arguments.rounds, world) for case in json.loads(arguments.cases)]
        if world.is_main:
            write_atomically(arguments.out, json.dumps(measured))


if __name__ == "__main__":
    main()
