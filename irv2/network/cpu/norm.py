"""Batch norm with ReLU, forward and backward, and ReLU's backward, in few passes over memory.

A training step on a CPU spends about as long on batch norm, ReLU and concatenation as on half of
its convolutions, all of it moving activations through memory. These loops read them once where
PyTorch's operations read them two or three times.

Activations are matrices here: a row for each position of each image, a column for each channel,
the columns of a row next to each other (channels-last memory), rows a stride apart. Results and
gradients may be several such matrices, each for a range of columns (`Part`), so that branches are
cut and joined without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from irv2.network.cpu import threads as omp
from irv2.network.cpu.threads import elements, float32, float64, inlined, loaded, share, stored

BLOCK = 64  # rows that stay in the first-level cache while their sums are taken
DTYPES = (torch.float32, torch.bfloat16)


class Part(NamedTuple):
    """Columns `first` up to `last` of an activation, kept in [B, last - first, H, W] `tensor`."""

    first: int
    last: int
    tensor: Tensor


def row_stride(tensor: Tensor) -> int | None:
    """Elements from one row of [B, C, H, W] to the next; None if it is not in rows as above."""
    _, channels, height, width = tensor.shape
    stride = tensor.stride(3) if width > 1 else tensor.stride(2) if height > 1 else None
    if stride is None:
        stride = tensor.stride(0) if tensor.shape[0] > 1 else channels
    wanted = (height * width * stride, 1, width * stride, stride)
    fits = all(
        size == 1 or own == other for size, own, other in zip(tensor.shape, tensor.stride(), wanted)
    )
    return stride if fits and stride >= channels else None


def forward(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    running: tuple[Tensor, Tensor],
    momentum: float,
    eps: float,
    parts: list[Part],
) -> Tensor:
    """Write relu(batch_norm(x)) to `parts`; returns the batch's statistics for `backward`.

    x: [B, C, H, W] float32 or bfloat16 in rows; affine: weight and bias, float32 [C]; running: mean
    and variance, which move by `momentum` (0: stay).
    """
    loops, words = _loops(x.dtype), _words(x)
    partial = torch.empty(torch.get_num_threads(), 2, x.shape[1], dtype=torch.float64)
    saved = torch.empty(2, x.shape[1])  # mean and 1 / sqrt(variance + eps)
    numbers = torch.tensor([momentum, eps], dtype=torch.float64)
    omp.run(loops.statistics, [*words, partial])
    omp.run(loops.normalise, [*words, partial, saved, *affine, *running, numbers, *_table(parts)])
    torch.autograd.graph.increment_version(running)
    return saved


def backward(
    x: Tensor, affine: tuple[Tensor, Tensor], saved: Tensor, grads: list[Part]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, from those of `forward`'s parts."""
    loops, words = _loops(x.dtype), _words(x)
    partial = torch.empty(torch.get_num_threads(), 2, x.shape[1], dtype=torch.float64)
    result = torch.empty_like(x, memory_format=torch.channels_last)
    sums = torch.empty(2, x.shape[1])
    given = [*words, partial, saved, *affine, result, sums, *_table(grads)]
    omp.run(loops.reduce, given)
    omp.run(loops.input_gradient, given)
    return result, sums[1], sums[0]


