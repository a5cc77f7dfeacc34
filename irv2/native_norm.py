"""Batch norm and ReLU in one pass over memory, forward and backward, for CPUs.

A training step on a CPU spends about as long on batch norm, ReLU and concatenation as on half of
its convolutions, and all of it moving activations through memory. The four loops here read them
once where PyTorch's operations read them two or three times. They are compiled by Numba and run on
the threads of PyTorch's own OpenMP pool: a second pool would fight with it for the cores.

Activations are matrices here: a row for each position of each image, a column for each channel,
the columns next to each other (channels-last memory), rows a stride apart. What is written or what
gradients are read from may be several such matrices, each for a range of columns (`Part`), so that
branches are cut and joined without a copy.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

BLOCK = 64  # rows that stay in the first-level cache while their sums are taken
DTYPES = (torch.float32, torch.bfloat16)


class Part(NamedTuple):
    """Columns `first` up to `last` of an activation, kept in [B, last - first, H, W] `tensor`."""

    first: int
    last: int
    tensor: Tensor


def row_stride(tensor: Tensor) -> int | None:
    """Elements from one row of [B, C, H, W] to the next; None if it is not in rows as above."""
    batch, channels, height, width = tensor.shape
    stride = tensor.stride(3) if width > 1 else tensor.stride(2) if height > 1 else channels
    in_rows = (height * width * stride, 1, width * stride, stride)
    fits = all(
        size == 1 or own == wanted
        for size, own, wanted in zip(tensor.shape, tensor.stride(), in_rows)
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

    x: [B, C, H, W] float32 or bfloat16 in rows; affine: weight and bias; running: mean and
    variance, which move by `momentum` (0: stay).
    """
    rows, channels, threads = x.numel() // x.shape[1], x.shape[1], torch.get_num_threads()
    partial = torch.empty(threads, 2, channels, dtype=torch.float64)
    saved = torch.empty(2, channels)  # mean and 1 / sqrt(variance + eps)
    numbers = torch.tensor([momentum, eps], dtype=torch.float64)
    fixed = (x, row_stride(x), rows, channels, threads, partial, saved, *affine, *running, numbers)
    loops = _loops(x.dtype)
    _parallel(loops.statistics, threads, fixed, [])
    _parallel(loops.normalise, threads, fixed, parts)
    return saved


