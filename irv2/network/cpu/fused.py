"""Operations that take fewer passes over a CPU's memory than PyTorch's.

The same mathematics as the plain modules in blocks.py. In training, with hand-written gradients:

    norm_relu   batch norm and ReLU in one, straight into the place where a concatenation wants it
    fork        x for the residual and a 1x1 convolution of x; backward adds the two gradients as
                part of the matrix product
    join        a concatenation whose parts have been written in place
    add_conv    relu(x + conv(y)) in one

In inference conv_relu and add_conv_relu, which also keep weights in the order that oneDNN wants.

Where these run, there are neither second derivatives nor forward-mode ones, which the plain network
has. modules.py decides where.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from irv2.network.cpu import norm as native
from irv2.network.cpu import threads
from irv2.network.cpu.norm import Part


def trains(x: Tensor, norms: Iterable[nn.Module | None]) -> bool:
    """True if the functions for training can stand in for the plain modules in this forward."""
    return (
        _is_plain(x)
        and torch.is_grad_enabled()
        and _dtype(x) in native.DTYPES
        and all(map(_can_loop, norms))
        and threads.available()
    )


def infers(x: Tensor) -> bool:
    """True if the functions for inference can stand in for the plain modules in this forward."""
    return _is_plain(x) and not torch.is_grad_enabled() and _fuses(_dtype(x))


def _is_plain(x: Tensor) -> bool:
    """True if x is an ordinary tensor in RAM, and nothing records operations on it."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _can_loop(norm: nn.Module | None) -> bool:
    """True if compiled loops, which are given addresses, may read and write a norm's tensors."""
    if type(norm) is not nn.BatchNorm2d or not norm.training or norm.momentum is None:
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(t is not None and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _dtype(x: Tensor) -> torch.dtype:
    """Type in which convolutions compute."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def in_rows(x: Tensor) -> Tensor:
    """Return x, or a copy in channels-last memory if its channels do not lie side by side."""
    if native.row_stride(x) is not None:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _matrix(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels-last memory, seen as [B * H * W, C]."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


# ------------------------------------------------------------------------- batch norm with ReLU


def norm_relu(
    x: Tensor,
    norm: nn.BatchNorm2d,
    widths: tuple[int, ...] = (),
    places: tuple[Tensor | None, ...] = (None,),
) -> tuple[Tensor, ...]:
    """relu(norm(x)) in training mode, cut into parts of `widths` channels (none: one part).

    places: where to write each part, from `slots`; None: new memory. Raises ValueError for one
    value a channel, as PyTorch does.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got {x.shape}")
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    running, options = (norm.running_mean, norm.running_var), (norm.momentum, norm.eps)
    widths = widths or (x.shape[1],)
    return _NormRelu.apply(x, norm.weight, norm.bias, running, options, widths, places)


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running, options, widths, places):
        x = in_rows(x)
        batch, _, height, width = x.shape
        parts, first = [], 0
        for channels, place in zip(widths, places):
            if place is None:
                place = torch.empty(
                    (batch, channels, height, width),
                    dtype=x.dtype,
                    memory_format=torch.channels_last,
                )
            parts.append(Part(first, first + channels, place))
            first += channels
        saved = native.forward(x, (weight, bias), running, *options, parts)
        ctx.save_for_backward(x, weight, bias, saved)
        return tuple(part.tensor for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, bias, saved = ctx.saved_tensors
        parts, first = [], 0
        for grad in grads:
            parts.append(Part(first, first + grad.shape[1], in_rows(grad)))
            first += grad.shape[1]
        gradients = native.backward(x, (weight, bias), saved, parts)
        needed = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad))
        return (*needed, None, None, None, None)


# --------------------------------------------------------------------------------- concatenation


