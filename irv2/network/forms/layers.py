"""The network's layers in the order in which all of its authors create them, under timm's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from irv2.network.blocks import Block, ConvNormAct
from irv2.network.forms.base import State
from irv2.network.model import BLOCKS, inception_resnet_v2


class Layers(NamedTuple):
    """Names of layers, from the image to the classifier; a block's branches one after another."""

    units: list[str]  # convolutions with batch norm
    ends: list[str]  # convolutions at the end of residual blocks, with a bias

    def by_block(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Yield blocks, with the units of each branch; a layer of the stem is a block of one."""
        for block, units in groupby(self.units, lambda name: name.partition(".branch")[0]):
            branches = groupby(units, lambda name: re.match(r".*\.branch\d|.*", name)[0])
            yield block, [list(branch) for _, branch in branches]


@cache
def layers() -> Layers:
    """List the layers of the published network, its auxiliary head left out."""
    with torch.device("meta"):
        modules = dict(inception_resnet_v2(blocks=BLOCKS).named_modules())
    units = [name for name, module in modules.items() if isinstance(module, ConvNormAct)]
    blocks = [name for name, module in modules.items() if isinstance(module, Block)]
    return Layers(units, [f"{name}.conv2d" for name in blocks if modules[name].conv2d is not None])


def paired(ours: list[str], theirs: list[str]) -> dict[str, str]:
    """Pair layers in their order. Raises ValueError where one has more."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(theirs)} layers for {', '.join(ours[:2])} … ({len(ours)})")
    return dict(zip(ours, theirs))


def convolution(name: str, kernel: np.ndarray, bias: np.ndarray | None = None) -> State:
    """A TensorFlow kernel, [height, width, in, out], as PyTorch has it: of a unit, or with bias."""
    if bias is None:
        return {f"{name}.conv.weight": _tensor(kernel.transpose(3, 2, 0, 1))}
    return {f"{name}.weight": _tensor(kernel.transpose(3, 2, 0, 1)), f"{name}.bias": _tensor(bias)}


def linear(name: str, kernel: np.ndarray, bias: np.ndarray) -> State:
    """A TensorFlow matrix, [in, out], and its bias as PyTorch has them."""
    return {f"{name}.weight": _tensor(kernel.T), f"{name}.bias": _tensor(bias)}


def batch_norm(
    name: str, gamma: np.ndarray | None, beta: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> State:
    """Batch norm of a unit as PyTorch has it; TensorFlow's Inceptions have no gamma: it is 1."""
    gamma = np.ones_like(beta) if gamma is None else gamma
    values = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}
    counter = {f"{name}.bn.num_batches_tracked": torch.tensor(0)}
    return {f"{name}.bn.{key}": _tensor(value) for key, value in values.items()} | counter


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, order="C"))  # a copy that may be written to