def backward(
    x: Tensor, affine: tuple[Tensor, Tensor], saved: Tensor, grads: list[Part]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, from those of `forward`'s parts."""
    rows, channels, threads = x.numel() // x.shape[1], x.shape[1], torch.get_num_threads()
    partial = torch.empty(threads, 2, channels, dtype=torch.float64)
    result = torch.empty_like(x, memory_format=torch.channels_last)
    sums = torch.empty(2, channels)
    fixed = (x, row_stride(x), rows, channels, threads, partial, saved, *affine, result, sums)
    loops = _loops(x.dtype)
    _parallel(loops.reduce, threads, fixed, grads)
    _parallel(loops.input_gradient, threads, fixed, grads)
    return result, sums[1], sums[0]


def relu_backward(grad: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """grad where y, a ReLU's result, is above 0 (None: everywhere), and its sum over all rows.

    grad, y: [B, C, H, W] of one dtype in rows. Returns a new tensor and float32 [C].
    """
    rows, channels, threads = grad.numel() // grad.shape[1], grad.shape[1], torch.get_num_threads()
    partial = torch.empty(threads, channels, dtype=torch.float64)
    result = torch.empty_like(grad, memory_format=torch.channels_last)
    y = grad if y is None else y
    fixed = (grad, row_stride(grad), rows, channels, threads, partial, y, row_stride(y), result)
    _parallel(_loops(grad.dtype).mask, threads, (*fixed, int(y is grad)), [])
    return result, partial.sum(0).float()


# ----------------------------------------------------------------------------- threads and memory


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library whose threads PyTorch uses; None where there is none of the known ones."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            paths = {line.split()[-1] for line in file if "/" in line}
    except OSError:  # not Linux
        return None
    for path in sorted(paths):
        if path.rpartition("/")[2].startswith(("libgomp", "libiomp5", "libomp.")):
            library = ctypes.CDLL(path)
            if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_thread_num"):
                number = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value
                binding.add_symbol("irv2_thread_number", number)
                return library
    return None


def available() -> bool:
    """Whether the loops can run here."""
    return _openmp() is not None


def _parallel(loop: int, threads: int, fixed: tuple, parts: list[Part]) -> None:
    """Run a compiled loop once on each thread; it takes its share of the rows by its number."""
    words = [value.data_ptr() if isinstance(value, Tensor) else value for value in fixed]
    words.append(len(parts))
    for first, last, tensor in parts:
        words += [first, last, tensor.data_ptr(), row_stride(tensor)]
    arguments = (ctypes.c_int64 * len(words))(*words)
    _openmp().GOMP_parallel(ctypes.c_void_p(loop), arguments, threads, 0)


# ---------------------------------------------------------------------------------------- numbers

_INT32 = ir.IntType(32)


@intrinsic
def _widen(_context, _bits):
    """bfloat16, as the uint16 it is in memory -> float32."""

    def generate(_, builder, __, arguments):
        wide = builder.zext(arguments[0], _INT32)
        return builder.bitcast(builder.shl(wide, ir.Constant(_INT32, 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrow(_context, _value):
    """float32 -> the nearest bfloat16 (ties to even), as uint16."""

    def generate(_, builder, __, arguments):
        bits = builder.bitcast(arguments[0], _INT32)
        upper = builder.lshr(bits, ir.Constant(_INT32, 16))
        odd = builder.and_(upper, ir.Constant(_INT32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_INT32, 0x7FFF)))
        result = builder.trunc(builder.lshr(rounded, ir.Constant(_INT32, 16)), ir.IntType(16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.select(is_nan, ir.Constant(ir.IntType(16), 0x7FC0), result)

    return types.uint16(types.float32), generate


@intrinsic
def _pointer(_context, _address):
    def generate(_, builder, __, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def _address(_context, _pointer_):
    def generate(_, builder, __, arguments):
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(_pointer_), generate


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
    _openmp()
    if dtype == torch.bfloat16:
        loops = _compiled(np.uint16, _widen, _narrow)
    else:
        loops = _compiled(np.float32, _same, _same)
    return _Loops(*(loop.address for loop in loops))


_thread_number = types.ExternalFunction("irv2_thread_number", types.int32())
_inlined = numba.njit(nogil=True, error_model="numpy", inline="always")
_same = _inlined(lambda value: value)


@_inlined
def _share(rows, threads):
    """This thread's number, and its rows."""
    number = _thread_number()
    return number, rows * number // threads, rows * (number + 1) // threads


@_inlined
def _float64(address, shape):
    return carray(_pointer(address), shape, np.float64)


@_inlined
def _float32(address, shape):
    return carray(_pointer(address), shape, np.float32)


def _compiled(kind: type, load: Callable, store: Callable) -> list:
    """The four loops for numbers that are kept as `kind`, `load`ed to float32 and `store`d again."""
    size = np.dtype(kind).itemsize

    @_inlined
    def matrix(address, row, rows, stride):
        return carray(_pointer(address + size * row * stride), (rows, stride), kind)

    def statistics(raw):
        """Mean and sum of squared differences from it, of each column, for each thread's rows."""
        a = carray(raw, (6,))
        channels, threads = a[3], a[4]
        number, first, last = _share(a[2], threads)
        partial = _float64(a[5], (threads, 2, channels))
        mean, squares = partial[number, 0], partial[number, 1]
        mean[:] = 0
        squares[:] = 0
        total = np.empty(channels, np.float32)
        spread = np.empty(channels, np.float32)
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            x = matrix(a[0], start, rows, a[1])
            total[:] = 0
            spread[:] = 0
            for r in range(rows):
                row = x[r]
                for c in range(channels):
                    total[c] += load(row[c])
            for c in range(channels):
                total[c] /= np.float32(rows)
            for r in range(rows):
                row = x[r]
                for c in range(channels):
                    difference = load(row[c]) - total[c]
                    spread[c] += difference * difference
            weight = rows / (start - first + rows)
            for c in range(channels):  # two samples' moments joined: Chan, Golub and LeVeque
                apart = total[c] - mean[c]
                mean[c] += apart * weight
                squares[c] += spread[c] + apart * apart * weight * (start - first)

    def normalise(raw):
        """Join the threads' moments, then relu(x * scale + shift)."""
        a = carray(raw, (13,))
        total_rows, channels, threads = a[2], a[3], a[4]
        number, first, last = _share(total_rows, threads)
        partial = _float64(a[5], (threads, 2, channels))
        saved = _float32(a[6], (2, channels))
        gamma, beta = _float32(a[7], channels), _float32(a[8], channels)
        running_mean, running_var = _float32(a[9], channels), _float32(a[10], channels)
        numbers = _float64(a[11], 2)
        momentum, eps = numbers[0], numbers[1]
        scale = np.empty(channels, np.float32)
        shift = np.empty(channels, np.float32)
        for c in range(channels):
            mean, squares, done = 0.0, 0.0, 0
            for t in range(threads):
                rows = total_rows * (t + 1) // threads - total_rows * t // threads
                if rows > 0:
                    apart = partial[t, 0, c] - mean
                    weight = rows / (done + rows)
                    mean += apart * weight
                    squares += partial[t, 1, c] + apart * apart * weight * done
                    done += rows
            inverse = 1 / np.sqrt(squares / total_rows + eps)
            scale[c] = inverse * gamma[c]
            shift[c] = beta[c] - mean * scale[c]
            if number == 0:
                saved[0, c] = mean
                saved[1, c] = inverse
                running_mean[c] += momentum * (mean - running_mean[c])
                unbiased = squares / max(total_rows - 1, 1)
                running_var[c] += momentum * (unbiased - running_var[c])
        parts = carray(_pointer(_address(raw) + 13 * 8), (a[12], 4), np.int64)
        zero = np.float32(0)
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            for p in range(a[12]):
                begin, end = parts[p, 0], parts[p, 1]
                x = matrix(a[0] + size * begin, start, rows, a[1])
                y = matrix(parts[p, 2], start, rows, parts[p, 3])
                factor, offset = scale[begin:end], shift[begin:end]
                for r in range(rows):
                    source, target = x[r], y[r]
                    for c in range(end - begin):
                        value = load(source[c]) * factor[c] + offset[c]
                        target[c] = store(zero if value <= zero else value)

    def reduce(raw):
        """Sums of each column's gradient and of gradient times normalised x, for each thread."""
        a = carray(raw, (12,))
        channels, threads = a[3], a[4]
        number, first, last = _share(a[2], threads)
        partial = _float64(a[5], (threads, 2, channels))
        plain, moment = partial[number, 0], partial[number, 1]
        plain[:] = 0
        moment[:] = 0
        saved = _float32(a[6], (2, channels))
        gamma, beta = _float32(a[7], channels), _float32(a[8], channels)
        scale, shift = _scale_and_shift(saved, gamma, beta)
        parts = carray(_pointer(_address(raw) + 12 * 8), (a[11], 4), np.int64)
        zero = np.float32(0)
        block_plain = np.empty(channels, np.float32)
        block_moment = np.empty(channels, np.float32)
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            block_plain[:] = 0
            block_moment[:] = 0
            for p in range(a[11]):
                begin, end = parts[p, 0], parts[p, 1]
                x = matrix(a[0] + size * begin, start, rows, a[1])
                g = matrix(parts[p, 2], start, rows, parts[p, 3])
                factor, offset = scale[begin:end], shift[begin:end]
                mean, sums, products = saved[0, begin:end], block_plain[begin:end], block_moment[begin:end]
                for r in range(rows):
                    source, gradient = x[r], g[r]
                    for c in range(end - begin):
                        value = load(source[c])
                        is_off = value * factor[c] + offset[c] <= zero
                        slope = zero if is_off else load(gradient[c])
                        sums[c] += slope
                        products[c] += slope * (value - mean[c])
            for c in range(channels):
                plain[c] += block_plain[c]
                moment[c] += block_moment[c]

    def input_gradient(raw):
        """Join the threads' sums, then batch norm's gradient of x."""
        a = carray(raw, (12,))
        total_rows, channels, threads = a[2], a[3], a[4]
        number, first, last = _share(total_rows, threads)
        partial = _float64(a[5], (threads, 2, channels))
        saved = _float32(a[6], (2, channels))
        gamma, beta = _float32(a[7], channels), _float32(a[8], channels)
        scale, shift = _scale_and_shift(saved, gamma, beta)
        sums = _float32(a[10], (2, channels))
        constant = np.empty(channels, np.float32)
        linear = np.empty(channels, np.float32)
        for c in range(channels):
            plain, moment = 0.0, 0.0
            for t in range(threads):
                plain += partial[t, 0, c]
                moment += partial[t, 1, c]
            moment *= saved[1, c]
            if number == 0:
                sums[0, c] = plain
                sums[1, c] = moment
            constant[c] = scale[c] * plain / total_rows
            linear[c] = scale[c] * saved[1, c] * moment / total_rows
        parts = carray(_pointer(_address(raw) + 12 * 8), (a[11], 4), np.int64)
        zero = np.float32(0)
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            for p in range(a[11]):
                begin, end = parts[p, 0], parts[p, 1]
                x = matrix(a[0] + size * begin, start, rows, a[1])
                g = matrix(parts[p, 2], start, rows, parts[p, 3])
                y = matrix(a[9] + size * begin, start, rows, channels)
                factor, offset, mean = scale[begin:end], shift[begin:end], saved[0, begin:end]
                flat, tilt = constant[begin:end], linear[begin:end]
                for r in range(rows):
                    source, gradient, target = x[r], g[r], y[r]
                    for c in range(end - begin):
                        value = load(source[c])
                        is_off = value * factor[c] + offset[c] <= zero
                        slope = zero if is_off else load(gradient[c])
                        rest = flat[c] + (value - mean[c]) * tilt[c]
                        target[c] = store(slope * factor[c] - rest)

    def mask(raw):
        """ReLU's gradient, and its sum over each thread's rows."""
        a = carray(raw, (10,))
        channels, threads, is_open = a[3], a[4], a[9] != 0
        number, first, last = _share(a[2], threads)
        total = _float64(a[5], (threads, channels))[number]
        total[:] = 0
        sums = np.empty(channels, np.float32)
        zero = np.float32(0)
        for start in range(first, last, BLOCK):
            rows = min(BLOCK, last - start)
            g = matrix(a[0], start, rows, a[1])
            y = matrix(a[6], start, rows, a[7])
            target = matrix(a[8], start, rows, channels)
            sums[:] = 0
            for r in range(rows):
                gradient, value, masked = g[r], y[r], target[r]
                for c in range(channels):
                    slope = zero if not is_open and load(value[c]) <= zero else load(gradient[c])
                    masked[c] = store(slope)
                    sums[c] += slope
            for c in range(channels):
                total[c] += sums[c]

    signature = types.void(types.CPointer(types.int64))
    compiled = numba.cfunc(signature, nogil=True, error_model="numpy", cache=True)
    return [compiled(loop) for loop in (statistics, normalise, reduce, input_gradient, mask)]


@_inlined
def _scale_and_shift(saved, gamma, beta):
    """What turns x into its normalised form, as `normalise` computes it."""
    scale = np.empty(len(gamma), np.float32)
    shift = np.empty(len(gamma), np.float32)
    for c in range(len(gamma)):
        scale[c] = saved[1, c] * gamma[c]
        shift[c] = beta[c] - saved[0, c] * scale[c]
    return scale, shift
