"""Blocks whose parallel 1x1 convolutions run as one: fewer and larger products, the same numbers.

Branches that begin with a 1x1 convolution of the block's input share one convolution, `heads`.
State dicts have the names of the plain block, in its order, and so do messages about missing
entries.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from irv2.network.blocks import Block, ConvNormAct

BRANCHES = ("branch0", "branch1", "branch2", "branch3")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_unwatched(module: nn.Module) -> bool:
    """True if a call of this module runs its class's `forward` and nothing else: no hooks."""
    own = vars(module)
    return (
        not any(own.get(hooks) for hooks in _HOOKS)
        and own.get("_compiled_call_impl") is None
        and "forward" not in own
        and not torch.nn.modules.module._has_any_global_hook()
    )


class MergedBlock(Block):
    """A block after `merge`.

    heads: the merged layer. merged: names of the branches that begin with a part of it; the layers
    after it keep their names (`branch1.1`). parts: the width of each part.
    """

    heads: ConvNormAct
    merged: tuple[str, ...]
    parts: tuple[int, ...]

    def branches(self, x: Tensor) -> list[Tensor]:
        inputs = dict(zip(self.merged, self.heads(x).split(self.parts, dim=1)))
        named = ((name, getattr(self, name)) for name in BRANCHES)
        return [branch(inputs.get(name, x)) for name, branch in named if branch is not None]

    def head_names(self) -> list[str]:
        """Name of each part's layer in the plain block: "branch0" if alone in its branch, else
        "branch1.0"."""
        return [name if len(getattr(self, name)) == 0 else f"{name}.0" for name in self.merged]

    def state_dict(
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        own = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        destination.update(self._divided(own, prefix, self._pieces))
        versions = self._divided(own._metadata, prefix, lambda value: [value] * len(self.parts))
        destination._metadata.update(versions)
        return destination

    def _divided(
        self, entries: dict[str, Any], prefix: str, divide: Callable[[Any], Sequence[Any]]
    ) -> dict[str, Any]:
        """Divide entries of `heads` among the branches; all in the plain block's order."""
        stem = f"{prefix}heads"
        divided = {key: divide(entries[key]) for key in entries if key.startswith(stem)}
        ordered = {}
        for branch in BRANCHES:
            if branch in self.merged:
                number = self.merged.index(branch)
                name = prefix + self.head_names()[number]
                ordered |= {name + key[len(stem) :]: v[number] for key, v in divided.items()}
            ordered |= {k: v for k, v in entries.items() if k.startswith(f"{prefix}{branch}.")}
        return ordered | {k: v for k, v in entries.items() if k not in divided}

    def _pieces(self, value: Tensor) -> Sequence[Tensor]:
        """A tensor of the merged layer -> the part of each branch; a counter is shared."""
        return [value] * len(self.parts) if value.ndim == 0 else value.split(self.parts)

    def _load_from_state_dict(
        self, state: dict[str, Tensor], prefix: str, metadata: dict, strict: bool, *outcome: list
    ) -> None:
        missing, _unexpected, errors = outcome
        for key, own in self.heads.state_dict().items():
            names = [f"{prefix}{name}.{key}" for name in self.head_names()]
            state[f"{prefix}heads.{key}"] = self._joined(own, names, state, missing, errors)
        super()._load_from_state_dict(state, prefix, metadata, strict, *outcome)

    def _joined(
        self,
        own: Tensor,
        names: list[str],
        state: dict[str, Tensor],
        missing: list[str],
        errors: list[str],
    ) -> Tensor:
        """Remove the branches' entries from a state dict and join them to a tensor like `own`,
        whose parts replace entries that are missing or do not fit."""
        pieces = list(self._pieces(own))
        for i, name in enumerate(names):
            given = state.pop(name, None)
            if given is not None and given.shape == pieces[i].shape:
                pieces[i] = given
            elif given is not None:
                shapes = f"{tuple(given.shape)} in the file, {tuple(pieces[i].shape)} here"
                errors.append(f"size mismatch for {name}: {shapes}")
            elif own.ndim > 0:  # files may lack counters, which torch accepts, too
                missing.append(name)
        if len({piece.device for piece in pieces}) > 1:  # some loaded, some our own
            pieces = [piece.to(own.device) for piece in pieces]
        return pieces[0] if own.ndim == 0 else torch.cat(pieces)


def merge(block: Block) -> None:
    """Make a Block a MergedBlock, in place.

    A block whose heads are no longer alike, or are observed by hooks, stays as it is.
    """
    heads = dict(_heads(block))
    is_observed = not all(is_unwatched(getattr(block, name)) for name in heads)
    if len(heads) < 2 or is_observed or not _are_alike(list(heads.values())):
        return
    block.__class__ = MergedBlock
    block.merged = tuple(heads)
    block.parts = tuple(head.conv.out_channels for head in heads.values())
    for name in heads:
        branch = getattr(block, name)
        rest = list(branch.named_children())[1:] if isinstance(branch, nn.Sequential) else []
        setattr(block, name, nn.Sequential(OrderedDict(rest)).train(branch.training))
    # In front, so that parameters come in the order of their use.
    block._modules = {"heads": _join(list(heads.values())), **block._modules}


def split(block: MergedBlock) -> None:
    """Undo `merge`."""
    for name, layer in zip(block.merged, _cut(block.heads, block.parts)):
        rest = getattr(block, name)
        whole = nn.Sequential(layer, *rest).train(rest.training) if len(rest) else layer
        setattr(block, name, whole)
    del block.heads, block.merged, block.parts
    block.__class__ = Block


def _heads(block: Block) -> Iterator[tuple[str, ConvNormAct]]:
    """(branch, its first layer) of the branches that begin with a 1x1 convolution."""
    for name in BRANCHES:
        branch = getattr(block, name)
        first = branch[0] if isinstance(branch, nn.Sequential) else branch
        if type(first) is ConvNormAct and first.conv.kernel_size == first.conv.stride == (1, 1):
            yield name, first


def _are_alike(heads: list[ConvNormAct]) -> bool:
    """True if one layer can do what all of these do."""
    kinds = {ConvNormAct, nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.ReLU}
    layers = [layer for head in heads for layer in head.modules()]
    known = all(type(layer) in kinds and is_unwatched(layer) for layer in layers)
    return known and len(set(map(_options, heads))) == 1


def _options(head: ConvNormAct) -> tuple:
    """Properties that layers must share to become one."""
    trained = tuple((name, p.requires_grad) for name, p in head.named_parameters())
    names = ("momentum", "eps", "training")
    return (type(head.bn), trained, *(getattr(head.bn, name, None) for name in names))


def _join(layers: list[ConvNormAct]) -> ConvNormAct:
    """One layer that computes the outputs of several, one after another."""
    states = [layer.state_dict() for layer in layers]
    values = {name: [state[name] for state in states] for name in states[0]}
    joined = {name: torch.cat(v) if v[0].ndim > 0 else v[0] for name, v in values.items()}
    return _with(layers[0], joined)


def _cut(layer: ConvNormAct, parts: tuple[int, ...]) -> list[ConvNormAct]:
    """Undo `_join`: return the layers that it joined."""
    states: list[dict[str, Tensor]] = [{} for _ in parts]
    for name, value in layer.state_dict().items():
        pieces = value.split(parts) if value.ndim > 0 else [value] * len(parts)
        for state, piece in zip(states, pieces):
            state[name] = piece.clone()
    return [_with(layer, state) for state in states]


def _with(layer: ConvNormAct, tensors: dict[str, Tensor]) -> ConvNormAct:
    """A copy of a layer with other parameters and buffers, and so perhaps another width."""
    made = copy.deepcopy(layer)
    for name, value in tensors.items():
        path, _, last = name.rpartition(".")
        owner = made.get_submodule(path)
        if last in owner._parameters:
            value = nn.Parameter(value, owner._parameters[last].requires_grad)
        setattr(owner, last, value)
    made.conv.out_channels = len(made.conv.weight)
    if isinstance(made.bn, nn.BatchNorm2d):
        made.bn.num_features = made.conv.out_channels
    return made
