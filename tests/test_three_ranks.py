"""Three ranks, the fewest whose order of adding up matters, stopped and continued."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from test_engine import LR, free_port, new_state

from irv2 import distributed, engine
from irv2.distributed import World
from irv2.engine import StepOptions, TrainState
from irv2.model import inception_resnet_v2

OPTIONS = StepOptions(clip_norm=2.0, seed=3)
SIZE = (2, 3, 75, 75)


def start(world: World, settled: bool) -> tuple[TrainState, torch.nn.Module]:
    torch.manual_seed(0)
    state = new_state(inception_resnet_v2(10, blocks=(1, 1, 1)))
    network = distributed.parallel(state.model, False, world)
    if settled:
        before = {name: value.clone() for name, value in state.model.state_dict().items()}
        engine.settle(state, network, torch.zeros(SIZE), OPTIONS)
        after = state.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(p.grad is None for p in state.model.parameters())
    return state, network


def step(state: TrainState, network: torch.nn.Module, world: World) -> None:
    generator = torch.Generator().manual_seed(10 * state.step + world.rank)
    x = torch.rand(SIZE, generator=generator) * 2 - 1
    labels = torch.randint(10, (SIZE[0],), generator=generator)
    engine.train_step(state, network, iter([(x, labels)]), LR, OPTIONS, world)


def rank_main(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    equal = {}
    with distributed.start("cpu") as world:
        for settled in (True, False):
            unbroken, network = start(world, settled)
            step(unbroken, network, world)
            saved = {
                part: {name: value.clone() for name, value in tensors.items()}
                for part, tensors in unbroken.tensors().items()
            }
            engine.read_bad_steps(unbroken)
            counters = unbroken.counters()
            step(unbroken, network, world)

            continued, network = start(world, settled)
            continued.load(saved, counters)
            step(continued, network, world)
            ours, theirs = continued.model.state_dict(), unbroken.model.state_dict()
            equal[settled] = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.save(equal, Path(directory) / f"{rank}.pt")


def test_a_continued_run_adds_up_as_an_unbroken_one(tmp_path):
    torch.multiprocessing.spawn(rank_main, (free_port(), str(tmp_path)), nprocs=3)
    for rank in range(3):
        equal = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert equal == {True: True, False: False}  # unsettled they differ: the test can tell
