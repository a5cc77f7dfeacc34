"""A training step, an evaluation, and the same step cut up over micro-batches and over ranks."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from irv2 import checkpoint, distributed, engine
from irv2.distributed import World, WorldError, divide_batch
from irv2.engine import (
    EvalOptions,
    Loss,
    StepOptions,
    TrainState,
    dropout_seed,
    running_average,
    train_step,
)
from irv2.model import inception_resnet_v2
from irv2.optim import RMSpropTF, parameter_groups

ALONE = World(0, 1, torch.device("cpu"))
CLASSES, LR = 6, 0.1
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are too small to be worth a second thread's spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_network(drop_rate: float = 0.0) -> nn.Module:
    """Convolution, batch norm with statistics of its own, dropout, classifier."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(drop_rate),
        nn.Linear(8 * 4 * 4, CLASSES),
    )
    with torch.no_grad():
        network[1].running_mean.normal_()
        network[1].running_var.uniform_(0.5, 2.0)
    return network


def new_state(network: nn.Module, ema_decay: float = 0.9) -> TrainState:
    groups = parameter_groups(network, weight_decay=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(network, running_average(network, ema_decay), RMSpropTF(groups, LR), scaler)


def images(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 6, 6, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch cut into micro-batches."""
    return zip(*(part.split(size) for part in batch))


def numbered(
    batches: Iterable[Batch], first: int = 0
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Batches with the numbers of their images, as an evaluation takes them."""
    for x, labels in batches:
        yield x, labels, list(range(first, first + len(x)))
        first += len(x)


def train(state: TrainState, micro_batch: int, steps: int = 3, batch: int = 8, **options) -> list:
    """Steps of `batch` images cut into micro-batches; (loss, gradient norm) of each."""
    options = StepOptions(accumulation=batch // micro_batch, **options)
    results = []
    for step in range(steps):
        batches = pieces(images(batch, seed=step), micro_batch)
        loss, norm = train_step(state, state.model, batches, LR, options, ALONE)
        results.append((loss.item(), norm.item()))
    return results


def trainable(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---------------------------------------------------------------------------------- a step


def test_accumulated_micro_batches_equal_one_batch_where_batch_norm_is_frozen():
    start = trainable(small_network())
    whole, halves, singles = (new_state(small_network()) for _ in range(3))
    results = [
        train(state, micro_batch, freeze_bn=True, clip_norm=0.5)
        for state, micro_batch in ((whole, 8), (halves, 4), (singles, 1))
    ]
    moved = trainable(whole.model) - start
    for state, result in zip((halves, singles), results[1:]):
        assert relative(trainable(state.model) - start, moved) < 1e-5
        assert np.allclose(result, results[0], rtol=1e-5)


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale():
    state = new_state(small_network())
    before = copy.deepcopy(state.model[1])
    train(state, 4, freeze_bn=True)
    after = state.model[1]
    assert torch.equal(after.running_mean, before.running_mean)
    assert torch.equal(after.running_var, before.running_var)
    assert not torch.equal(after.weight, before.weight)
    assert state.model[0].training


def test_live_batch_norm_moves_its_statistics():
    state = new_state(small_network())
    before = state.model[1].running_mean.clone()
    train(state, 8, steps=1)
    network = small_network()
    batch_mean = network[0](images(8)[0]).mean(dim=(0, 2, 3))
    assert torch.allclose(state.model[1].running_mean, 0.9 * before + 0.1 * batch_mean, atol=1e-6)


def gradients_by_hand() -> tuple[Tensor, float]:
    """Gradient of the label-smoothed loss on the first batch, and its norm."""
    network = small_network()
    x, labels = images(8)
    log_p = network.train()(x).log_softmax(1)
    target = torch.full_like(log_p, 0.1 / CLASSES)
    target[torch.arange(8), labels] += 0.9
    (-(target * log_p).sum(1).mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    return gradient, gradient.norm().item()


@pytest.mark.parametrize("share", [0.01, 0.5, 2.0, None])
def test_the_gradient_is_clipped_and_the_norm_before_it_returned(share):
    gradient, norm = gradients_by_hand()
    state = new_state(small_network())
    for group in state.optimizer.param_groups:
        group["weight_decay"] = 0.0
    start = trainable(state.model)
    clip_norm = None if share is None else share * norm
    ((_, returned),) = train(state, 8, steps=1, clip_norm=clip_norm)
    assert returned == pytest.approx(norm, rel=1e-5)
    # The optimizer's first step by hand: ms starts at 1, eps is 1.
    used = gradient * min(1.0, share or 1.0)
    moved = -LR * used / (1 + (used**2 - 1) * 0.1 + 1).sqrt()
    assert relative(trainable(state.model) - start, moved) < 1e-4


def test_the_learning_rate_given_is_the_one_used():
    moved = []
    for lr in (0.1, 0.2):
        state = new_state(small_network())
        start = trainable(state.model)
        train_step(state, state.model, iter([images(8)]), lr, StepOptions(), ALONE)
        moved.append(trainable(state.model) - start)
        assert [group["lr"] for group in state.optimizer.param_groups] == [lr, lr]
    assert relative(moved[1], 2 * moved[0]) < 1e-5


def test_a_step_is_counted_leaves_no_gradients_and_takes_only_its_own_batches():
    state = new_state(small_network())
    batches = pieces(images(12), 2)
    train_step(state, state.model, batches, LR, StepOptions(accumulation=2), ALONE)
    assert state.step == 1
    assert state.images_seen == 0  # the caller's to move: it knows the global batch
    assert all(p.grad is None for p in state.model.parameters())
    assert len(list(batches)) == 4


def test_a_restored_state_continues_bit_by_bit(tmp_path):
    state = new_state(small_network(drop_rate=0.5))
    train(state, 4, steps=2, seed=3)
    state.images_seen = 16
    assert engine.read_bad_steps(state) == ([], 0)
    checkpoint.save(tmp_path, state.step, state.tensors(), state.counters())
    restored = new_state(small_network(drop_rate=0.5))
    torch.rand(17)  # what the random generators did in between must not matter
    saved = checkpoint.load(tmp_path / "step-000000002")
    restored.load(saved.parts, saved.meta)
    assert (restored.step, restored.images_seen) == (2, 16)
    results = [train(s, 4, steps=2, seed=3) for s in (state, restored)]
    assert results[0] == results[1]
    for ours, theirs in ((restored.model, state.model), (restored.ema.module, state.ema.module)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_bfloat16_steps_stay_near_float32_and_keep_float32_weights():
    start = trainable(small_network())
    states = [new_state(small_network()) for _ in range(2)]
    for state, precision in zip(states, ("fp32", "bf16")):
        train(state, 8, precision=precision)
    moved = [trainable(state.model) - start for state in states]
    assert 1e-6 < relative(moved[1], moved[0]) < 0.05
    assert all(p.dtype == torch.float32 for p in states[1].model.parameters())


def test_frozen_batch_norm_goes_with_gradient_checkpointing():
    x = torch.randn(1, 3, 75, 75, generator=torch.Generator().manual_seed(0))
    gradients = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        network = inception_resnet_v2(
            2, drop_rate=0.0, blocks=(1, 1, 1), grad_checkpointing=grad_checkpointing
        )
        engine.train_mode(network, freeze_bn=True)
        network(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert relative(gradients[1], gradients[0]) < 1e-5


# ---------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_mixes_the_label_with_the_uniform_distribution(smoothing):
    logits = np.random.default_rng(0).normal(size=(5, 7)) * 3
    labels = np.array([0, 6, 3, 3, 1])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.eye(7)[labels] * (1 - smoothing) + smoothing / 7
    expected = -(target * log_p).sum(1).mean()
    loss = Loss(label_smoothing=smoothing)(torch.tensor(logits).float(), torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_auxiliary_loss_is_added_with_its_weight():
    generator = torch.Generator().manual_seed(0)
    logits, aux_logits = (torch.randn(4, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 4])
    for weight in (0.4, 0.0, 1.5):
        loss = Loss(0.1, aux_weight=weight)
        expected = loss(logits, labels) + weight * loss(aux_logits, labels)
        assert loss((logits, aux_logits), labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_computed_in_float32():
    logits = torch.tensor([[10.0, 0.0, -3.0]]).bfloat16()
    loss = Loss(label_smoothing=0.0)(logits, torch.tensor([0]))
    assert loss.dtype == torch.float32
    expected = math.log1p(math.exp(-10) + math.exp(-13))
    assert loss.item() == pytest.approx(expected, rel=1e-2)


# ---------------------------------------------------------------------------------- running average


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
@pytest.mark.parametrize("n", [0, 1, 2, 8, 89, 1000, 10**6])
def test_the_averages_decay_is_tensorflows(decay, n):
    average = running_average(nn.Linear(1, 1), decay)
    expected = min(decay, (1 + n) / (10 + n))
    assert average.get_decay(n + 2) == pytest.approx(expected, rel=1e-12)


def test_the_average_follows_weights_and_statistics_from_step_to_step():
    state = new_state(small_network(), ema_decay=0.4)
    names = ("0.weight", "1.running_mean", "1.running_var", "5.bias")
    expected = {name: state.model.state_dict()[name].double() for name in names}
    for step in range(1, 8):
        train(state, 8, steps=1)
        values = {name: state.model.state_dict()[name].double() for name in names}
        decay = min(0.4, step / (step + 9))
        expected = {k: decay * expected[k] + (1 - decay) * values[k] for k in names}
        average = state.ema.module.state_dict()
        for name in names:
            assert relative(average[name].double(), expected[name]) < 1e-5, (step, name)
    assert relative(average["1.running_mean"], state.model[1].running_mean) > 1e-3
    assert torch.equal(average["1.num_batches_tracked"], state.model[1].num_batches_tracked)


def test_the_average_shares_nothing_with_the_model_and_is_ready_to_evaluate():
    state = new_state(small_network())
    pointers = {value.data_ptr() for value in state.model.state_dict().values()}
    averaged = state.ema.module
    assert not any(value.data_ptr() in pointers for value in averaged.state_dict().values())
    assert not averaged.training


# ---------------------------------------------------------------------------------- randomness


def test_every_micro_batch_of_every_rank_has_its_own_dropout_seed():
    grid = [
        (seed, step, rank, part)
        for seed in (0, 1, 2, 42)
        for step in (*range(50), 10**6, 10**6 + 1)
        for rank in range(8)
        for part in range(4)
    ]
    seeds = [dropout_seed(*position) for position in grid]
    assert len(set(seeds)) == len(grid)
    # PyTorch's CPU generator uses only the lower half.
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(grid)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_dropout_depends_on_seed_step_rank_and_part_alone():
    class Recorder(nn.Module):
        """A network that notes the mask its dropout draws."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.masks = small_network(drop_rate=0.5), []

        def forward(self, x: Tensor) -> Tensor:
            self.masks.append(tuple(nn.functional.dropout(torch.ones(64), 0.5, True).tolist()))
            return self.inner(x)

    def masks(seed: int, rank: int, noise: int) -> list[tuple]:
        network = Recorder()
        state = new_state(network)
        options = StepOptions(accumulation=2, seed=seed)
        for step in range(3):
            torch.rand(noise)
            world = World(rank, 1, torch.device("cpu"))
            train_step(state, network, pieces(images(4, step), 2), LR, options, world)
        return network.masks

    runs = {(seed, rank): masks(seed, rank, noise=1) for seed in (0, 1) for rank in (0, 1)}
    assert len({mask for run in runs.values() for mask in run}) == 4 * 3 * 2
    assert masks(1, 1, noise=5) == runs[1, 1]


# ---------------------------------------------------------------------------------- evaluation


def test_an_evaluation_counts_every_image_and_changes_nothing():
    network = small_network(drop_rate=0.5)
    x, labels = images(23)
    before = copy.deepcopy(network.state_dict())
    seen = []
    result = engine.evaluate(
        network, numbered(pieces((x, labels), 5)), ALONE, on_batch=lambda n, _: seen.append(n)
    )
    with torch.no_grad():
        logits = network.eval()(x)
    best = logits.argsort(1, descending=True)
    assert result.images == 23
    assert result.top1_correct == (best[:, 0] == labels).sum().item()
    assert result.top5_correct == (best[:, :5] == labels[:, None]).any(1).sum().item()
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert result.loss.sum() == pytest.approx(expected, rel=1e-6)
    assert seen == [5, 5, 5, 5, 3]
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_a_step_after_an_evaluation_trains_again():
    straight, interrupted = (new_state(small_network(drop_rate=0.5)) for _ in range(2))
    train(straight, 8, steps=2)
    train(interrupted, 8, steps=1)
    engine.evaluate(interrupted.model, numbered([images(4)]), ALONE)
    batches = iter([images(8, seed=1)])
    train_step(interrupted, interrupted.model, batches, LR, StepOptions(), ALONE)
    assert torch.equal(trainable(straight.model), trainable(interrupted.model))


def test_several_views_of_an_image_count_as_the_mean_of_their_softmax():
    network = small_network()
    x, labels = images(4)
    views = torch.stack([x, x.roll(1, 2), x.roll(1, 3)], 1)  # [4, 3, 3, 6, 6]
    with torch.no_grad():
        every = torch.stack([network.eval()(views[:, v]).softmax(1) for v in range(3)])
        mirrored = torch.stack([network(views[:, v].flip(3)).softmax(1) for v in range(3)])
    flat = views.flatten(0, 1)
    for is_mirrored, expected in ((False, every.mean(0)), (True, (every + mirrored).mean(0) / 2)):
        for at_once in (None, 5):
            options = EvalOptions(mirrored=is_mirrored, at_once=at_once)
            (batch,) = engine.scored(network, [(flat, labels, [0, 1, 2, 3])], options)
            assert torch.allclose(batch.scores.exp(), expected, atol=1e-6)


def test_classes_that_do_not_compete_are_never_answers():
    network = small_network()
    x, labels = images(40)
    competing = torch.tensor([True, False, True, True, False, True])
    mine = competing[labels]
    x, labels = x[mine], labels[mine]
    result = engine.evaluate(
        network, numbered([(x, labels)]), ALONE, EvalOptions(competing=competing)
    )
    places = competing.nonzero().squeeze(1)
    with torch.no_grad():
        logits = network.eval()(x)[:, places]
    expected = [places[i].item() for i in logits.argmax(1)]
    assert result.top[:, 0].tolist() == expected
    assert result.top1_correct == sum(e == label for e, label in zip(expected, labels.tolist()))
    assert result.probability.sum(1) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------- ranks


def _rank_main(rank: int, size: int, port: int, directory: str) -> None:
    """What each rank of the tests below does; its findings go into a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = {}
    with distributed.start("cpu") as world:
        found["place"] = (world.rank, world.size, world.is_main)
        found["any"] = [world.any(flag) for flag in (False, rank == 1, rank == 0, True)]
        found["votes"] = world.votes(False, rank == 1, True)
        averaged = [torch.full((2, 2), float(rank)), torch.tensor(4.0 * rank)]
        world.average_(averaged)
        found["average"] = [tensor.tolist() for tensor in averaged]
        for name, freeze_bn, micro_batch in (
            ("frozen", True, 4),
            ("accumulated", True, 2),
            ("live", False, 4),
        ):
            found[name] = _train_on_a_rank(world, freeze_bn, micro_batch)
        x, labels = images(7)
        mine = slice(7 * rank // size, 7 * (rank + 1) // size)
        batches = pieces((x[mine], labels[mine]), 2)
        result = engine.evaluate(small_network(), numbered(batches, mine.start), world)
        found["evaluated"] = dataclasses.asdict(result)
    torch.save(found, Path(directory) / f"rank{rank}.pt")


def _train_on_a_rank(world: World, freeze_bn: bool, micro_batch: int) -> dict:
    """Three steps of 8 images over all ranks, each rank its slice of them."""
    state = new_state(small_network())
    network = distributed.parallel(state.model, False, world)
    share = 8 // world.size
    options = StepOptions(
        accumulation=share // micro_batch, clip_norm=0.5, freeze_bn=freeze_bn, seed=1
    )
    results, mine = [], slice(world.rank * share, (world.rank + 1) * share)
    for step in range(3):
        x, labels = images(8, seed=step)
        batches = pieces((x[mine], labels[mine]), micro_batch)
        loss, norm = train_step(state, network, batches, LR, options, world)
        results.append((loss.item(), norm.item()))
        if step == 0:
            first_mean = state.model[1].running_mean.clone()
    return {
        "model": state.model.state_dict(),
        "ema": state.ema.module.state_dict(),
        "results": results,
        "first_mean": first_mean,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The findings of two processes on the CPU."""
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank_main, (2, free_port(), str(directory)), nprocs=2)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


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
        norms = [norm for _, norm in found[how]["results"]]
        assert norms == pytest.approx([norm for _, norm in expected], rel=1e-5)
    losses = np.mean([[loss for loss, _ in found[how]["results"]] for found in ranks], axis=0)
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5)


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
    alone = engine.evaluate(small_network(), numbered([images(7)]), ALONE)
    for found in ranks:
        for column in ("index", "label", "rank", "top"):
            assert np.array_equal(found["evaluated"][column], getattr(alone, column))
        assert found["evaluated"]["loss"] == pytest.approx(alone.loss, rel=1e-6)


def test_a_world_of_one_needs_no_process_group():
    assert not torch.distributed.is_initialized()
    tensor = torch.tensor([1.0, 2.0])
    ALONE.average_([tensor])
    assert ALONE.same(3)
    assert tensor.tolist() == [1.0, 2.0]
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
    assert ALONE.votes(True, False) == [True, False]


# ---------------------------------------------------------------------------------- the batch


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "expected"),
    [
        (640, 32, 20, (32, 1)),  # the paper's machine
        (640, 32, 1, (32, 20)),
        (640, 32, 8, (20, 4)),
        (640, 64, 8, (40, 2)),
        (32, 32, 1, (32, 1)),
        (32, 64, 2, (16, 1)),
        (96, 32, 2, (24, 2)),
        (7, 32, 7, (1, 1)),
    ],
)
def test_the_batch_is_divided_into_the_largest_equal_parts(
    global_batch, micro_batch, ranks, expected
):
    assert divide_batch(global_batch, micro_batch, ranks) == expected


def test_every_division_makes_the_global_batch_of_parts_no_larger_than_asked():
    for global_batch in range(1, 65):
        for ranks in (1, 2, 3, 4, 8):
            for micro_batch in (1, 2, 5, 8, 32):
                try:
                    size, accumulation = divide_batch(global_batch, micro_batch, ranks)
                except WorldError:
                    continue
                assert size * accumulation * ranks == global_batch
                assert min(micro_batch, global_batch // ranks) / 2 <= size <= micro_batch


@pytest.mark.parametrize(("global_batch", "ranks"), [(640, 6), (640, 7), (100, 8), (74, 3)])
def test_a_number_of_ranks_that_does_not_divide_the_batch_names_values_that_work(
    global_batch, ranks
):
    with pytest.raises(WorldError) as caught:
        divide_batch(global_batch, 32, ranks)
    message = str(caught.value)
    assert message.startswith(f"train.global_batch={global_batch} ")
    assert f"{ranks} ranks" in message
    near = re.search(r"start (\d+)(?: or (\d+))? ranks", message).groups()
    for other in filter(None, near):
        assert global_batch % int(other) == 0
    fitting = int(re.search(r"set train\.global_batch=(\d+)", message)[1])
    divide_batch(fitting, 32, ranks)


def test_more_ranks_than_images_are_refused_with_a_batch_that_works():
    with pytest.raises(WorldError, match=r"start 3 ranks, or set train\.global_batch=8"):
        divide_batch(3, 32, 8)


def test_a_share_without_equal_parts_near_the_micro_batch_names_values_that_work():
    with pytest.raises(WorldError) as caught:
        divide_batch(74, 32, 2)  # 37 images a rank, a prime
    message = str(caught.value)
    assert "37 images a rank" in message
    micro_batches = re.search(r"train\.micro_batch=(\d+) or (\d+)", message).groups()
    assert micro_batches == ("1", "37")
    for micro_batch in map(int, micro_batches):
        divide_batch(74, micro_batch, 2)
    fitting = int(re.search(r"or train\.global_batch=(\d+)", message)[1])
    assert divide_batch(fitting, 32, 2) == (32, fitting // 64)


# ---------------------------------------------------------------------------------- devices


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto") == torch.device("cpu")
    with pytest.raises(WorldError, match="no usable GPU"):
        distributed.choose_device("cuda")


def test_each_rank_takes_its_own_gpu_and_too_many_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.choose_device("auto") == torch.device("cuda", 1)
    assert distributed.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(WorldError, match="--nproc-per-node=2"):
        distributed.choose_device("auto")
