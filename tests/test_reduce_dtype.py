"""Gradients that travel between two ranks in bfloat16, beside those that travel in float32."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from programs import run
from small_run import STEPS, arguments, checkpoint_of, differing
from test_engine import free_port, new_state

from irv2 import distributed, engine
from irv2.distributed import World
from irv2.model import inception_resnet_v2

ROUNDING = 2.0**-8  # bfloat16's: half of the distance between neighbours, relative
Gradients = dict[str, torch.Tensor]


def gradients(world: World, reduce_dtype: str) -> Gradients:
    """What a rank applies: of its two images, averaged with the other's."""
    torch.manual_seed(0)
    state = new_state(inception_resnet_v2(10, blocks=(1, 1, 1)))
    network = distributed.parallel(state.model, False, world, reduce_dtype)
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.rand(2, 3, 75, 75, generator=generator) * 2 - 1
    labels = torch.randint(10, (2,), generator=generator)
    state.optimizer.zero_grad(set_to_none=True)
    engine.train_mode(state.model, freeze_bn=False)
    torch.manual_seed(world.rank)
    torch.nn.functional.cross_entropy(network(x), labels).backward()
    return {name: p.grad.clone() for name, p in state.model.named_parameters()}


def rank_main(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.start("cpu") as world:
        alone = gradients(World(rank, 1, world.device), "bf16")  # nothing travels
        found = {"alone": alone, **{d: gradients(world, d) for d in ("fp32", "bf16")}}
    torch.save(found, Path(directory) / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Gradients]]:
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (free_port(), str(directory)), nprocs=2)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_gradients_in_bf16_are_the_mean_within_its_rounding(ranks):
    """Each rank's half is rounded once, and their sum once more."""
    for name, sent in ranks[0]["bf16"].items():
        halves = [rank["alone"][name].double() / 2 for rank in ranks]
        exact = halves[0] + halves[1]
        largest = sum(half.abs() for half in halves)
        allowed = ROUNDING * (largest + exact.abs()) * 1.01 + 1e-30
        assert ((sent.double() - exact).abs() <= allowed).all(), name
        assert torch.allclose(ranks[0]["fp32"][name].double(), exact, rtol=1e-5, atol=1e-9), name


def test_gradients_in_bf16_are_rounded(ranks):
    """They are float32 numbers whose lower 16 bits are zero; those sent in float32 are not."""
    for name, sent in ranks[0]["bf16"].items():
        assert sent.dtype == torch.float32
        assert torch.equal(sent, sent.bfloat16().float()), name
    assert any(not torch.equal(g, g.bfloat16().float()) for g in ranks[0]["fp32"].values())


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_both_ranks_apply_the_same_gradients(ranks, reduce_dtype):
    ours, theirs = (rank[reduce_dtype] for rank in ranks)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ranks[0]["alone"][n], ranks[1]["alone"][n]) for n in ours)


def test_a_run_of_one_rank_rounds_nothing(ranks):
    assert any(not torch.equal(g, g.bfloat16().float()) for g in ranks[0]["alone"].values())


def test_a_stopped_run_in_bf16_continues_bit_identically(config, tmp_path):
    bf16 = "train.reduce_dtype=bf16"
    place = {name: arguments(config, tmp_path / name, bf16) for name in ("unbroken", "stopped")}
    for arguments_of_run in (
        place["unbroken"],
        [*place["stopped"], "train.max_steps=3"],
        place["stopped"],
    ):
        result = run("train.py", *arguments_of_run, ranks=2)
        assert result.returncode == 0, result.stderr
    assert "continuing after step 3" in result.stdout
    ends = [checkpoint_of(tmp_path / name, STEPS) for name in place]
    assert differing(*(end.parts for end in ends)) == []
    assert [end.meta["images_seen"] for end in ends] == 2 * [ends[0].meta["images_seen"]]
    changed = run("train.py", *place["stopped"][:-1], ranks=2)
    assert changed.returncode == 1
    assert "train.reduce_dtype: 'bf16' -> 'fp32'" in changed.stderr
