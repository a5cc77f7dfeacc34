"""A state's tensors in a few long buffers, so that the end of a step is a handful of kernels.

A GPU is given each kernel by its host. Clipping, RMSProp, the running average and the masks that
undo a bad step would be thousands of small ones, tensor by tensor. Here all tensors of a kind are
views of one buffer, under the same names and with the same shapes as before: checkpoints,
evaluations and exports need not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from irv2.network import regions
from irv2.training.optim import RMSpropTF

UNIT = 16  # elements: each tensor begins at a multiple of 64 bytes, as vectors and cuDNN want it


class Group(NamedTuple):
    """Parameters that are updated alike, and a buffer [n] for each tensor that belongs to them."""

    options: dict  # the optimizer's group
    parameters: list[Tensor]
    gradients: list[Tensor]  # views of `gradient`, one for each parameter
    gradient: Tensor
    weights: Tensor
    mean_square: Tensor
    momentum: Tensor
    average: Tensor


class Flat:
    """The buffers of one training state; its tensors become views of them.

    statistics: what a forward changes of the model; frozen ones are averaged alone.
    compiled: whether torch.compile makes one kernel of an update, which reads and writes once.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        average: nn.Module,
        optimizer: RMSpropTF,
        statistics: list[Tensor],
        compiled: bool = False,
    ) -> None:
        averages = dict(zip(model.parameters(), average.parameters()))
        groups = [group for group in optimizer.param_groups if group["params"]]
        self.groups = [_group(group, optimizer, averages) for group in groups]
        trained = {id(p) for group in self.groups for p in group.parameters}
        changed = {id(tensor) for tensor in statistics}
        buffers = list(zip(model.buffers(), average.buffers()))
        moving = [pair for pair in buffers if id(pair[0]) in changed]
        still = [pair for pair in buffers if id(pair[0]) not in changed]
        still += [(p, a) for p, a in averages.items() if id(p) not in trained]
        averaged = _moved(moving)
        self.statistics = [values for values, _ in averaged]
        self.before = [values.clone() for values in self.statistics]
        self._averaged = averaged + _moved(still)
        self._rmsprop = regions.compiled(rmsprop_) if compiled else rmsprop_

    def begin(self) -> None:
        """Start a step: no gradients yet, and the running statistics remembered."""
        for group in self.groups:
            group.gradient.zero_()
        for before, now in zip(self.before, self.statistics):
            before.copy_(now)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the parameters' gradients to the buffers and drop them."""
        pairs = [
            (gradient, p)
            for group in self.groups
            for gradient, p in zip(group.gradients, group.parameters)
            if p.grad is not None
        ]
        if pairs:
            torch._foreach_add_([gradient for gradient, _ in pairs], [p.grad for _, p in pairs])
        for _, p in pairs:
            p.grad = None

    @torch.no_grad()
    def update(
        self, loss: Tensor, clip_norm: float | None, share: Tensor, *rates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Clip, update weights and average; if loss or gradient is not finite, undo the forward.

        share: of the way that averages move, float32 []; rates: each group's learning rate, float32
        []. All decisions are taken on the device. Returns the gradient's norm before clipping, and
        whether the step was good.
        """
        self.take_gradients()
        gradients = [gradient for group in self.groups for gradient in group.gradients]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        good = torch.isfinite(loss) & torch.isfinite(norm)
        scale = torch.ones_like(norm)
        if clip_norm is not None:
            scale = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
        for group, lr in zip(self.groups, rates, strict=True):
            options = [group.options[name] for name in ("weight_decay", "alpha", "eps", "momentum")]
            self._rmsprop(*group[3:], scale, good, lr, share, *options)
        for now, before in zip(self.statistics, self.before):
            now.copy_(torch.where(good, now, before))
        for values, averages in self._averaged:
            if values.is_floating_point():
                averages.add_((values - averages) * (share * good))
            else:
                averages.copy_(values)
        return norm, good


def rmsprop_(
    gradient: Tensor,
    weights: Tensor,
    mean_square: Tensor,
    momentum: Tensor,
    average: Tensor,
    scale: Tensor,
    good: Tensor,
    lr: Tensor,
    share: Tensor,
    weight_decay: float,
    alpha: float,
    eps: float,
    decay: float,
) -> None:
    """Do what RMSpropTF does and move the average, or nothing unless `good`.

    scale: of the gradient, by clipping; decay: the momentum's.
    """
    g = gradient * scale + weight_decay * weights
    new_square = alpha * mean_square + (1 - alpha) * g * g
    new_momentum = decay * momentum + lr * g / torch.sqrt(new_square + eps)
    new_weights = weights - new_momentum
    new_average = average + (new_weights - average) * share
    # Not multiplied by 0: 0 times NaN is not 0.
    mean_square.copy_(torch.where(good, new_square, mean_square))
    momentum.copy_(torch.where(good, new_momentum, momentum))
    weights.copy_(torch.where(good, new_weights, weights))
    average.copy_(torch.where(good, new_average, average))


def _group(options: dict, optimizer: RMSpropTF, averages: dict[Tensor, Tensor]) -> Group:
    parameters = options["params"]
    slots = [optimizer.slots_of(p) for p in parameters]
    for p, slot in zip(parameters, slots):
        strides = {t.stride() for t in (p, averages[p], *slot.values())}
        if len(strides) > 1:
            raise ValueError(f"a parameter's tensors lie in memory in several orders: {strides}")
    weights = move(parameters)
    gradient = torch.zeros_like(weights)
    return Group(
        options,
        parameters,
        views(gradient, parameters),
        gradient,
        weights,
        move(slot["square_avg"] for slot in slots),
        move(slot["momentum_buffer"] for slot in slots),
        move(averages[p] for p in parameters),
    )


def _moved(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Move values and their averages into two buffers, and counters, which are whole numbers, into
    two more."""
    numbers = [pair for pair in pairs if pair[0].is_floating_point()]
    counters = [pair for pair in pairs if not pair[0].is_floating_point()]
    kinds = filter(None, (numbers, counters))
    return [(move(value for value, _ in kind), move(mean for _, mean in kind)) for kind in kinds]


def move(tensors: Iterable[Tensor]) -> Tensor:
    """Move tensors of one dtype into one buffer, which is returned; they become views of it.

    Each has memory of its own without gaps, in whichever order of its axes; those that belong to
    one parameter have the same order.
    """
    tensors = list(tensors)
    buffer = tensors[0].new_zeros(sum(map(_room, tensors)))
    for tensor, view in zip(tensors, views(buffer, tensors)):
        view.copy_(tensor)
        tensor.data = view
    return buffer


def views(buffer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of a buffer, one after another, with the tensors' shapes and strides."""
    made, start = [], 0
    for tensor in tensors:
        made.append(buffer.as_strided(tensor.shape, tensor.stride(), start))
        start += _room(tensor)
    return made


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() // UNIT) * UNIT
