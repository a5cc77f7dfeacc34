"""One training step and one evaluation pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from irv2.distributed import World
from irv2.metrics import EvalCounter, EvalResult

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainState:
    """All that training changes. `step` counts updates; `images_seen` is the stream's position."""

    model: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    images_seen: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here; weights under timm's names."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "images_seen": self.images_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state. Raises RuntimeError if it is another network's."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.images_seen = state["step"], state["images_seen"]


def running_average(model: nn.Module, decay: float) -> ModelEmaV3:
    """Average of weights and batch-norm statistics with TensorFlow's warm-up.

    timm's 1 - (1 + s / 9)^-1 with s = n + 1, n the updates before this one, is
    tf.train.ExponentialMovingAverage's min(decay, (1 + n) / (10 + n)). timm subtracts 1 from the
    step it is given, so `train_step` adds one.
    """
    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)


class NotFiniteError(ValueError):
    """The loss or the gradient of a step is infinite or not a number."""


@dataclass(frozen=True)
class Loss:
    """Cross-entropy with label smoothing; the auxiliary head's is added with its weight."""

    label_smoothing: float = 0.1
    aux_weight: float = 0.4

    def __call__(self, output: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Logits [B, C], or (logits, auxiliary logits), and labels [B] -> mean loss, float32."""
        if isinstance(output, tuple):
            logits, aux_logits = output
            return self(logits, labels) + self.aux_weight * self(aux_logits, labels)
        return F.cross_entropy(output.float(), labels, label_smoothing=self.label_smoothing)


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
    """Training mode; frozen batch norm keeps using its running statistics."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def train_step(
    state: TrainState,
    network: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    lr: float,
    options: StepOptions,
    world: World,
) -> tuple[Tensor, Tensor]:
    """One update from `options.accumulation` micro-batches; returns (loss, gradient norm).

    `network` is `state.model`, or what wraps it for gradients to be averaged over ranks. Both
    results stay on the device and are those of the global batch, the norm before clipping.
    Nothing here waits for the device (fp16 apart, whose scaler looks for overflow).
    """
    train_mode(state.model, options.freeze_bn)
    device_type = world.device.type
    dtype = PRECISIONS[options.precision]
    total = torch.zeros((), device=world.device)
    for part in range(options.accumulation):
        x, labels = next(batches)
        torch.manual_seed(dropout_seed(options.seed, state.step, world.rank, part))
        is_last = part == options.accumulation - 1
        with _gradients_exchanged(network, is_last):
            with torch.autocast(device_type, dtype, enabled=dtype is not None):
                output = network(x)
            loss = options.loss(output, labels) / options.accumulation
            state.scaler.scale(loss).backward()
        total += loss.detach()

    state.scaler.unscale_(state.optimizer)
    max_norm = float("inf") if options.clip_norm is None else options.clip_norm
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), max_norm, foreach=True)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    statistics = [] if options.freeze_bn else running_statistics(state.model)
    world.average_([total, *statistics])
    state.step += 1
    state.ema.update(state.model, step=state.step + 1)
    return total, norm


def check_finite(state: TrainState, loss: Tensor, grad_norm: Tensor) -> None:
    """Raise NotFiniteError if the last step went wrong; waits for the device.

    With fp16 an infinite gradient is in order: the scaler has left that step out.
    """
    seen = [loss] if state.scaler.is_enabled() else [loss, grad_norm]
    if not all(math.isfinite(value.item()) for value in seen):
        raise NotFiniteError(
            f"step {state.step}: the loss is {loss.item():g} and the gradient norm "
            f"{grad_norm.item():g}; the checkpoints were written before that. Go on from them "
            "with --resume PATH under another run.name, or start again, with a lower optim.lr"
        )


def _gradients_exchanged(network: nn.Module, exchange: bool) -> Any:
    """Average gradients over ranks in this backward, or only add them up."""
    if exchange or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Running mean and variance of every batch norm. Ranks see different images, so these differ
    until averaged; averaging at each step keeps every rank's model the same."""
    return [
        b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    ]


def dropout_seed(seed: int, step: int, rank: int, part: int) -> int:
    """Seed of the dropout of one micro-batch: a 64-bit mix of where it stands in the run."""
    mixed = 0
    for value in (seed, step, rank, part):
        mixed = (mixed ^ value) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 32
    return mixed


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    precision: str = "fp32",
    on_batch: Callable[[int], None] = lambda images: None,
) -> EvalResult:
    """Exact counts over all ranks' batches, each image counted once.

    `on_batch` is called with the number of images of each finished batch of this rank.
    """
    model.eval()
    dtype = PRECISIONS[precision]
    counter = EvalCounter(world.device)
    for x, labels in batches:
        with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
            logits = model(x)
        counter.update(logits, labels)
        on_batch(len(labels))
    top1, top5, images = world.sum_(counter.counts).tolist()
    return EvalResult(top1, top5, images, world.sum_(counter.loss_sum).item())