def slots(x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Allocate a concatenation of `widths` channels over x's positions: (the whole, its parts)."""
    batch, _, height, width = x.shape
    shape = (batch, sum(widths), height, width)
    whole = torch.empty(shape, dtype=_dtype(x), memory_format=torch.channels_last)
    parts, first = [], 0
    for channels in widths:
        # Not a view of `whole` in autograd's eyes: its gradient comes through `join`.
        part = torch.empty(0, dtype=whole.dtype)
        part.set_(whole.untyped_storage(), first, (batch, channels, height, width), whole.stride())
        parts.append(part)
        first += channels
    return whole, parts


def join(whole: Tensor, parts: list[Tensor]) -> Tensor:
    """Return `whole`, whose slots all hold their `parts`."""
    return _Join.apply([whole], *parts)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, *parts):
        ctx.widths = [part.shape[1] for part in parts]
        return whole[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (None, *grad.split(ctx.widths, dim=1))


# -------------------------------------------------------------------------------------- residuals


def fork(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return x, and its 1x1 convolution with weight [N, C, 1, 1]."""
    dtype = _dtype(x)
    return _Fork.apply(in_rows(x.to(dtype)), weight.to(dtype))


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        batch, _, height, width = x.shape
        product = _matrix(x) @ weight.flatten(1).t()
        return x.view_as(x), product.view(batch, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_y):
        x, weight = ctx.saved_tensors
        grad, grad_weight = _matrix(grad_y), None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[1]:
                grad_weight = _as_weight(grad.t() @ _matrix(x), weight)
            if ctx.needs_input_grad[0]:
                # In place: grad_x was made by _AddConv, and nothing else holds it.
                total = _matrix(grad_x)
                torch.addmm(total, grad, weight.flatten(1), out=total)
        return grad_x, grad_weight


def _as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
    """View [N, C] as the 1x1 weight, with its strides, which DistributedDataParallel insists on."""
    return matrix.as_strided(weight.shape, weight.stride())


def add_conv(x: Tensor, y: Tensor, conv: nn.Conv2d, scale: float, relu: bool) -> Tensor:
    """relu(x + scale * conv(y)) for a 1x1 convolution with bias, and x from `fork`."""
    weight, bias = (p.mul(scale).to(y.dtype) for p in (conv.weight, conv.bias))
    return _AddConv.apply(x, y, weight, bias, relu)


class _AddConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, bias, relu):
        if _fuses(y.dtype):
            result = _conv_add(x, y, weight, bias, relu)
        else:
            with torch.autocast("cpu", enabled=False):
                result = F.conv2d(y, weight, bias).add_(x)
            result = result.relu_() if relu else result
        ctx.relu = relu
        ctx.save_for_backward(y, weight, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, weight, result = ctx.saved_tensors
        # Either way a tensor of our own, to which _Fork may add.
        if ctx.relu:
            grad, grad_bias = native.relu_backward(in_rows(grad), result)
        else:
            grad = grad.clone(memory_format=torch.channels_last)
            grad_bias = grad.sum((0, 2, 3))
        flat, grad_y, grad_weight = _matrix(grad), None, None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[1]:
                grad_y = torch.empty_like(y)
                torch.mm(flat, weight.flatten(1), out=_matrix(grad_y))
            if ctx.needs_input_grad[2]:
                grad_weight = _as_weight(flat.t() @ _matrix(y), weight)
        return grad, grad_y, grad_weight, grad_bias.to(y.dtype), None


def _conv_add(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, relu: bool, in_place: bool = False
) -> Tensor:
    """x + conv(y) for a 1x1 convolution by oneDNN, and ReLU, in one pass."""
    once, ops = [1, 1], torch.ops.mkldnn
    how = (weight, bias, [0, 0], once, once, 1, "add", 1.0, "relu" if relu else None, [], None)
    if not in_place and y.shape[2:].numel() == 1:  # where it needs PyTorch 2.12 out of place
        x, in_place = x.clone(), True
    if in_place:
        return ops._convolution_pointwise_.binary(x, y, *how)
    return ops._convolution_pointwise.binary(y, x, *how)


# ------------------------------------------------------------------------------------- inference


class _Packed(NamedTuple):
    """Weights in oneDNN's own order, and what they were made from."""

    parameters: tuple[Tensor, Tensor]
    source: tuple
    weight: Tensor
    bias: Tensor


_packed: WeakKeyDictionary[nn.Conv2d, _Packed] = WeakKeyDictionary()


def conv_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """relu(conv(x)) in one, for a convolution with bias."""
    x = in_rows(x.to(_dtype(x)))
    packed = _pack(conv, x, 1.0)
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed.weight, packed.bias, conv.padding, conv.stride, conv.dilation, 1,
        "relu", [], None,
    )  # fmt: skip


def add_conv_relu(
    x: Tensor, y: Tensor, conv: nn.Conv2d, scale: float, relu: bool, in_place: bool = False
) -> Tensor:
    """relu(x + scale * conv(y)) in one, for a 1x1 convolution with bias; `in_place`: into x."""
    y = in_rows(y.to(_dtype(y)))
    packed = _pack(conv, y, scale)
    return _conv_add(in_rows(x.to(y.dtype)), y, packed.weight, packed.bias, relu, in_place)


def _pack(conv: nn.Conv2d, x: Tensor, scale: float) -> _Packed:
    """Pack the convolution's weight and bias times scale; repeated when they or x's size change.

    Changes through `.data`, which PyTorch does not count, go unnoticed.
    """
    own = weight, bias = conv.weight, conv.bias
    if weight.is_inference():  # PyTorch does not count its changes, so nothing can be kept
        return _Packed(own, (), (weight * scale).to(x.dtype), (bias * scale).to(x.dtype))
    source = (weight._version, bias._version, x.shape[1:], x.dtype, scale)
    packed = _packed.get(conv)
    is_known = packed is not None and all(a is b for a, b in zip(packed.parameters, own))
    if not is_known or packed.source != source:
        ordered = torch.ops.mkldnn._reorder_convolution_weight(
            (weight * scale).to(x.dtype), conv.padding, conv.stride, conv.dilation, 1, list(x.shape)
        )
        packed = _packed[conv] = _Packed(own, source, ordered, (bias * scale).to(x.dtype))
    return packed


def _fuses(dtype: torch.dtype) -> bool:
    """True if oneDNN convolves this type here, with what follows in the same pass."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