def relu_backward(grad: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad where y, a ReLU's result, is above 0, and its sum over all rows.

    grad, y: [B, C, H, W] of one dtype in rows. Returns a new tensor and float32 [C].
    """
    partial = torch.empty(torch.get_num_threads(), grad.shape[1], dtype=torch.float64)
    result = torch.empty_like(grad, memory_format=torch.channels_last)
    omp.run(_loops(grad.dtype).mask, [*_words(grad), partial, y, row_stride(y), result])
    return result, partial.sum(0).float()


def _words(x: Tensor) -> list[Tensor | int]:
    """Arguments that every loop begins with: x, its stride, rows, columns, threads."""
    channels = x.shape[1]
    return [x, row_stride(x), x.numel() // channels, channels, torch.get_num_threads()]


def _table(parts: list[Part]) -> list[Tensor | int]:
    rows = [(part.first, part.last, part.tensor, row_stride(part.tensor)) for part in parts]
    return [len(parts), *(word for row in rows for word in row)]


# ------------------------------------------------------------------------------------------ loops


class _Loops(NamedTuple):
    """Addresses of the compiled loops for one dtype."""

    statistics: int
    normalise: int
    reduce: int
    input_gradient: int
    mask: int


@functools.cache
def _loops(dtype: torch.dtype) -> _Loops:
    kept = np.uint16 if dtype == torch.bfloat16 else np.float32
    return _Loops(*(omp.compiled(loop) for loop in _loop_functions(kept)))


@inlined
def _scale_and_shift(saved, gamma, beta):
    """Return (scale, shift) with which x * scale + shift is the normalised x."""
    scale = np.empty(len(gamma), np.float32)
    shift = np.empty(len(gamma), np.float32)
    for c in range(len(gamma)):
        scale[c] = saved[1, c] * gamma[c]
        shift[c] = beta[c] - saved[0, c] * scale[c]
    return scale, shift


@inlined
def _matrix(address, column, row, rows, stride, kept):
    """Rows of [*, stride] numbers `kept` in memory at the address, from (row, column) on."""
    return carray(elements(address, row * stride + column, kept), (rows, stride))


def _loop_functions(kept: type) -> tuple[Callable, ...]:
    """Return the loops for numbers in memory of type `kept`: float32, or bfloat16 as uint16.

    NaN stays NaN, as in PyTorch: ReLU tests for `<= 0`, never for `> 0`.
    """

    def statistics(raw):
        """Mean and sum of squared differences from it, of each column, for each thread's rows."""
        a = carray(raw, (6,))
        channels, threads = a[3], a[4]
        number, first, last = share(a[2], threads)
        partial = float64(a[5], (threads, 2, channels))
        mean, squares = partial[number, 0], partial[number, 1]
        mean[:] = 0
        squares[:] = 0
        centre = np.empty(channels, np.float32)
        spread = np.empty(channels, np.float32)
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            x = _matrix(a[0], 0, start, rows, a[1], kept)
            centre[:] = 0
            spread[:] = 0
            for r in range(rows):
                row = x[r]
                for c in range(channels):
                    centre[c] += loaded(row[c])
            for c in range(channels):
                centre[c] /= np.float32(rows)
            for r in range(rows):
                row = x[r]
                for c in range(channels):
                    difference = loaded(row[c]) - centre[c]
                    spread[c] += difference * difference
            weight = rows / (start - first + rows)
            for c in range(channels):  # two samples' moments joined: Chan, Golub and LeVeque
                delta = centre[c] - mean[c]
                mean[c] += delta * weight
                squares[c] += spread[c] + delta * delta * weight * (start - first)

    def normalise(raw):
        """Join the threads' moments, then relu(x * scale + shift)."""
        zero = np.float32(0)
        a = carray(raw, (13,))
        total_rows, channels, threads = a[2], a[3], a[4]
        number, first, last = share(total_rows, threads)
        partial = float64(a[5], (threads, 2, channels))
        gamma, beta = float32(a[7], channels), float32(a[8], channels)
        numbers = float64(a[11], 2)
        momentum, eps = numbers[0], numbers[1]
        own = np.empty((2, channels), np.float32)
        for c in range(channels):
            mean, squares, done = 0.0, 0.0, 0
            for t in range(threads):
                rows = total_rows * (t + 1) // threads - total_rows * t // threads
                if rows > 0:
                    delta = partial[t, 0, c] - mean
                    weight = rows / (done + rows)
                    mean += delta * weight
                    squares += partial[t, 1, c] + delta * delta * weight * done
                    done += rows
            own[0, c] = mean
            own[1, c] = 1 / np.sqrt(squares / total_rows + eps)
            if number == 0:
                saved = float32(a[6], (2, channels))
                saved[0, c], saved[1, c] = own[0, c], own[1, c]
                running_mean, running_var = float32(a[9], channels), float32(a[10], channels)
                running_mean[c] += momentum * (mean - running_mean[c])
                unbiased = squares / max(total_rows - 1, 1)
                running_var[c] += momentum * (unbiased - running_var[c])
        scale, shift = _scale_and_shift(own, gamma, beta)
        parts = carray(raw, (13 + 4 * a[12],))[13:]
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            for p in range(0, 4 * a[12], 4):
                begin, end = parts[p], parts[p + 1]
                x = _matrix(a[0], begin, start, rows, a[1], kept)
                y = _matrix(parts[p + 2], 0, start, rows, parts[p + 3], kept)
                factor, offset = scale[begin:end], shift[begin:end]
                for r in range(rows):
                    source, target = x[r], y[r]
                    for c in range(end - begin):
                        value = loaded(source[c]) * factor[c] + offset[c]
                        target[c] = stored(zero if value <= zero else value, kept)

    def reduce(raw):
        """Sums of each column's gradient and of gradient times centred x, for each thread."""
        zero = np.float32(0)
        a = carray(raw, (12,))
        channels, threads = a[3], a[4]
        number, first, last = share(a[2], threads)
        partial = float64(a[5], (threads, 2, channels))
        plain, moment = partial[number, 0], partial[number, 1]
        plain[:] = 0
        moment[:] = 0
        saved = float32(a[6], (2, channels))
        scale, shift = _scale_and_shift(saved, float32(a[7], channels), float32(a[8], channels))
        block = np.empty((2, channels), np.float32)
        parts = carray(raw, (12 + 4 * a[11],))[12:]
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            block[:] = 0
            for p in range(0, 4 * a[11], 4):
                begin, end = parts[p], parts[p + 1]
                x = _matrix(a[0], begin, start, rows, a[1], kept)
                g = _matrix(parts[p + 2], 0, start, rows, parts[p + 3], kept)
                factor, offset, mean = scale[begin:end], shift[begin:end], saved[0, begin:end]
                sums, products = block[0, begin:end], block[1, begin:end]
                for r in range(rows):
                    source, gradient = x[r], g[r]
                    for c in range(end - begin):
                        value = loaded(source[c])
                        is_off = value * factor[c] + offset[c] <= zero
                        slope = zero if is_off else loaded(gradient[c])
                        sums[c] += slope
                        products[c] += slope * (value - mean[c])
            for c in range(channels):
                plain[c] += block[0, c]
                moment[c] += block[1, c]

    def input_gradient(raw):
        """Join the threads' sums, then the gradient of x."""
        zero = np.float32(0)
        a = carray(raw, (12,))
        total_rows, channels, threads = a[2], a[3], a[4]
        number, first, last = share(total_rows, threads)
        partial = float64(a[5], (threads, 2, channels))
        saved = float32(a[6], (2, channels))
        scale, shift = _scale_and_shift(saved, float32(a[7], channels), float32(a[8], channels))
        constant = np.empty(channels, np.float32)
        linear = np.empty(channels, np.float32)
        for c in range(channels):
            plain, moment = 0.0, 0.0
            for t in range(threads):
                plain += partial[t, 0, c]
                moment += partial[t, 1, c]
            moment *= saved[1, c]
            if number == 0:
                sums = float32(a[10], (2, channels))
                sums[0, c], sums[1, c] = plain, moment
            constant[c] = scale[c] * plain / total_rows
            linear[c] = scale[c] * saved[1, c] * moment / total_rows
        parts = carray(raw, (12 + 4 * a[11],))[12:]
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            for p in range(0, 4 * a[11], 4):
                begin, end = parts[p], parts[p + 1]
                x = _matrix(a[0], begin, start, rows, a[1], kept)
                g = _matrix(parts[p + 2], 0, start, rows, parts[p + 3], kept)
                result = _matrix(a[9], begin, start, rows, channels, kept)
                factor, offset, mean = scale[begin:end], shift[begin:end], saved[0, begin:end]
                flat, tilt = constant[begin:end], linear[begin:end]
                for r in range(rows):
                    source, gradient, target = x[r], g[r], result[r]
                    for c in range(end - begin):
                        value = loaded(source[c])
                        is_off = value * factor[c] + offset[c] <= zero
                        slope = zero if is_off else loaded(gradient[c])
                        rest = flat[c] + (value - mean[c]) * tilt[c]
                        target[c] = stored(slope * factor[c] - rest, kept)

    def mask(raw):
        """ReLU's gradient, and its sum over each thread's rows."""
        zero = np.float32(0)
        a = carray(raw, (9,))
        channels, threads = a[3], a[4]
        number, first, last = share(a[2], threads)
        total = float64(a[5], (threads, channels))[number]
        total[:] = 0
        sums = np.empty(channels, np.float32)
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            g = _matrix(a[0], 0, start, rows, a[1], kept)
            y = _matrix(a[6], 0, start, rows, a[7], kept)
            result = _matrix(a[8], 0, start, rows, channels, kept)
            sums[:] = 0
            for r in range(rows):
                gradient, value, target = g[r], y[r], result[r]
                for c in range(channels):
                    slope = zero if loaded(value[c]) <= zero else loaded(gradient[c])
                    target[c] = stored(slope, kept)
                    sums[c] += slope
            for c in range(channels):
                total[c] += sums[c]

    return statistics, normalise, reduce, input_gradient, mask
