"""Inception-ResNet-v2 (Szegedy et al., arXiv:1602.07261) with the parameter names of timm's port.

The shapes are those of TF-slim's `inception_resnet_v2.py`, which the published weights follow.
Parallel 1x1 convolutions that read the same tensor are stored and run as one ("merged heads");
`state_dict` and `load_state_dict` cut and join them, so files look exactly like timm's.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MIN_IMAGE_SIZE = 75  # the smallest side that leaves one position after mixed_7a
MIN_AUX_IMAGE_SIZE = 299  # the smallest side whose 17x17 map feeds the auxiliary head's 5x5 window
NUM_FEATURES = 1536
BLOCKS = (10, 20, 9)  # repeats of block35, block17 and block8


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
    """Batch norm as every layer of the network uses it."""

    momentum: float = 0.1
    eps: float = 1e-3
    scale: bool = True


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics can be held while a checkpointed block runs again."""

    recomputing = False

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

    def forward(self, x: Tensor) -> Tensor:
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
        for i, branch in enumerate(spec.branches):
            layers, channels = OrderedDict(), spec.in_channels
            for depth, layer in enumerate(branch):
                if depth > 0 or i not in self.merged:
                    layers[str(depth)] = _layer(channels, layer, norm)
                channels = layer.out_channels if isinstance(layer, Conv) else channels
            self.out_channels += channels
            is_single = len(branch) == 1 and i not in self.merged
            self.add_module(f"branch{i}", layers["0"] if is_single else nn.Sequential(layers))
        # timm's name of each merged convolution: "branch0" alone in its branch, else "branch1.0"
        self.head_names = tuple(
            f"branch{i}" if len(spec.branches[i]) == 1 else f"branch{i}.0" for i in self.merged
        )

        if self.scale is not None:
            self.conv2d = nn.Conv2d(self.out_channels, spec.in_channels, 1)
            self.out_channels = spec.in_channels
            nn.init.xavier_uniform_(self.conv2d.weight)
            nn.init.zeros_(self.conv2d.bias)
        if self.merged:
            self.register_state_dict_post_hook(_split_heads)
            self.register_load_state_dict_pre_hook(_join_heads)

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x] * self.num_branches
        if self.merged:
            for i, head in zip(self.merged, self.heads(x).split(self.heads.parts, dim=1)):
                inputs[i] = head
        outputs = [getattr(self, f"branch{i}")(inputs[i]) for i in range(self.num_branches)]
        out = torch.cat(outputs, dim=1)
        if self.scale is None:
            return out
        out = torch.add(x, self.conv2d(out), alpha=self.scale)
        return F.relu(out, inplace=True) if self.relu else out


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
            if name not in state:
                missing.append(name)
            elif state[name].shape != pieces[i].shape:
                shapes = f"{tuple(state[name].shape)} in the file, {tuple(pieces[i].shape)} here"
                errors.append(f"size mismatch for {name}: {shapes}")
            else:
                pieces[i] = state[name]
            state.pop(name, None)
        state[f"{prefix}heads.{key}"] = pieces[0] if own.ndim == 0 else torch.cat(pieces)


class AuxHead(nn.Module):
    """TF-slim's auxiliary classifier on the 17x17 map (training only, loss weight 0.4)."""

    def __init__(self, in_channels: int, num_classes: int, norm: NormOptions) -> None:
        super().__init__()
        self.conv_1b = ConvNormAct(in_channels, Conv(128), norm)
        self.conv_2a = ConvNormAct(128, Conv(768, 5), norm)
        self.classif = _classifier(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 5, stride=3)
        x = self.conv_2a(self.conv_1b(x))
        return self.classif(x.mean(dim=(2, 3)))  # one position at 299 px, more on larger images


def _classifier(in_features: int, num_classes: int) -> nn.Linear:
    linear = nn.Linear(in_features, num_classes)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


# ---------------------------------------------------------------------------------- the network


