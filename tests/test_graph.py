"""A step recorded and replayed: on a CPU by a tape in place of CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from small_network import (
    ALONE,
    evaluate,
    everything,
    images,
    lay_out,
    new_state,
    numbered,
    pieces,
    randomised,
    small_network,
)
from tape import Tapes, recorder
from torch import Tensor, nn

from irv2.network.model import inception_resnet_v2
from irv2.scoring import EvalOptions
from irv2.training import graph
from irv2.training.distributed import World
from irv2.training.graph import WARM_UP, GraphError, Recorder
from irv2.training.loss import Loss
from irv2.training.state import TrainState
from irv2.training.step import StepOptions, train_step

CUDA = torch.device("cuda")


def flat_state(network: nn.Module) -> TrainState:
    return lay_out(new_state(network))


def assert_identical(ours: TrainState, theirs: TrainState) -> None:
    found, expected = everything(ours), everything(theirs)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def steps(state: TrainState, count: int, options: StepOptions, harm: int | None = None) -> list:
    """Steps on other images and at another rate each; their losses and gradient norms."""
    found = []
    for number in range(count):
        x, labels = images(8, seed=number)
        if number == harm:
            x[0, 0, 0, 0] = float("nan")
        size = 8 // options.accumulation
        batches = pieces((x, labels), size)
        lr = 0.1 * 0.9**number
        loss, norm = train_step(state, state.model, batches, lr, options, ALONE)
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replayed_steps_equal_plain_ones_to_the_bit(accumulation):
    """With other images, rates, dropout and shares of the average in each, and one that is bad."""
    plain, replayed = (flat_state(small_network(drop_rate=0.5)) for _ in range(2))
    options = {"accumulation": accumulation, "clip_norm": 0.5, "seed": 3}
    count, bad = WARM_UP + 5, WARM_UP + 2
    expected = steps(plain, count, StepOptions(**options), bad)
    record = recorder(replayed)
    found = steps(replayed, count, StepOptions(**options, run=record), bad)
    assert len(record._recorded) == 2
    assert repr(found) == repr(expected)  # NaN is not equal to itself
    assert_identical(replayed, plain)
    assert replayed.read_bad_steps() == plain.read_bad_steps() == ([bad + 1], 1)


def test_a_resumed_run_that_records_anew_equals_an_unbroken_one():
    unbroken, stopped, resumed = (flat_state(small_network(drop_rate=0.5)) for _ in range(3))
    steps(unbroken, WARM_UP + 4, StepOptions(run=recorder(unbroken)))
    steps(stopped, WARM_UP + 2, StepOptions(run=recorder(stopped)))
    stopped.read_bad_steps()
    resumed.load(copy.deepcopy(stopped.tensors()), stopped.counters())
    lay_out(resumed)
    options = StepOptions(run=recorder(resumed))
    for number in range(WARM_UP + 2, WARM_UP + 4):
        batch = iter([images(8, seed=number)])
        train_step(resumed, resumed.model, batch, 0.1 * 0.9**number, options, ALONE)
    assert_identical(resumed, unbroken)


def test_images_of_another_size_are_recorded_anew():
    """And what was recorded for the first size stays."""
    torch.manual_seed(0)
    plain, replayed = (flat_state(pooling_network()) for _ in range(2))
    record = recorder(replayed)
    sizes = [8] * (WARM_UP + 2) + [10] * (WARM_UP + 2) + [8]
    for state, options in ((plain, StepOptions()), (replayed, StepOptions(run=record))):
        for number, size in enumerate(sizes):
            x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(number))
            batch = iter([(x, torch.arange(4))])
            train_step(state, state.model, batch, 0.01, options, ALONE)
    assert len(record._recorded) == 3  # forward and backward of each size, and the update
    assert_identical(replayed, plain)


def pooling_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6),
    )


def test_a_recorded_evaluation_equals_a_plain_one():
    """With two networks, as in training; the last batch, which is smaller, is not recorded."""
    networks = [randomised(small_network()) for _ in range(2)]
    with torch.no_grad():
        networks[1][0].weight.neg_()
    record, (x, labels) = Recorder(Tapes(list)), images(2 * (WARM_UP + 2) + 1)
    for network in 4 * networks:
        recorded, plain = (
            evaluate(network, numbered(pieces((x, labels), 2)), options=EvalOptions(run=run))
            for run in (record, graph.plainly)
        )
        assert recorded.top.tolist() == plain.top.tolist()
        assert recorded.loss.tolist() == plain.loss.tolist()
    assert len(record._recorded) == 2


@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "shares"])
def test_the_whole_networks_step_can_be_recorded(mixed):
    """Its auxiliary head, mixed labels and class weights, too; nothing is asked by the host."""
    torch.manual_seed(0)
    model = inception_resnet_v2(3, aux_logits=True, blocks=(1, 1, 1), width=1 / 16)
    state = flat_state(model)
    record = recorder(state)
    loss = Loss(class_weights=torch.tensor([0.5, 1.0, 1.5]))
    options = StepOptions(loss, clip_norm=2.0, precision="bf16", run=record)
    labels = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]) if mixed else torch.tensor([0, 2])
    for _ in range(WARM_UP + 1):
        batch = iter([(torch.randn(2, 3, 299, 299), labels)])
        train_step(state, state.model, batch, 0.01, options, ALONE)
    assert len(record._recorded) == 2


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_what_cannot_be_recorded_ends_the_run_with_what_to_do(when):
    """A number goes to the host: what CUDA leaves behind of such a recording is not to be used."""

    def ask(_module: nn.Module, _inputs: tuple, y: Tensor) -> Tensor:
        if when == "forward":
            return y * y.detach().mean().item()
        y.register_hook(lambda grad: grad * grad.mean().item())
        return y

    state = flat_state(small_network())
    state.model[0].register_forward_hook(ask)
    options = StepOptions(run=recorder(state))
    steps(state, WARM_UP, options)
    with pytest.raises(GraphError, match=r"backward cannot be recorded .*train\.compile=regions"):
        steps(state, 1, options)


@pytest.mark.parametrize(
    ("precision", "kind", "world", "mode", "told"),
    [
        ("bf16", "rmsprop_tf", ALONE, False, "needs a GPU"),
        ("bf16", "rmsprop_tf", World(0, 2, CUDA), "graph", ""),
        ("fp16", "rmsprop_tf", World(0, 1, CUDA), "regions", "fp16's loss scaler"),
        ("bf16", "adamw", World(0, 1, CUDA), "regions", "with adamw the host decides"),
        ("bf16", "rmsprop_tf", World(0, 1, CUDA), "graph", ""),
    ],
)
def test_a_step_not_to_be_recorded_falls_back_aloud(precision, kind, world, mode, told, capsys):
    assert graph.mode_here("graph", precision, world, kind) == mode
    assert told in (said := capsys.readouterr().out)
    assert said.count("\n") == (1 if told else 0)
    for asked in (False, "regions"):
        assert graph.mode_here(asked, precision, world, kind) == asked
    assert capsys.readouterr().out == ""
