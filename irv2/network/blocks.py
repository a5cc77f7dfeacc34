"""The blocks of Inception-ResNet-v2: a table of branches, and the module that a row becomes.

The shapes are those of TF-slim's `inception_resnet_v2.py`, which the published weights follow;
modules carry timm's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------- the table


class Conv(NamedTuple):
    """Convolution without bias, batch norm, ReLU."""

    out_channels: int
    kernel_size: int | tuple[int, int] = 1
    stride: int = 1
    padding: int | tuple[int, int] = 0

    def widened(self, width: float) -> Conv:
        """The layer with `width` times as many outputs."""
        return self._replace(out_channels=round(width * self.out_channels))


class AvgPool(NamedTuple):
    """3x3 average over the positions inside the image."""

    def widened(self, _width: float) -> AvgPool:
        return self


class MaxPool(NamedTuple):
    """3x3 maximum with stride 2."""

    def widened(self, _width: float) -> MaxPool:
        return self


Branch = tuple[Conv | AvgPool | MaxPool, ...]


class BlockSpec(NamedTuple):
    """Parallel branches over one input, concatenated; with a scale, added back to that input."""

    in_channels: int
    branches: tuple[Branch, ...]
    scale: float | None = None
    relu: bool = True

    def widened(self, width: float) -> BlockSpec:
        """The block with `width` times as many channels throughout."""
        branches = (tuple(layer.widened(width) for layer in branch) for branch in self.branches)
        return self._replace(in_channels=round(width * self.in_channels), branches=tuple(branches))


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


# --------------------------------------------------------------------------------- the modules


class NormOptions(NamedTuple):
    """Batch norm as every layer of the network has it; see `inception_resnet_v2`."""

    momentum: float
    eps: float
    scale: bool


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, spec: Conv, norm: NormOptions, initialise: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, *spec, bias=False)
        self.bn = nn.BatchNorm2d(spec.out_channels, eps=norm.eps, momentum=norm.momentum)
        self.bn.weight.requires_grad_(norm.scale)  # TF-slim's batch norm has no gamma
        self.act = nn.ReLU()
        if initialise:
            nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Block(nn.Module):
    """One row of the table above as a module."""

    def __init__(self, spec: BlockSpec, norm: NormOptions) -> None:
        super().__init__()
        self.branch2 = self.branch3 = self.conv2d = self.act = None
        first = _heads(spec, norm)
        out_channels = 0
        for i, branch in enumerate(spec.branches):
            layers, channels = [], spec.in_channels
            for layer in branch:
                is_head = not layers and i in first
                layers.append(first[i] if is_head else _layer(channels, layer, norm))
                channels = layer.out_channels if isinstance(layer, Conv) else channels
            setattr(self, f"branch{i}", layers[0] if len(layers) == 1 else nn.Sequential(*layers))
            out_channels += channels
        self.scale = spec.scale
        if self.scale is not None:
            self.conv2d = nn.Conv2d(out_channels, spec.in_channels, 1)
            nn.init.xavier_uniform_(self.conv2d.weight)
            nn.init.zeros_(self.conv2d.bias)
            self.act = nn.ReLU() if spec.relu else None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat(self.branches(x), dim=1)
        if self.conv2d is None:
            return out
        out = torch.add(x, self.conv2d(out), alpha=self.scale)
        return out if self.act is None else self.act(out)

    def branches(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of all branches."""
        outputs = [self.branch0(x), self.branch1(x)]
        if self.branch2 is not None:
            outputs.append(self.branch2(x))
        if self.branch3 is not None:
            outputs.append(self.branch3(x))
        return outputs


def _heads(spec: BlockSpec, norm: NormOptions) -> dict[int, ConvNormAct]:
    """Build the first layers of branches that begin with a 1x1 convolution, where several do.

    All of them are built before any is initialised: PyTorch draws random numbers for both, and
    another order would give a seed other weights.
    """
    pointwise = [i for i, branch in enumerate(spec.branches) if _is_pointwise(branch[0])]
    if len(pointwise) < 2:
        return {}
    heads = {
        i: ConvNormAct(spec.in_channels, spec.branches[i][0], norm, initialise=False)
        for i in pointwise
    }
    for head in heads.values():
        nn.init.xavier_uniform_(head.conv.weight)
    return heads


def _is_pointwise(spec: Conv | AvgPool | MaxPool) -> bool:
    return isinstance(spec, Conv) and spec.kernel_size == 1 and spec.stride == 1


def _layer(in_channels: int, spec: Conv | AvgPool | MaxPool, norm: NormOptions) -> nn.Module:
    if isinstance(spec, Conv):
        return ConvNormAct(in_channels, spec, norm)
    if isinstance(spec, AvgPool):
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return nn.MaxPool2d(3, stride=2)


class Stack(nn.Sequential):
    """Repeats of a block; with gradient checkpointing each keeps only its input."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript reads no further
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                return self._checkpointed(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _checkpointed(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(
                block,
                x,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a block is random
                context_fn=lambda block=block: (nullcontext(), _held_statistics(block)),
            )
        return x


@contextmanager
def _held_statistics(block: nn.Module) -> Iterator[None]:
    """Hold the running statistics: a checkpointed block runs twice, and only the first run counts.

    With momentum 0 a batch adds nothing to them, and without a counter none is counted.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, counter
