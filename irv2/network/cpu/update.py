"""Clipping, weight decay, RMSProp and the running average of all parameters, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from irv2.network.cpu import threads as omp
from irv2.network.cpu.threads import elements, float64, inlined, share

LANES, BLOCK = 64, 4096


class Slots(NamedTuple):
    """A parameter and what belongs to it: float32 tensors of one shape and memory layout."""

    parameter: Tensor
    grad: Tensor
    mean_square: Tensor
    momentum: Tensor
    average: Tensor


class Rates(NamedTuple):
    """Hyper-parameters of a group of parameters in one step."""

    grad_scale: float  # from clipping
    weight_decay: float
    alpha: float
    eps: float
    momentum: float
    lr: float
    average_weight: float  # of the new value in the running average


def takes(tensors: Sequence[Tensor]) -> bool:
    """True if the loops can work on these: float32 on the CPU, each filling a piece of memory."""
    return omp.available() and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and _is_dense(tensor)
        for tensor in tensors
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def fits(slots: Sequence[Slots]) -> bool:
    """True if `rmsprop` can take these."""
    return all(
        takes(own) and all(_layout(tensor) == _layout(own.parameter) for tensor in own)
        for own in slots
    )


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides that determine where in memory an element is."""
    return [(size, step) for size, step in zip(tensor.shape, tensor.stride()) if size > 1]


def rmsprop(slots: Sequence[Slots], rates: Rates) -> None:
    """Update parameters as optim.RMSpropTF does, then their running averages."""
    numbers = torch.tensor(rates, dtype=torch.float64)
    words = [len(slots), torch.get_num_threads(), numbers]
    for own in slots:
        words += [own.parameter.numel(), *own]
    omp.run(_update(), words)
    for own in slots:
        torch.autograd.graph.increment_version([t for t in own if t is not own.grad])


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all elements of dense float32 tensors together, summed up in float64."""
    threads = torch.get_num_threads()
    partial = torch.empty(threads, dtype=torch.float64)
    words = [len(tensors), threads, partial]
    for tensor in tensors:
        words += [tensor.numel(), tensor]
    omp.run(_sum_of_squares(), words)
    return partial.sum().sqrt().float()


@inlined
def _own(address, first, last):
    """View elements `first` up to `last` of the float32 array at an address."""
    return carray(elements(address, first, np.float32), last - first)


@functools.cache
def _update() -> int:
    def update(raw):
        header = carray(raw, (3,))
        count, threads = header[0], header[1]
        given = float64(header[2], 7)
        scale, decay, alpha = np.float32(given[0]), np.float32(given[1]), np.float32(given[2])
        eps, momentum, lr = np.float32(given[3]), np.float32(given[4]), np.float32(given[5])
        weight, new = np.float32(given[6]), np.float32(1 - given[2])
        table = carray(raw, (3 + 6 * count,))
        for row in range(3, 3 + 6 * count, 6):
            _, first, last = share(table[row], threads)
            p, g = _own(table[row + 1], first, last), _own(table[row + 2], first, last)
            ms, mom = _own(table[row + 3], first, last), _own(table[row + 4], first, last)
            average = _own(table[row + 5], first, last)
            for i in range(last - first):
                grad = g[i] * scale + decay * p[i]
                square = ms[i] * alpha + grad * grad * new
                step = mom[i] * momentum + lr * grad / np.sqrt(square + eps)
                value = p[i] - step
                ms[i], mom[i], p[i] = square, step, value
                average[i] += weight * (value - average[i])

    return omp.compiled(update)


@functools.cache
def _sum_of_squares() -> int:
    def sum_of_squares(raw):
        header = carray(raw, (3,))
        count, threads = header[0], header[1]
        table = carray(raw, (3 + 2 * count,))
        sums = np.empty(LANES, np.float32)
        total, number = 0.0, 0
        for row in range(3, 3 + 2 * count, 2):
            number, first, last = share(table[row], threads)
            for start in range(first, last, BLOCK):
                end = min(start + BLOCK, last)
                whole = end - (end - start) % LANES
                sums[:] = 0  # the compiler may not reorder one sum, but can add many at once
                for i in range(start, whole, LANES):
                    part = _own(table[row + 1], i, i + LANES)
                    for lane in range(LANES):
                        sums[lane] += part[lane] * part[lane]
                rest = _own(table[row + 1], whole, end)
                for i in range(end - whole):
                    sums[0] += rest[i] * rest[i]
                for lane in range(LANES):
                    total += sums[lane]
        float64(header[2], threads)[number] = total

    return omp.compiled(sum_of_squares)
