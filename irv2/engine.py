"""One training step and one evaluation pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from irv2 import update
from irv2.distributed import World
from irv2.loss import Loss
from irv2.metrics import Collector, Predictions, Scored

COUNTERS = ("step", "images_seen", "bad_images", "bad_steps", "bad_steps_in_a_row")
RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # a forward changes them
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainState:
    """All that training changes. `step` counts steps, `images_seen` is the stream's position."""

    model: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    images_seen: int = 0
    bad_images: int = 0  # that training could not use
    bad_steps: int = 0  # left out because the loss or the gradient was not finite
    bad_steps_in_a_row: int = 0
    unread: list[Tensor] = field(default_factory=list)  # of the last steps: was it applied?

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors to go on from, not copied; weights under timm's names."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": {
                f"{slot}.{name}": tensor
                for name, parameter in self.model.named_parameters()
                for slot, tensor in self.optimizer.state.get(parameter, {}).items()
            },
        }

    def counters(self) -> dict[str, Any]:
        """What is no tensor. `read_bad_steps` must have been called after the last step."""
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "scaler": self.scaler.state_dict(),
        }

    def load(self, tensors: dict[str, dict[str, Tensor]], counters: dict[str, Any]) -> None:
        """Go back to a saved state.

        Raises RuntimeError or KeyError if it is another network's or optimizer's.
        """
        self.model.load_state_dict(tensors["model"])
        self.ema.module.load_state_dict(tensors["ema"])
        parameters = dict(self.model.named_parameters())
        for key, saved in tensors["optimizer"].items():
            slot, _, name = key.partition(".")
            parameter = parameters[name]
            self.optimizer.state[parameter][slot] = torch.empty_like(parameter).copy_(saved)
        self.scaler.load_state_dict(counters["scaler"])
        for name in COUNTERS:
            setattr(self, name, counters[name])


def running_average(model: nn.Module, decay: float) -> ModelEmaV3:
    """Average of weights and batch-norm statistics with TensorFlow's warm-up.

    timm's 1 - (1 + s / 9)^-1 with s = n + 1, n the steps before this one, is
    tf.train.ExponentialMovingAverage's min(decay, (1 + n) / (10 + n)). timm subtracts 1 from the
    step it is given, so it is given n + 2.
    """
    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)


