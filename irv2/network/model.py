"""Inception-ResNet-v2 (Szegedy et al., arXiv:1602.07261) with timm's parameter names.

An ordinary module, laid out as the paper draws it. `irv2.network.accelerate` has the form of it
that trains and infers fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irv2.network.blocks import (
    BLOCK8,
    BLOCK17,
    BLOCK35,
    MIXED_5B,
    MIXED_6A,
    MIXED_7A,
    Block,
    BlockSpec,
    Conv,
    ConvNormAct,
    NormOptions,
    Stack,
)
from irv2.network.pooling import FastMaxPool
from irv2.network.regions import compile_each

FIRST_CHANNELS, NUM_FEATURES = 32, 1536  # of the first layer and the last map, at width 1
BLOCKS = (10, 20, 9)  # repeats of block35, block17 and block8

# Children with weights, stage by stage from the classifier to the image.
STAGES = (
    ("classif", "aux"),
    ("conv2d_7b", "block8"),
    ("repeat_2",),
    ("mixed_7a",),
    ("repeat_1",),
    ("mixed_6a",),
    ("repeat",),
    ("mixed_5b",),
    ("conv2d_4a", "conv2d_3b", "conv2d_2b", "conv2d_2a", "conv2d_1a"),
)


def _classifier(in_features: int, num_classes: int) -> nn.Module:
    """Linear layer; without classes an identity, so that the network gives an embedding."""
    if num_classes == 0:
        return nn.Identity()
    linear = nn.Linear(in_features, num_classes)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class AuxHead(nn.Module):
    """TF-slim's auxiliary classifier on the 17x17 map (training only, loss weight 0.4)."""

    def __init__(self, num_classes: int, norm: NormOptions, width: float) -> None:
        super().__init__()
        conv_1b, conv_2a = (spec.widened(width) for spec in (Conv(128), Conv(768, 5)))
        self.num_features = conv_2a.out_channels
        self.conv_1b = ConvNormAct(round(width * BLOCK17.in_channels), conv_1b, norm)
        self.conv_2a = ConvNormAct(conv_1b.out_channels, conv_2a, norm)
        self.classif = _classifier(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 5, stride=3)
        x = self.conv_2a(self.conv_1b(x))
        return self.classif(x.mean(dim=(2, 3)))  # one position at 299 px, more on larger images


