"""Several ranks: how they find each other, what they do together, and steps cut up over them."""

from __future__ import annotations

import dataclasses
import os
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from places import take
from programs import run_script_on_ranks
from same_run import differing
from small_network import (
    ALONE,
    LR,
    copied,
    evaluate,
    images,
    lay_out,
    new_state,
    numbered,
    pieces,
    relative,
    small_network,
    train,
    trainable,
)
from tape import recorder
from torch import Tensor

from irv2.network.accelerate import accelerate
from irv2.network.model import inception_resnet_v2
from irv2.run import directory
from irv2.training import distributed, exchange, graph, prepare
from irv2.training.distributed import Place, World, WorldError
from irv2.training.state import TrainState
from irv2.training.step import StepOptions, train_mode, train_step

pytestmark = pytest.mark.slow

LIMIT = timedelta(seconds=20)
SIZE = (2, 3, 75, 75)
ROUNDING = 2.0**-8  # bfloat16's: half of the distance between neighbours, relative


def on_ranks(size: int, function: str, folder: Path) -> list[dict]:
    """Results of a function of this module, given a World and a folder, on each rank."""
    text = f"from test_ranks import be_a_rank; be_a_rank({function!r}, {str(folder)!r})"
    run_script_on_ranks(size, text)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def be_a_rank(function: str, folder: str) -> None:
    """Leave in the folder what a function returns on this rank."""
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]  # as hosts count them, apart
    directory.APPEARS_WITHIN_S = 0.5
    with distributed.start("cpu") as world:
        found = globals()[function](world, Path(folder))
    torch.save(found, Path(folder) / f"{world.rank}.pt")


# ---------------------------------------------------------------------------------- two ranks


