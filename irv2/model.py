"""Inception-ResNet-v2 (Szegedy et al., arXiv:1602.07261) with timm's parameter names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irv2 import fused, user_cache
from irv2.blocks import (
    BLOCK8,
    BLOCK17,
    BLOCK35,
    MIXED_5B,
    MIXED_6A,
    MIXED_7A,
    BatchNorm,
    Block,
    BlockSpec,
    Conv,
    ConvNormAct,
    NormOptions,
)

MIN_IMAGE_SIZE = 75  # the smallest side that leaves one position after mixed_7a
MIN_AUX_IMAGE_SIZE = 299  # the smallest side whose 17x17 map feeds the auxiliary head's 5x5 window
NUM_FEATURES = 1536
BLOCKS = (10, 20, 9)  # repeats of block35, block17 and block8


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
        Raises ValueError for a side under 75 px (299 px where the auxiliary head runs). PyTorch
        2.14 convolves wrongly in bfloat16 on CPUs with AMX what is under 107 px wide and higher.
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

    def compile_regions(self) -> None:
        """torch.compile each layer and block by itself, at its next call.

        Repeats of a block share one result, so it takes a fraction of the time that the whole
        network would; the next process finds it in the user's cache.
        """
        cache = user_cache.folder("inductor")
        if cache is not None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
        # Seven kinds of blocks and as many of layers, in training and in evaluation.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for child in self.children():
            for region in child if isinstance(child, nn.Sequential) else [child]:
                if isinstance(region, Block | ConvNormAct | AuxHead):
                    region.compile()

    def _run(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        """The blocks in order; with gradient checkpointing each keeps only its input.

        In inference each writes over what the one before has made, if nobody else can see that.
        """
        if fused.infers(x) and fused.is_unwatched(blocks) and all(map(_is_private, blocks)):
            for i, block in enumerate(blocks):
                x = block(x, in_place=i > 0)
            return x
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


def _is_private(block: nn.Module) -> bool:
    """Whether nobody but the block itself sees what it is given and what it makes of it."""
    return type(block) is Block and all(map(fused.is_unwatched, (block, block.heads)))


@contextmanager
def _held_statistics(block: Block) -> Iterator[None]:
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
