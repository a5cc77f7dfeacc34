"""One training step: begin, forward and backward for each micro-batch, update.

Nothing here waits for the device (except in fp16, whose scaler checks for overflow, and with other
optimizers than RMSProp).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from irv2.training import exchange
from irv2.training.distributed import World
from irv2.training.flat import Flat
from irv2.training.graph import Run, plainly
from irv2.training.loss import Loss
from irv2.training.optim import RMSpropTF
from irv2.training.state import TrainState
from irv2.training.update import apply, gradient_norm

RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # a forward changes them
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepOptions:
    """Options of a step, the same for a whole run."""

    loss: Loss = field(default_factory=Loss)
    accumulation: int = 1  # micro-batches of an update
    clip_norm: float | None = None
    precision: str = "fp32"
    seed: int = 0
    freeze_bn: bool = False
    compiled: bool = False  # the update on a GPU, too, by torch.compile
    run: Run = plainly  # or a Recorder: see graph.py
    reduce_dtype: str = "fp32"  # in which gradients travel between ranks

    @property
    def recorded(self) -> bool:
        """True if forward, backward and update are recorded, and then replayed."""
        return self.run is not plainly


class Before(NamedTuple):
    """Running statistics, and their values before a step, to restore if it is a bad one."""

    statistics: list[Tensor]
    values: list[Tensor]


def begin(state: TrainState, options: StepOptions) -> Before:
    """Put the model into training mode and remember what a forward changes."""
    train_mode(state.model, options.freeze_bn)
    lay_out(state, options)
    if state.flat is not None:
        state.flat.begin()
        return Before(state.flat.statistics, state.flat.before)
    statistics = running_statistics(state.model)
    return Before(statistics, [tensor.clone() for tensor in statistics])


def forward_backward(
    state: TrainState,
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    part: int,
    options: StepOptions,
    world: World,
) -> Tensor:
    """Add the gradients of micro-batch number `part`; returns its share of the loss, float32 [].

    network: `state.model`, or the wrapper that averages its gradients over ranks.
    images: float [B, 3, H, W]; labels: as the loss takes them.
    """
    torch.manual_seed(dropout_seed(options.seed, state.step, world.rank, part))
    is_last = part == options.accumulation - 1
    with exchange.in_backward(network, is_last):
        return options.run(backward, state, network, images, labels, options)


def update(
    state: TrainState,
    loss: Tensor,
    before: Before,
    lr: float,
    options: StepOptions,
    world: World,
) -> Tensor:
    """Clip, update weights and their average; returns the gradient norm before clipping.

    A step whose loss or gradient is not finite, on any rank, changes nothing but `state.step`;
    `state.read_bad_steps` counts it. `loss` becomes the mean over ranks.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    world.average_([loss, *(s for s in before.statistics if s.is_floating_point())])
    if options.recorded:
        gradients = (group.gradient for group in state.flat.groups)
        exchange.average_(gradients, world, options.reduce_dtype)
    # Gradients are averages over ranks, so one rank's bad number is seen by all of them.
    if state.flat is not None:
        norm, good = options.run(state.flat.update, loss, options.clip_norm, *rates(state))
    else:
        norm, good = _update_from_the_host(state, loss, before, options.clip_norm)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.unread.append(good)
    return norm


def _update_from_the_host(
    state: TrainState, loss: Tensor, before: Before, clip_norm: float | None
) -> tuple[Tensor, Tensor]:
    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.model.parameters())
    good = torch.isfinite(loss)
    if not state.scaler.is_enabled():  # else an infinite gradient is fine: the scaler skips it
        good = good & torch.isfinite(norm)
    apply(state, good, norm, clip_norm, *before)
    return norm, good


def rates(state: TrainState) -> list[Tensor]:
    """Numbers of a step as tensors [] on the device: the average's share, each learning rate."""
    share = 1 - state.ema.get_decay(state.step + 2)
    groups = state.flat.groups
    return [
        torch.full((), value, device=groups[0].weights.device)
        for value in (share, *(group.options["lr"] for group in groups))
    ]


def train_step(
    state: TrainState,
    network: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    lr: float,
    options: StepOptions,
    world: World,
) -> tuple[Tensor, Tensor]:
    """Make the step that train.py spells out, for benchmarks, the doctor and tests.

    Takes images and labels from `batches`.

    Returns loss and gradient norm of the global batch, both on the device.
    """
    before = begin(state, options)
    loss = torch.zeros((), device=world.device)
    for part in range(options.accumulation):
        images, labels = next(batches)
        loss += forward_backward(state, network, images, labels, part, options, world)
    return loss, update(state, loss, before, lr, options, world)


def backward(
    state: TrainState, network: nn.Module, images: Tensor, labels: Tensor, options: StepOptions
) -> Tensor:
    """Do what `forward_backward` does, as it may be recorded: random numbers are already seeded."""
    dtype = PRECISIONS[options.precision]
    # No weight is used twice, and a cast that was kept would outlive a graph's memory.
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
        output = network(images)
    loss = options.loss(output, labels) / options.accumulation
    state.scaler.scale(loss).backward()
    if state.flat is not None and not isinstance(network, DistributedDataParallel):
        state.flat.take_gradients()
    return loss.detach()


def lay_out(state: TrainState, options: StepOptions) -> None:
    """Lay RMSProp's state on a GPU out in long buffers, unless it is, or its loss is scaled.

    The model is in the mode in which it is trained.
    """
    is_due = isinstance(state.optimizer, RMSpropTF) and not state.scaler.is_enabled()
    if state.flat is None and is_due and next(state.model.parameters()).is_cuda:
        statistics = running_statistics(state.model)
        state.flat = Flat(
            state.model, state.ema.module, state.optimizer, statistics, options.compiled
        )


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """Put a model into training mode; frozen batch norm keeps using its running statistics.

    With `freeze_bn` all batch norm is frozen, else only layers without a trained parameter.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and (freeze_bn or not _is_trained(module)):
            module.eval()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Tensors that a forward changes, of every batch norm in training mode.

    Ranks see different images, so means and variances differ until averaged; averaging at each step
    keeps every rank's model the same.
    """
    norms = (m for m in model.modules() if isinstance(m, _BatchNorm) and m.training)
    return [getattr(norm, name) for norm in norms for name in RUNNING]


def dropout_seed(seed: int, step: int, rank: int, part: int) -> int:
    """Seed of the dropout of one micro-batch: a 64-bit mix of its place in the run."""
    mixed = 0
    for value in (seed, step, rank, part):
        mixed = (mixed ^ value) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 32
    return mixed
