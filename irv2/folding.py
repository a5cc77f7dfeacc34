"""Batch norm folded into the convolutions before it: the same outputs from fewer operations."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from irv2.blocks import ConvNormAct
from irv2.model import InceptionResnetV2


def fold_batch_norm(model: InceptionResnetV2) -> InceptionResnetV2:
    """A copy in eval mode whose convolutions have a bias in place of batch norm; `model` stays.

    For inference alone: outputs equal those of `model.eval()` up to rounding, and there are no
    running statistics left to train with. `state_dict()` has timm's names with a `conv.bias` where
    `bn.*` was; only another folded network loads it, neither this network as built nor timm's.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, ConvNormAct):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return folded