class InceptionResnetV2(nn.Module):
    """See `inception_resnet_v2`; attributes carry timm's names."""

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        aux_logits: bool,
        norm: NormOptions,
        blocks: tuple[int, int, int],
        grad_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.grad_checkpointing = grad_checkpointing

        def repeat(spec: BlockSpec, times: int) -> nn.Sequential:
            return nn.Sequential(*[Block(spec, norm) for _ in range(times)])

        self.conv2d_1a = ConvNormAct(in_chans, Conv(32, 3, stride=2), norm)
        self.conv2d_2a = ConvNormAct(32, Conv(32, 3), norm)
        self.conv2d_2b = ConvNormAct(32, Conv(64, 3, padding=1), norm)
        self.maxpool_3a = nn.MaxPool2d(3, stride=2)
        self.conv2d_3b = ConvNormAct(64, Conv(80), norm)
        self.conv2d_4a = ConvNormAct(80, Conv(192, 3), norm)
        self.maxpool_5a = nn.MaxPool2d(3, stride=2)
        self.mixed_5b = Block(MIXED_5B, norm)
        self.repeat = repeat(BLOCK35, blocks[0])
        self.mixed_6a = Block(MIXED_6A, norm)
        self.repeat_1 = repeat(BLOCK17, blocks[1])
        self.aux = AuxHead(BLOCK17.in_channels, num_classes, norm) if aux_logits else None
        self.mixed_7a = Block(MIXED_7A, norm)
        self.repeat_2 = repeat(BLOCK8, blocks[2])
        self.block8 = Block(BLOCK8._replace(scale=1.0, relu=False), norm)
        self.conv2d_7b = ConvNormAct(BLOCK8.in_channels, Conv(NUM_FEATURES), norm)
        self.classif = _classifier(NUM_FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, in_chans, H, W] float in [-1, 1] -> logits [B, num_classes].

        In training mode with the auxiliary head: (logits, auxiliary logits).
        Raises ValueError for a side under 75 px (299 px where the auxiliary head runs).
        """
        use_aux = self.training and self.aux is not None
        _check_image_size(x, MIN_AUX_IMAGE_SIZE if use_aux else MIN_IMAGE_SIZE)

        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x)))
        x = self.mixed_5b(self.maxpool_5a(x))
        x = self._run(self.repeat, x)
        x = self.mixed_6a(x)
        x = self._run(self.repeat_1, x)
        aux_logits = self.aux(x) if use_aux else None
        x = self.mixed_7a(x)
        x = self._run(self.repeat_2, x)
        x = self.conv2d_7b(self.block8(x))
        x = F.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        logits = self.classif(x)
        return (logits, aux_logits) if use_aux else logits

    def _run(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        """The blocks in order; with gradient checkpointing each keeps only its input."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return blocks(x)
        for block in blocks:
            x = checkpoint(
                block,
                x,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a block is random
                context_fn=lambda block=block: (nullcontext(), _held_statistics(block)),
            )
        return x


@contextmanager
def _held_statistics(block: Block):
    """A checkpointed block runs twice; only the first run may move its running statistics."""
    norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.recomputing = True
    try:
        yield
    finally:
        for norm in norms:
            norm.recomputing = False


def _check_image_size(x: Tensor, minimum: int) -> None:
    height, width = x.shape[-2:]
    if min(height, width) < minimum:
        head = " with its auxiliary head" if minimum == MIN_AUX_IMAGE_SIZE else ""
        raise ValueError(
            f"image of {height}x{width} px is too small: Inception-ResNet-v2{head} needs "
            f"at least {minimum} px on each side"
        )


def inception_resnet_v2(
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.2,
    aux_logits: bool = False,
    bn_momentum: float = 0.1,
    bn_eps: float = 1e-3,
    bn_scale: bool = True,
    grad_checkpointing: bool = False,
    blocks: tuple[int, int, int] = BLOCKS,
) -> InceptionResnetV2:
    """Inception-ResNet-v2 with Xavier-uniform weights: 55,843,464 parameters for 1000 classes.

    aux_logits: TF-slim's auxiliary head, active in training only.
    bn_momentum: share of the new batch in the running statistics (TF-slim: 0.0003).
    bn_scale: learn batch norm's gamma; False keeps it at 1, as TF-slim does.
    grad_checkpointing: keep only each block's input and run the block again in backward.
    blocks: repeats of block35, block17 and block8; anything but (10, 20, 9) is another network.
    """
    norm = NormOptions(bn_momentum, bn_eps, bn_scale)
    return InceptionResnetV2(
        num_classes, in_chans, drop_rate, aux_logits, norm, tuple(blocks), grad_checkpointing
    )