class DivergedError(ValueError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class StepOptions:
    """How a step is carried out; the same for a whole run."""

    loss: Loss = field(default_factory=Loss)
    accumulation: int = 1
    clip_norm: float | None = None
    precision: str = "fp32"
    seed: int = 0
    freeze_bn: bool = False


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """Training mode; frozen batch norm keeps using its running statistics.

    With `freeze_bn` all of it is frozen, else what has no parameter that is trained.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and (freeze_bn or not _is_trained(module)):
            module.eval()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def train_step(
    state: TrainState,
    network: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    lr: float,
    options: StepOptions,
    world: World,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """One update from `options.accumulation` micro-batches; returns (loss, gradient norm).

    `network` is `state.model`, or what wraps it for gradients to be averaged over ranks. Both
    results stay on the device and are those of the global batch, the norm before clipping. A step
    whose loss or gradient is not finite changes nothing but `state.step`; `read_bad_steps` tells.
    `before_update` is called when weights, average and optimizer are about to change.
    Nothing here waits for the device (fp16 apart, whose scaler looks for overflow).
    """
    train_mode(state.model, options.freeze_bn)
    statistics = running_statistics(state.model)
    statistics_before = [s.clone() for s in statistics]
    total = torch.zeros((), device=world.device)
    for part in range(options.accumulation):
        x, labels = next(batches)
        torch.manual_seed(dropout_seed(options.seed, state.step, world.rank, part))
        is_last = part == options.accumulation - 1
        with _gradients_exchanged(network, is_last):
            total += _forward_backward(state, network, x, labels, options)

    state.scaler.unscale_(state.optimizer)
    norm = update.gradient_norm(state.model.parameters())
    world.average_([total, *(s for s in statistics if s.is_floating_point())])
    # Gradients are averages over ranks, so one rank's bad number is seen by all of them.
    good = torch.isfinite(total)
    if not state.scaler.is_enabled():  # else an infinite gradient is in order: the scaler skips it
        good = good & torch.isfinite(norm)
    before_update()
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    update.apply(state, good, norm, options.clip_norm, statistics, statistics_before)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.unread.append(good)
    return total, norm


def _forward_backward(
    state: TrainState, network: nn.Module, x: Tensor, labels: Tensor, options: StepOptions
) -> Tensor:
    """Add a micro-batch's gradients; returns its part of the loss."""
    dtype = PRECISIONS[options.precision]
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        output = network(x)
    loss = options.loss(output, labels) / options.accumulation
    state.scaler.scale(loss).backward()
    return loss.detach()


def settle(state: TrainState, network: nn.Module, x: Tensor, options: StepOptions) -> None:
    """Have DistributedDataParallel lay out its buffers of gradients before the first step.

    It does so after its first backward, and from then on ranks add up in another order; a continued
    run would differ from an unbroken one in its first step. `x`: any images [B, 3, H, W]. Changes
    nothing in `state`.
    """
    before = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    train_mode(state.model, options.freeze_bn)
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    _forward_backward(state, network, x, labels, options)
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def read_bad_steps(state: TrainState) -> tuple[list[int], int]:
    """(steps since the last call that were left out, most of them in a row), counted in `state`.

    The first step of a run is number 1; a row may have begun before. Waits for the device.
    """
    good = torch.stack(state.unread).tolist() if state.unread else []
    first = state.step - len(good) + 1
    state.unread.clear()
    longest = 0
    for is_good in good:
        state.bad_steps_in_a_row = 0 if is_good else state.bad_steps_in_a_row + 1
        longest = max(longest, state.bad_steps_in_a_row)
    bad = [first + i for i, is_good in enumerate(good) if not is_good]
    state.bad_steps += len(bad)
    return bad, longest


def _gradients_exchanged(network: nn.Module, exchange: bool) -> Any:
    """Average gradients over ranks in this backward, or only add them up."""
    if exchange or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """What forward changes in every batch norm that is in training mode. Ranks see different
    images, so means and variances differ until averaged; averaging at each step keeps every rank's
    model the same."""
    norms = (m for m in model.modules() if isinstance(m, _BatchNorm) and m.training)
    return [getattr(norm, name) for norm in norms for name in RUNNING]


def dropout_seed(seed: int, step: int, rank: int, part: int) -> int:
    """Seed of the dropout of one micro-batch: a 64-bit mix of where it stands in the run."""
    mixed = 0
    for value in (seed, step, rank, part):
        mixed = (mixed ^ value) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 32
    return mixed


@dataclass(frozen=True)
class EvalOptions:
    """How a network is asked in an evaluation."""

    precision: str = "fp32"
    mirrored: bool = False  # show each view also mirrored left to right
    competing: Tensor | None = None  # bool [C], the classes that may be answers; None: all
    at_once: int | None = None  # most views in one forward


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, list[int]]],
    world: World,
    options: EvalOptions | None = None,
    on_batch: Callable[[int, Collector], None] = lambda images, collected: None,
) -> Predictions:
    """What a network says of the images of all ranks' batches, each image counted once.

    `batches`: views, answers and image numbers, as `scored` takes them. `on_batch` is called with
    the number of images of each finished batch of this rank, and what is known so far.
    """
    return collect(scored(model, batches, options or EvalOptions()), world, on_batch)


def collect(
    batches: Iterable[Scored],
    world: World,
    on_batch: Callable[[int, Collector], None] = lambda images, collected: None,
) -> Predictions:
    """Rank all ranks' scores."""
    collected = Collector()
    for batch in batches:
        collected.add(batch)
        on_batch(len(batch.indices), collected)
    return Predictions.merged(world.gather(collected.predictions()))


def scored(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, list[int]]], options: EvalOptions
) -> Iterator[Scored]:
    """Scores for batches of (views [B * V, 3, H, W], answers [B] or [B, A], image numbers [B]).

    The V views of an image follow one another. Scores are the logits of one view, or of several,
    the logarithm of the mean of their softmax; -inf for classes that do not compete.
    """
    model.eval()
    for views, answers, indices in batches:
        with torch.inference_mode():
            scores = _scores(model, views, len(indices), options)
            if options.competing is not None:
                scores = scores.masked_fill(~options.competing, -float("inf"))
        yield Scored(scores, answers, indices)


def _scores(model: nn.Module, views: Tensor, images: int, options: EvalOptions) -> Tensor:
    """One row of scores an image."""
    dtype = PRECISIONS[options.precision]
    with torch.autocast(views.device.type, dtype, enabled=dtype is not None):
        parts = views.split(options.at_once or len(views))
        logits = [torch.cat([model(part) for part in parts])]
        if options.mirrored:
            logits.append(torch.cat([model(part.flip(3)) for part in parts]))
    each = torch.cat([part.view(images, -1, part.shape[1]) for part in logits], 1).float()
    count = each.shape[1]  # of views of an image
    return each[:, 0] if count == 1 else each.log_softmax(2).logsumexp(1) - math.log(count)
