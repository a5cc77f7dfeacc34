"""The form of the network that trains and infers fast, and the way back.

    model = accelerate(inception_resnet_v2())     # before .to(), an optimizer or a wrapper sees it
    fast = fold_batch_norm(model)                 # for inference alone
    plain(model)                                  # an ordinary module again

Parallel 1x1 convolutions become one (merged.py), ReLUs work in place, on CPUs operations are fused
(cpu/), and compiled for a GPU maxima have kernels of their own (pooling.py). Weights stay the same,
and so do the names and the order of state dicts.
"""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from irv2.network.blocks import Block, ConvNormAct
from irv2.network.merged import MergedBlock, merge, split
from irv2.network.pooling import FastMaxPool

try:  # the one place that knows of the folder cpu/, which may be missing
    from irv2.network.cpu import update as loops
    from irv2.network.cpu.modules import FUSED
except ImportError as error:
    if error.name != "irv2.network.cpu":  # something that the folder itself needs
        raise
    loops, FUSED = None, {}

FAST = {nn.MaxPool2d: FastMaxPool, **FUSED}
PLAIN = {fast: plain for plain, fast in FAST.items()}


def accelerate(model: nn.Module) -> nn.Module:
    """Give a network, or one of its blocks, its fast form, in place; returns it.

    Merged layers have new parameters, so do this before an optimizer is given any. Layers changed
    since the network was built - other norms, hooks, pruning - stay as they are, unmerged.
    """
    for module in list(model.modules()):
        if type(module) is Block:
            merge(module)
    _set_in_place(model, True)
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))
    return model


def plain(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place; returns the model, with the same weights in new parameters."""
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    _set_in_place(model, False)
    for module in list(model.modules()):
        if type(module) is MergedBlock:
            split(module)
    return model


def _set_in_place(model: nn.Module, in_place: bool) -> None:
    """Set whether ReLUs overwrite their input, which nothing but a backward hook would read."""
    for module in model.modules():
        if isinstance(module, Block | ConvNormAct) and isinstance(module.act, nn.ReLU):
            module.act.inplace = in_place


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose convolutions have a bias in place of batch norm.

    For inference alone: outputs equal those of `model.eval()` up to rounding, and the copy has no
    running statistics left to train with. `state_dict()` has timm's names with a `conv.bias` where
    `bn.*` was; only another folded network loads it, neither this network as built nor timm's.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return folded
