"""A training step and its running average, dropout and bad numbers; cut up, too."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import small_meta
import torch
from small_network import (
    ALONE,
    LR,
    everything,
    images,
    lay_out,
    new_state,
    pieces,
    relative,
    small_network,
    train,
    trainable,
)
from torch import Tensor, nn

from irv2.network.model import inception_resnet_v2
from irv2.run import checkpoint
from irv2.training.distributed import World
from irv2.training.optim import KINDS, RMSpropTF, parameter_groups
from irv2.training.state import TrainState, running_average
from irv2.training.step import (
    StepOptions,
    begin,
    dropout_seed,
    forward_backward,
    train_mode,
    train_step,
    update,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are too small to be worth a second thread's spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    target = torch.full_like(log_p, 0.1 / 6)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_state_continues_bit_by_bit(tmp_path, kind):
    state = new_state(small_network(drop_rate=0.5), kind=kind)
    train(state, 4, steps=2, seed=3)
    state.images_seen = 8
    assert state.read_bad_steps() == ([], 0)
    checkpoint.save(tmp_path, state.step, state.tensors(), small_meta.meta(2) | state.counters())
    restored = new_state(small_network(drop_rate=0.5), kind=kind)
    torch.rand(17)  # what the random generators did in between must not matter
    saved = checkpoint.load(tmp_path / "step-000000002")
    restored.load(saved.parts, saved.meta)
    assert (restored.step, restored.images_seen) == (2, 8)
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
            2, drop_rate=0.0, blocks=(1, 1, 1), width=0.25, grad_checkpointing=grad_checkpointing
        )
        train_mode(network, freeze_bn=True)
        network(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert relative(gradients[1], gradients[0]) < 1e-5


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


# ---------------------------------------------------------------------------------- not finite


def step(state: TrainState, harm: str = "", seed: int = 0) -> tuple[Tensor, Tensor]:
    """One step of 8 images; `harm`: "loss" or "gradient" is made not finite."""
    x, labels = images(8, seed)
    if harm == "loss":
        x[3, 0, 0, 0] = math.nan
    hook = None
    if harm == "gradient":
        hook = state.model[5].weight.register_hook(lambda grad: grad * math.inf)
    result = train_step(state, state.model, iter([(x, labels)]), LR, StepOptions(), ALONE)
    if hook is not None:
        hook.remove()
    return result


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize(
    "kind, decided_on", [*((k, "host") for k in KINDS), ("rmsprop_tf", "device")]
)
@pytest.mark.parametrize("harm", ["loss", "gradient"])
def test_a_bad_step_changes_no_weight_statistic_average_or_slot(harm, kind, decided_on):
    state = new_state(small_network(), kind=kind)
    if decided_on == "device":
        lay_out(state)
    step(state)
    before = everything(state)
    loss, norm = step(state, harm)
    assert not (torch.isfinite(loss) and torch.isfinite(norm))
    assert_same(everything(state), before)
    assert state.step == 2
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_frozen_statistics_are_not_among_what_ranks_average():
    """A mean over ranks rounds, so that what all ranks have alike would drift."""
    frozen, trained = (lay_out(new_state(small_network()), f).flat for f in (True, False))
    assert frozen.statistics == []
    assert [values.dtype for values in trained.statistics] == [torch.float32, torch.int64]
    state = new_state(small_network())
    lay_out(state, freeze_bn=True)
    before = state.model[1].running_var.clone()
    options = StepOptions(freeze_bn=True)
    train_step(state, state.model, iter([images(8, 0)]), LR, options, ALONE)
    assert torch.equal(state.model[1].running_var, before)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_bad_first_step_the_next_is_as_a_first_one(kind):
    harmed, sound = (new_state(small_network(), ema_decay=0.0, kind=kind) for _ in range(2))
    step(harmed, "gradient")
    step(harmed)
    step(sound)
    assert_same(everything(harmed), everything(sound))


def test_training_goes_on_after_a_bad_step():
    state = new_state(small_network())
    step(state)
    step(state, "loss")
    before = everything(state)
    step(state)
    after = everything(state)
    assert all(torch.isfinite(tensor.float()).all() for tensor in after.values())
    assert not torch.equal(after["model.0.weight"], before["model.0.weight"])


def test_bad_steps_are_numbered_and_counted():
    state = new_state(small_network())
    for harm in ("", "loss", "", "gradient", "loss"):
        step(state, harm)
    assert state.read_bad_steps() == ([2, 4, 5], 2)
    assert (state.bad_steps, state.bad_steps_in_a_row) == (3, 2)
    step(state, "loss")
    step(state)
    assert state.read_bad_steps() == ([6], 3)  # a row that has ended since counts
    step(state)
    assert state.read_bad_steps() == ([], 0)
    assert (state.bad_steps, state.bad_steps_in_a_row) == (4, 0)
    counters = state.counters()
    assert counters["bad_steps"] == 4 and counters["step"] == 8


@pytest.mark.parametrize("harm", ["", "loss", "gradient"])
@pytest.mark.parametrize("frozen", [0, 1], ids=["", "frozen"])
def test_the_decision_on_the_device_equals_the_one_on_the_host(harm, frozen):
    """The masks that spare a GPU's host the wait, run on the CPU, against the loop for CPUs."""
    on_host, on_device = (new_state(small_network()) for _ in range(2))
    for state in (on_host, on_device):
        state.model[:frozen].requires_grad_(False)
        state.optimizer = RMSpropTF(parameter_groups(state.model, 1e-3), LR)
    lay_out(on_device)
    for state in (on_host, on_device):
        for seed in range(3):
            step(state, harm if seed == 1 else "", seed)
    assert_same(everything(on_device), everything(on_host), tolerance=1e-6)


def test_an_infinite_gradient_is_in_order_where_the_scaler_skips_it():
    state = new_state(small_network())
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = everything(state)
    scale = state.scaler.get_scale()
    step(state, "gradient")
    assert state.read_bad_steps() == ([], 0)
    assert state.scaler.get_scale() < scale
    assert torch.equal(everything(state)["model.0.weight"], before["model.0.weight"])
    step(state, "loss")
    assert state.read_bad_steps() == ([2], 1)


def test_weights_change_in_the_update_alone():
    state = new_state(small_network())
    weights = copy.deepcopy(state.model[0].weight)
    before = begin(state, StepOptions())
    loss = forward_backward(state, state.model, *images(8), 0, StepOptions(), ALONE)
    assert torch.equal(state.model[0].weight, weights)
    assert state.model[0].weight.grad is not None
    update(state, loss, before, LR, StepOptions(), ALONE)
    assert not torch.equal(state.model[0].weight, weights)
