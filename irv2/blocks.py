"""The blocks of Inception-ResNet-v2: a table of branches, and the module that a row becomes.

The shapes are those of TF-slim's `inception_resnet_v2.py`, which the published weights follow.
Parallel 1x1 convolutions that read the same tensor are stored and run as one ("merged heads");
`state_dict` and `load_state_dict` cut and join them, so files look exactly like timm's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irv2 import fused

# ---------------------------------------------------------------------------------- the table


class Conv(NamedTuple):
    """Convolution without bias, batch norm, ReLU."""

    out_channels: int
    kernel_size: int | tuple[int, int] = 1
    stride: int = 1
    padding: int | tuple[int, int] = 0


class AvgPool(NamedTuple):
    """3x3 average over the positions inside the image."""


class MaxPool(NamedTuple):
    """3x3 maximum with stride 2."""


Branch = tuple[Conv | AvgPool | MaxPool, ...]


class BlockSpec(NamedTuple):
    """Parallel branches over one input, concatenated; with a scale, added back to that input."""

    in_channels: int
    branches: tuple[Branch, ...]
    scale: float | None = None
    relu: bool = True


MIXED_5B = BlockSpec(
    192,
    (
        (Conv(96),),
        (Conv(48), Conv(64, 5, padding=2)),
        (Conv(64), Conv(96, 3, padding=1), Conv(96, 3, padding=1)),
        (AvgPool(), Conv(64)),
    ),
)
BLOCK35 = BlockSpec(
    320,
    (
        (Conv(32),),
        (Conv(32), Conv(32, 3, padding=1)),
        (Conv(32), Conv(48, 3, padding=1), Conv(64, 3, padding=1)),
    ),
    scale=0.17,
)
MIXED_6A = BlockSpec(
    320,
    (
        (Conv(384, 3, stride=2),),
        (Conv(256), Conv(256, 3, padding=1), Conv(384, 3, stride=2)),
        (MaxPool(),),
    ),
)
BLOCK17 = BlockSpec(
    1088,
    (
        (Conv(192),),
        (Conv(128), Conv(160, (1, 7), padding=(0, 3)), Conv(192, (7, 1), padding=(3, 0))),
    ),
    scale=0.10,
)
MIXED_7A = BlockSpec(
    1088,
    (
        (Conv(256), Conv(384, 3, stride=2)),
        (Conv(256), Conv(288, 3, stride=2)),
        (Conv(256), Conv(288, 3, padding=1), Conv(320, 3, stride=2)),
        (MaxPool(),),
    ),
)
BLOCK8 = BlockSpec(
    2080,
    (
        (Conv(192),),
        (Conv(192), Conv(224, (1, 3), padding=(0, 1)), Conv(256, (3, 1), padding=(1, 0))),
    ),
    scale=0.20,
)


# ---------------------------------------------------------------------------------- the layers


class NormOptions(NamedTuple):
    """Batch norm as every layer of the network has it; see `inception_resnet_v2`."""

    momentum: float
    eps: float
    scale: bool


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics can be held while a checkpointed block runs again."""

    recomputing = False

    @property
    def moving(self) -> float:
        """Share of a new batch in the running statistics, in the next forward."""
        return 0.0 if self.recomputing else self.momentum

    def forward(self, x: Tensor) -> Tensor:
        if not (self.recomputing and self.training):
            return super().forward(x)
        # Batch statistics as before, running statistics untouched: momentum 0 adds nothing.
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.0, self.eps
        )


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU.

    `parts` are the widths of the convolutions that were merged into this one; each part starts
    with the Xavier-uniform range of its own fan-out.
    """

    def __init__(
        self, in_channels: int, spec: Conv, norm: NormOptions, parts: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.parts = parts or (spec.out_channels,)
        self.conv = nn.Conv2d(in_channels, *spec, bias=False)
        self.bn = BatchNorm(spec.out_channels, eps=norm.eps, momentum=norm.momentum)
        self.bn.weight.requires_grad_(norm.scale)  # TF-slim's batch norm has no gamma
        for weight in self.conv.weight.data.split(self.parts):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """place: where in memory the result shall lie, from `fused.slots`."""
        if isinstance(self.bn, nn.Identity) and fused.infers(x):  # folded
            return fused.conv_relu(x, self.conv)
        if isinstance(self.bn, BatchNorm) and fused.trains(x, [self.bn]):
            return fused.norm_relu(self.conv(x), self.bn, self.bn.moving, (), (place,))[0]
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _layer(in_channels: int, spec: Conv | AvgPool | MaxPool, norm: NormOptions) -> nn.Module:
    if isinstance(spec, Conv):
        return ConvNormAct(in_channels, spec, norm)
    if isinstance(spec, AvgPool):
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.MaxPool2d(3, stride=2)


def _is_pointwise(spec: Conv | AvgPool | MaxPool) -> bool:
    return isinstance(spec, Conv) and spec.kernel_size == 1 and spec.stride == 1


class Block(nn.Module):
    """One row of the table above as a module.

    Branches that begin with a 1x1 convolution share one merged convolution, `heads`; what follows
    it in a branch keeps timm's indices (`branch1.1`, `branch1.2`).
    """

    def __init__(self, spec: BlockSpec, norm: NormOptions) -> None:
        super().__init__()
        self.scale, self.relu = spec.scale, spec.relu
        pointwise = [i for i, b in enumerate(spec.branches) if _is_pointwise(b[0])]
        self.merged = tuple(pointwise) if len(pointwise) > 1 else ()
        if self.merged:
            parts = tuple(spec.branches[i][0].out_channels for i in self.merged)
            self.heads = ConvNormAct(spec.in_channels, Conv(sum(parts)), norm, parts)

        self.num_branches = len(spec.branches)
        self.out_channels = 0
        widths = []
        for i, branch in enumerate(spec.branches):
            layers, channels = OrderedDict(), spec.in_channels
            for depth, layer in enumerate(branch):
                if depth > 0 or i not in self.merged:
                    layers[str(depth)] = _layer(channels, layer, norm)
                channels = layer.out_channels if isinstance(layer, Conv) else channels
            self.out_channels += channels
            widths.append(channels)
            is_single = len(branch) == 1 and i not in self.merged
            self.add_module(f"branch{i}", layers["0"] if is_single else nn.Sequential(layers))
        # timm's name of each merged convolution: "branch0" alone in its branch, else "branch1.0"
        self.head_names = tuple(
            f"branch{i}" if len(spec.branches[i]) == 1 else f"branch{i}.0" for i in self.merged
        )

        self.widths = tuple(widths)
        if self.scale is not None:
            self.conv2d = nn.Conv2d(self.out_channels, spec.in_channels, 1)
            self.out_channels = spec.in_channels
            nn.init.xavier_uniform_(self.conv2d.weight)
            nn.init.zeros_(self.conv2d.bias)
        if self.merged:
            self.register_state_dict_post_hook(_split_heads)
            self.register_load_state_dict_pre_hook(_join_heads)

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        """in_place: in inference a folded residual block may write its result into x."""
        is_folded = self.merged and isinstance(self.heads.bn, nn.Identity)
        if self.scale is not None and not is_folded and fused.trains(x, self.norms()):
            return self._forward_fused(x)
        inputs = [x] * self.num_branches
        if self.merged:
            for i, head in zip(self.merged, self.heads(x).split(self.heads.parts, dim=1)):
                inputs[i] = head
        outputs = [getattr(self, f"branch{i}")(inputs[i]) for i in range(self.num_branches)]
        out = torch.cat(outputs, dim=1)
        if self.scale is None:
            return out
        if is_folded and fused.infers(x):
            return fused.add_conv_relu(x, out, self.conv2d, self.scale, self.relu, in_place)
        out = torch.add(x, self.conv2d(out), alpha=self.scale)
        return F.relu(out, inplace=True) if self.relu else out

    def _forward_fused(self, x: Tensor) -> Tensor:
        """`forward` of a residual block, all of whose branches begin with a merged head."""
        whole, places = fused.slots(x, self.widths)
        is_head = [len(branch) == 0 for branch in self.branches()]
        x, heads = fused.fork(x, self.heads.conv.weight)
        bn = self.heads.bn
        wanted = tuple(p if is_end else None for p, is_end in zip(places, is_head))
        outputs = list(fused.norm_relu(heads, bn, bn.moving, self.heads.parts, wanted))
        for i, branch in enumerate(self.branches()):
            for layer in branch:
                is_last = layer is branch[-1]
                outputs[i] = layer(outputs[i], places[i] if is_last else None)
        return fused.add_conv(x, fused.join(whole, outputs), self.conv2d, self.scale, self.relu)

    def norms(self) -> Iterator[BatchNorm]:
        """Its batch norms; none where they are folded."""
        return (module for module in self.modules() if isinstance(module, BatchNorm))

    def branches(self) -> list[nn.Sequential]:
        """What follows the merged heads in each branch of a residual block."""
        return [getattr(self, f"branch{i}") for i in range(self.num_branches)]


def _head_pieces(block: Block, value: Tensor) -> tuple[Tensor, ...]:
    """A tensor of the merged convolution -> the part of each branch (counters are shared)."""
    return (value,) * len(block.merged) if value.ndim == 0 else value.split(block.heads.parts)


def _split_heads(block: Block, state: dict, prefix: str, _metadata: dict) -> None:
    """After `state_dict`: `heads.*` becomes an entry for each branch."""
    stem = f"{prefix}heads."
    for key in [key for key in state if key.startswith(stem)]:
        for name, piece in zip(block.head_names, _head_pieces(block, state.pop(key))):
            state[f"{prefix}{name}.{key.removeprefix(stem)}"] = piece


def _join_heads(block: Block, state: dict, prefix: str, *context) -> None:
    """Before `load_state_dict`: the branches' entries become `heads.*`; faults keep timm names."""
    _metadata, _strict, missing, _unexpected, errors = context
    for key, own in block.heads.state_dict().items():
        pieces = list(_head_pieces(block, own))
        for i, name in enumerate(f"{prefix}{name}.{key}" for name in block.head_names):
            given = state.pop(name, None)
            if given is not None and given.shape == pieces[i].shape:
                pieces[i] = given
            elif given is not None:
                shapes = f"{tuple(given.shape)} in the file, {tuple(pieces[i].shape)} here"
                errors.append(f"size mismatch for {name}: {shapes}")
            elif own.ndim > 0:  # old files hold no counters, and torch does without them too
                missing.append(name)
        if len({piece.device for piece in pieces}) > 1:  # some are given, some our own
            pieces = [piece.to(own.device) for piece in pieces]
        state[f"{prefix}heads.{key}"] = pieces[0] if own.ndim == 0 else torch.cat(pieces)
