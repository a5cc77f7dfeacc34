"""Small networks, their batches of random images, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from data import loader
from irv2.scoring import EvalOptions, collect, scored
from irv2.training.distributed import World
from irv2.training.flat import Flat
from irv2.training.metrics import Predictions
from irv2.training.optim import KINDS, parameter_groups
from irv2.training.state import TrainState, running_average
from irv2.training.step import StepOptions, running_statistics, train_mode, train_step

ALONE = World(0, 1, torch.device("cpu"))
CLASSES, LR = 6, 0.1
Batch = tuple[Tensor, Tensor]


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


def new_state(network: nn.Module, ema_decay: float = 0.9, kind: str = "rmsprop_tf") -> TrainState:
    """A run's state before its first step, without loss scaling; kind: of optimizer."""
    groups = parameter_groups(network, weight_decay=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = KINDS[kind](groups, lr=LR)
    return TrainState(network, running_average(network, ema_decay), optimizer, scaler)


def lay_out(state: TrainState, freeze_bn: bool = False) -> TrainState:
    """Take the way of a GPU on the CPU: long buffers, and decisions on the device."""
    train_mode(state.model, freeze_bn)
    changed = running_statistics(state.model)
    state.flat = Flat(state.model, state.ema.module, state.optimizer, changed)
    return state


def randomised(module: nn.Module) -> nn.Module:
    """The module with no layer at a neutral value, which would hide mistakes; it evaluates.

    Weights and statistics keep activations near 1, so that images make a difference.
    """
    torch.manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module.eval()


def images(count: int, seed: int = 0) -> Batch:
    """Images [count, 3, 6, 6] and labels, as `small_network` takes them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 6, 6, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch cut into micro-batches."""
    return zip(*(part.split(size) for part in batch))


def numbered(batches: Iterable[Batch], first: int = 0) -> Iterator[tuple[loader.Batch, Tensor]]:
    """Batches as a loader makes them, of images numbered from `first` on, and their answers."""
    for x, labels in batches:
        keys = [(0, number) for number in range(first, first + len(labels))]
        sizes = np.full((len(labels), 2), 6, np.int32)
        yield loader.Batch(x, labels, sizes, keys, [], []), labels
        first += len(labels)


def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[loader.Batch, Tensor]],
    world: World = ALONE,
    options: EvalOptions | None = None,
    **on_batch,
) -> Predictions:
    """Predictions for the images of all ranks' batches."""
    return collect(scored(network, batches, options or EvalOptions()), world, **on_batch)


def train(state: TrainState, micro_batch: int, steps: int = 3, batch: int = 8, **options) -> list:
    """Take steps of `batch` images cut into micro-batches; (loss, gradient norm) of each."""
    options = StepOptions(accumulation=batch // micro_batch, **options)
    results = []
    for step in range(steps):
        batches = pieces(images(batch, seed=step), micro_batch)
        loss, norm = train_step(state, state.model, batches, LR, options, ALONE)
        results.append((loss.item(), norm.item()))
    return results


def trainable(network: nn.Module) -> Tensor:
    """Every parameter, in one vector."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with memory of its own."""
    return {name: value.clone() for name, value in state.items()}


def everything(state: TrainState) -> dict[str, Tensor]:
    """A copy of every tensor of a run's state, by part and name."""
    return {
        f"{part}.{name}": tensor.clone()
        for part, tensors in state.tensors().items()
        for name, tensor in tensors.items()
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference / norm of theirs."""
    return ((ours - theirs).norm() / theirs.norm()).item()