def two_ranks(world: World, folder: Path) -> dict:
    """Decisions, averages, steps and an evaluation, as each of two ranks sees them."""
    rank = world.rank
    averaged = [torch.full((2, 2), float(rank)), torch.tensor(4.0 * rank)]
    world.average_(averaged)
    x, labels = images(7)
    mine = slice(7 * rank // world.size, 7 * (rank + 1) // world.size)
    batches = numbered(pieces((x[mine], labels[mine]), 2), mine.start)
    return {
        "restarts": os.environ["TORCHELASTIC_RESTART_COUNT"],
        "place": (rank, world.size, world.is_main),
        "any": [world.any(flag) for flag in (False, rank == 1, rank == 0, True)],
        "votes": world.votes(False, rank == 1, True),
        "average": [tensor.tolist() for tensor in averaged],
        "frozen": three_steps(world, freeze_bn=True, micro_batch=4),
        "accumulated": three_steps(world, freeze_bn=True, micro_batch=2),
        "live": three_steps(world, freeze_bn=False, micro_batch=4),
        "evaluated": dataclasses.asdict(evaluate(small_network(), batches, world)),
        "unshared": [check_shared(world, folder / name) for name in ("shared", f"own-{rank}")],
        "alone": gradients(World(rank, 1, world.device), "bf16"),  # nothing travels
        **{reduce_dtype: gradients(world, reduce_dtype) for reduce_dtype in ("fp32", "bf16")},
        "recorded": {
            dtype: [long_run(world, dtype, recorded) for recorded in (True, False)]
            for dtype in ("fp32", "bf16")
        },
    }


def long_run(world: World, reduce_dtype: str, recorded: bool) -> dict[str, dict[str, Tensor]]:
    """A GPU's step on the CPU, recorded and replayed or as DistributedDataParallel has it."""
    state = lay_out(new_state(small_network(drop_rate=0.5)))
    network = state.model if recorded else exchange.wrapped(state.model, world, reduce_dtype)
    run = recorder(state) if recorded else graph.plainly
    options = StepOptions(accumulation=2, clip_norm=0.5, seed=1, run=run, reduce_dtype=reduce_dtype)
    for number in range(graph.WARM_UP + 2):
        mine = (part.split(4)[world.rank] for part in images(8, seed=number))
        train_step(state, network, pieces(tuple(mine), 2), LR, options, world)
    return {part: copied(tensors) for part, tensors in state.tensors().items()}


def three_steps(world: World, freeze_bn: bool, micro_batch: int) -> dict:
    """Three steps of 8 images over all ranks, each rank its slice of them."""
    state = new_state(small_network())
    network = exchange.wrapped(state.model, world)
    share = 8 // world.size
    options = StepOptions(
        accumulation=share // micro_batch, clip_norm=0.5, freeze_bn=freeze_bn, seed=1
    )
    results, means = [], []
    for step in range(3):
        x, labels = (part.split(share)[world.rank] for part in images(8, seed=step))
        batches = pieces((x, labels), micro_batch)
        loss, norm = train_step(state, network, batches, LR, options, world)
        results.append((loss.item(), norm.item()))
        means.append(state.model[1].running_mean.clone())
    weights = {"model": state.model.state_dict(), "ema": state.ema.module.state_dict()}
    return {**weights, "results": results, "first_mean": means[0]}


def check_shared(world: World, folder: Path) -> str:
    """The error about ranks that do not share a directory, or ""."""
    folder.mkdir(exist_ok=True)
    try:
        directory.check_shared(folder, world)
    except WorldError as error:
        return str(error)
    return ""


def gradients(world: World, reduce_dtype: str) -> dict[str, Tensor]:
    """Gradient that a rank applies: of its two images, averaged with the other's."""
    torch.manual_seed(0)
    state = new_state(accelerate(inception_resnet_v2(10, blocks=(1, 1, 1), width=0.25)))
    network = exchange.wrapped(state.model, world, reduce_dtype)
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.rand(SIZE, generator=generator) * 2 - 1
    labels = torch.randint(10, SIZE[:1], generator=generator)
    train_mode(state.model, freeze_bn=False)
    torch.manual_seed(world.rank)
    torch.nn.functional.cross_entropy(network(x), labels).backward()
    return {name: p.grad.clone() for name, p in state.model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    """Results of `two_ranks` on two processes."""
    return on_ranks(2, "two_ranks", folder)


def test_hosts_that_count_their_restarts_apart_find_each_other(ranks):
    """Each rank has another TORCHELASTIC_RESTART_COUNT."""
    assert [found["restarts"] for found in ranks] == ["0", "1"]


def test_each_rank_knows_its_place(ranks):
    assert [found["place"] for found in ranks] == [(0, 2, True), (1, 2, False)]


def test_any_is_true_on_every_rank_if_it_is_true_on_one(ranks):
    assert [found["any"] for found in ranks] == [[False, True, True, True]] * 2
    assert [found["votes"] for found in ranks] == [[False, True, True]] * 2


def test_sums_and_averages_are_over_all_ranks(ranks):
    assert [found["average"] for found in ranks] == [[[[0.5, 0.5], [0.5, 0.5]], 2.0]] * 2


@pytest.mark.parametrize("how", ["frozen", "accumulated"])
def test_two_ranks_with_half_the_images_each_equal_one_rank_with_all(ranks, how):
    alone = new_state(small_network())
    start = trainable(alone.model)
    expected = train(alone, 8, freeze_bn=True, clip_norm=0.5)
    moved = trainable(alone.model) - start
    for found in ranks:
        network = small_network()
        network.load_state_dict(found[how]["model"])
        assert relative(trainable(network) - start, moved) < 1e-5
        for results, expected_of in zip(zip(*found[how]["results"]), zip(*expected)):
            assert results == pytest.approx(expected_of, rel=1e-5)  # losses, then norms


@pytest.mark.parametrize("which", ["model", "ema"])
def test_ranks_end_with_the_same_weights_and_statistics_where_batch_norm_is_live(ranks, which):
    ours, theirs = (found["live"][which] for found in ranks)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert not torch.equal(ours["1.running_mean"], small_network()[1].running_mean)


def test_the_running_mean_is_that_of_all_ranks_images(ranks):
    alone = new_state(small_network())
    train(alone, 8, steps=1)
    for found in ranks:
        assert relative(found["live"]["first_mean"], alone.model[1].running_mean) < 1e-6


def test_an_evaluation_by_two_ranks_counts_every_image_once(ranks):
    alone = evaluate(small_network(), numbered([images(7)]))
    for found in ranks:
        for column in ("index", "label", "rank", "top"):
            assert np.array_equal(found["evaluated"][column], getattr(alone, column))
        assert found["evaluated"]["loss"] == pytest.approx(alone.loss, rel=1e-6)


def test_different_run_directories_are_noticed_on_every_rank(ranks, folder):
    for rank, found in enumerate(ranks):
        shared, own = found["unshared"]
        assert shared == ""
        assert own.startswith(f"{folder / f'own-{rank}'}: rank 1 (host ")
        assert "sees another directory there than rank 0, or none" in own
    assert not list(folder.glob("*/.mark*"))


def test_a_world_of_one_needs_no_process_group():
    assert not dist.is_initialized()
    tensor = torch.tensor([1.0, 2.0])
    ALONE.average_([tensor])
    assert ALONE.same(3)
    assert tensor.tolist() == [1.0, 2.0]
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
    assert ALONE.votes(True, False) == [True, False]


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_ranks_whose_steps_are_recorded_equal_those_whose_are_not(ranks, reduce_dtype):
    """To the bit on two ranks, whose sum has one order; with two micro-batches a step."""
    for found in ranks:
        recorded, wrapped = found["recorded"][reduce_dtype]
        assert differing(recorded, wrapped) == []
    ours, theirs = (found["recorded"][reduce_dtype][0] for found in ranks)
    assert differing(ours, theirs) == []


# ---------------------------------------------------------------------------------- in bfloat16


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
    """They are float32 numbers whose lower 16 bits are zero; all others are not."""
    for name, sent in ranks[0]["bf16"].items():
        assert sent.dtype == torch.float32
        assert torch.equal(sent, sent.bfloat16().float()), name
    for unrounded in ("fp32", "alone"):
        sent = ranks[0][unrounded].values()
        assert any(not torch.equal(g, g.bfloat16().float()) for g in sent), unrounded


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_both_ranks_apply_the_same_gradients(ranks, reduce_dtype):
    ours, theirs = (rank[reduce_dtype] for rank in ranks)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ranks[0]["alone"][n], ranks[1]["alone"][n]) for n in ours)