class InceptionResnetV2(nn.Module):
    """See `inception_resnet_v2`; attributes carry timm's names."""

    title = "Inception-ResNet-v2"
    timm_name, first_conv, classifier = "inception_resnet_v2", "conv2d_1a.conv", "classif"
    published = (BLOCKS, 1.0)  # blocks and width of the network that timm has

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        aux_logits: bool,
        norm: NormOptions,
        blocks: tuple[int, int, int],
        width: float,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.blocks = num_classes, in_chans, blocks
        self.width, self.num_features = width, round(width * NUM_FEATURES)

        def conv(in_channels: int, spec: Conv) -> ConvNormAct:
            return ConvNormAct(round(width * in_channels), spec.widened(width), norm)

        def block(spec: BlockSpec) -> Block:
            return Block(spec.widened(width), norm)

        def repeat(spec: BlockSpec, times: int) -> Stack:
            return Stack(*[block(spec) for _ in range(times)])

        self.conv2d_1a = ConvNormAct(
            in_chans, Conv(FIRST_CHANNELS, 3, stride=2).widened(width), norm
        )
        self.conv2d_2a = conv(32, Conv(32, 3))
        self.conv2d_2b = conv(32, Conv(64, 3, padding=1))
        self.maxpool_3a = nn.MaxPool2d(3, stride=2)
        self.conv2d_3b = conv(64, Conv(80))
        self.conv2d_4a = conv(80, Conv(192, 3))
        self.maxpool_5a = nn.MaxPool2d(3, stride=2)
        self.mixed_5b = block(MIXED_5B)
        self.repeat = repeat(BLOCK35, blocks[0])
        self.mixed_6a = block(MIXED_6A)
        self.repeat_1 = repeat(BLOCK17, blocks[1])
        self.aux = AuxHead(num_classes, norm, width) if aux_logits else None
        self.mixed_7a = block(MIXED_7A)
        self.repeat_2 = repeat(BLOCK8, blocks[2])
        self.block8 = block(BLOCK8._replace(scale=1.0, relu=False))
        self.conv2d_7b = conv(BLOCK8.in_channels, Conv(NUM_FEATURES))
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.head_drop = nn.Dropout(drop_rate)
        self.classif = _classifier(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, in_chans, H, W] float in [-1, 1] -> logits [B, num_classes].

        In training mode with the auxiliary head: (logits, auxiliary logits).
        Raises ValueError for a side under 75 px (299 px where the auxiliary head runs). In
        bfloat16 on CPUs with AMX, PyTorch 2.14 miscomputes images under 107 px wide but taller.
        """
        if self.aux is not None and self.training:
            _check_image_size(x, with_aux=True)
            x = self._to_17x17(x)
            aux_logits = self.aux(x)
            return self.forward_head(self._from_17x17(x)), aux_logits
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last map, [B, 1536, h, w] (8x8 of 299x299)."""
        _check_image_size(x, with_aux=False)
        return self._from_17x17(self._to_17x17(x))

    def _to_17x17(self, x: Tensor) -> Tensor:
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x)))
        x = self.mixed_5b(self.maxpool_5a(x))
        x = self.repeat(x)
        x = self.mixed_6a(x)
        return self.repeat_1(x)

    def _from_17x17(self, x: Tensor) -> Tensor:
        x = self.mixed_7a(x)
        x = self.repeat_2(x)
        return self.conv2d_7b(self.block8(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits, or with `pre_logits` the features [B, 1536] before them."""
        x = self.head_drop(self.global_pool(x).flatten(1))
        return x if pre_logits else self.classif(x)

    def get_classifier(self) -> nn.Module:
        """The layer that turns features into logits; an identity without classes."""
        return self.classif

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifiers, the auxiliary head's included, for other classes; 0: none."""
        self.num_classes = num_classes
        for owner in (self, self.aux):
            if owner is not None:
                near = next(owner.parameters())
                new = _classifier(owner.num_features, num_classes).to(near.device, near.dtype)
                owner.classif = new.train(owner.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Have each repeated block keep only its input, and run again in backward."""
        for stack in (self.repeat, self.repeat_1, self.repeat_2):
            stack.grad_checkpointing = enable

    def residual_blocks(self) -> list[Block]:
        """The repeated blocks, which gradient checkpointing runs again."""
        return [*self.repeat, *self.repeat_1, *self.repeat_2]

    def stages(self) -> list[tuple[str, ...]]:
        """Names of the children with weights, stage by stage from the classifier to the image."""
        children = dict(self.named_children())
        return [tuple(name for name in stage if name in children) for stage in STAGES]

    def compile_regions(
        self,
        say: Callable[[str], None] | None = None,
        backend: str | Callable[..., Callable] = "inductor",
    ) -> None:
        """torch.compile each layer and block by itself, at its next call, for the shapes it meets.

        Repeats of a block share one result, so it takes a fraction of the time that the whole
        network would; the next process finds it in the user's cache. say: takes lines of progress.
        """
        regions = [
            region
            for child in self.children()
            for region in (child if isinstance(child, nn.Sequential) else [child])
            if isinstance(region, Block | ConvNormAct | AuxHead | FastMaxPool)
        ]
        compile_each(regions, say, backend)


def _check_image_size(x: Tensor, with_aux: bool) -> None:
    """Raise ValueError if a map would become too small for the layer that reads it.

    75 px leave one position after mixed_7a; 299 px a 17x17 map, of which the auxiliary head's
    layers leave one.
    """
    height, width = x.shape[-2:]
    least = 299 if with_aux else 75
    if min(height, width) < least:
        head = " with its auxiliary head" if with_aux else ""
        raise ValueError(
            f"image of {height}x{width} px is too small: Inception-ResNet-v2{head} needs "
            f"at least {least} px on each side"
        )


torch.fx.wrap("_check_image_size")  # a symbolic trace has no sizes, so it keeps this as one call


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
    width: float = 1.0,
) -> InceptionResnetV2:
    """Inception-ResNet-v2 with Xavier-uniform weights: 55,843,464 parameters for 1000 classes.

    num_classes: 0 for the embedding of 1536 features in place of logits.
    aux_logits: TF-slim's auxiliary head, active in training only.
    bn_momentum: share of the new batch in the running statistics (TF-slim: 0.0003).
    bn_scale: learn batch norm's gamma; False keeps it at 1, as TF-slim does.
    grad_checkpointing: keep only each block's input and run the block again in backward.
    blocks: repeats of block35, block17 and block8; anything but (10, 20, 9) is another network.
    width: multiplies the number of channels of every layer, as in arXiv:1704.04861; anything but 1
    is another network. Raises ValueError if it is not a multiple of 1/16.
    """
    if width <= 0 or width * 16 % 1 != 0:  # every published number of channels is a multiple of 16
        raise ValueError(f"width {width} is not a multiple of 1/16")
    norm, blocks = NormOptions(bn_momentum, bn_eps, bn_scale), tuple(blocks)
    model = InceptionResnetV2(num_classes, in_chans, drop_rate, aux_logits, norm, blocks, width)
    model.set_grad_checkpointing(grad_checkpointing)
    return model