# ---------------------------------------------------------------------------------- three ranks


def three_ranks(world: World, _folder: Path) -> dict[tuple[bool, str], bool]:
    """True if a continued run is bit-identical, by (settled, what gradients travel in)."""
    return {
        (settled, reduce_dtype): is_continued(world, settled, reduce_dtype)
        for settled, reduce_dtype in [(True, "fp32"), (False, "fp32"), (True, "bf16")]
    }


def is_continued(world: World, settled: bool, reduce_dtype: str) -> bool:
    """True if two steps are those of a run that was stopped and continued between them."""
    unbroken, network = started(world, settled, reduce_dtype)
    one_step(unbroken, network, world)
    saved = {part: copied(tensors) for part, tensors in unbroken.tensors().items()}
    unbroken.read_bad_steps()
    counters = unbroken.counters()
    one_step(unbroken, network, world)

    continued, network = started(world, settled, reduce_dtype)
    continued.load(saved, counters)
    one_step(continued, network, world)
    return differing(continued.tensors(), unbroken.tensors()) == []


def started(world: World, settled: bool, reduce_dtype: str) -> tuple[TrainState, torch.nn.Module]:
    torch.manual_seed(0)
    state = new_state(accelerate(inception_resnet_v2(10, blocks=(1, 1, 1), width=0.25)))
    network = exchange.wrapped(state.model, world, reduce_dtype)
    if settled:
        before = copied(state.model.state_dict())
        prepare.settle(state, network, SIZE[0], SIZE[2], StepOptions())
        after = state.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(p.grad is None for p in state.model.parameters())
    return state, network


def one_step(state: TrainState, network: torch.nn.Module, world: World) -> None:
    generator = torch.Generator().manual_seed(10 * state.step + world.rank)
    x = torch.rand(SIZE, generator=generator) * 2 - 1
    labels = torch.randint(10, SIZE[:1], generator=generator)
    options = StepOptions(clip_norm=2.0, seed=3)
    train_step(state, network, iter([(x, labels)]), LR, options, world)


def test_a_continued_run_adds_up_as_an_unbroken_one(tmp_path):
    """On three ranks, the fewest whose order of adding up matters."""
    for equal in on_ranks(3, "three_ranks", tmp_path):
        # Unsettled they differ: the test can tell.
        assert equal == {(True, "fp32"): True, (False, "fp32"): False, (True, "bf16"): True}


# ---------------------------------------------------------------------------------- meeting


def empty_store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(LIMIT)
    return store


def prefixes(store: dist.Store, size: int, before: str = "") -> list[str]:
    """Results that the ranks of one start agree on, a thread each.

    The ranks other than 0 come once the key `before` is there, if one is given.
    """
    found: dict[int, str] = {}

    def meet(rank: int) -> None:
        if rank and before:
            store.wait([before], LIMIT)
        found[rank] = distributed._fresh_prefix(store, rank, size, LIMIT)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


def test_every_start_has_a_prefix_of_its_own_which_its_ranks_share():
    store = empty_store()
    starts = [prefixes(store, size) for size in (3, 3, 2, 4)]
    assert [len(set(start)) for start in starts] == [1, 1, 1, 1]
    assert len({start[0] for start in starts}) == 4


def test_ranks_that_died_while_they_were_joining_mislead_nobody():
    store = empty_store()
    store.set("call/1", "dead")  # unanswered, as rank 0 died first
    store.set("call/2", "answered")
    store.set("answer/answered", "start-of-the-dead")
    start = set(prefixes(store, 3, before="answer/dead"))  # rank 0 answers the dead first
    assert start == {store.get("answer/dead").decode()}
    assert start != {"start-of-the-dead"}


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(dist.DistError, match=r"ranks \[1\] did not arrive within 0.1 s"):
        distributed._fresh_prefix(empty_store(), 0, 2, timedelta(seconds=0.1))


# ---------------------------------------------------------------------------------- devices


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto") == torch.device("cpu")
    with pytest.raises(WorldError, match="no usable GPU"):
        distributed.choose_device("cuda")


def test_each_rank_takes_its_own_gpu_and_too_many_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    take(monkeypatch, Place(1, 2, 1, 2))
    assert distributed.choose_device("auto") == torch.device("cuda", 1)
    assert distributed.choose_device("cpu") == torch.device("cpu")
    take(monkeypatch, Place(0, 4, 0, 4))
    with pytest.raises(WorldError, match="--nproc-per-node=2"):
        distributed.choose_device("auto")
