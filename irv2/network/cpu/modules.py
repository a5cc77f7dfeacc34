"""The network's modules with a forward of fused operations, where input and module allow them.

In all else each behaves like its plain class. Where a hook observes what a fused operation would
leave out, the plain operations run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from irv2.network.blocks import ConvNormAct, Stack
from irv2.network.cpu import fused
from irv2.network.merged import MergedBlock, is_unwatched


class FusedConvNormAct(ConvNormAct):
    """Batch norm and ReLU in one; once folded, convolution and ReLU in one."""

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """place: where in memory to put the result, from `fused.slots`."""
        if isinstance(self.bn, nn.Identity):
            if fused.infers(x) and _are_unwatched(self.conv, self.bn, self.act):
                return fused.conv_relu(x, self.conv)
        elif fused.trains(x, [self.bn]) and _are_unwatched(self.bn, self.act):
            return fused.norm_relu(self.conv(x), self.bn, (), (place,))[0]
        return super().forward(x)


class FusedBlock(MergedBlock):
    """A merged block; a residual one without copies for its concatenation and its addition."""

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        """in_place: in inference a folded block may write its result into x."""
        if self.conv2d is not None:
            if isinstance(self.heads.bn, nn.Identity):
                if fused.infers(x) and _are_unwatched(self.conv2d, self.act):
                    return self._infer(x, in_place)
            elif self._trains(x):
                return self._train(x)
        return super().forward(x)

    def _infer(self, x: Tensor, in_place: bool) -> Tensor:
        out = torch.cat(self.branches(x), dim=1)
        return fused.add_conv_relu(x, out, self.conv2d, self.scale, self.act is not None, in_place)

    def _trains(self, x: Tensor) -> bool:
        """True if `_train` can stand in for the plain forward."""
        return (
            fused.trains(x, (getattr(layer, "bn", None) for layer in self._layers()))
            and all(type(layer) is FusedConvNormAct for layer in self._layers())
            and _are_unwatched(*self.heads.modules(), *self._rest(), self.conv2d, self.act)
        )

    def _train(self, x: Tensor) -> Tensor:
        rest = list(self._rest())
        whole, places = fused.slots(x, self._widths())
        x, heads = fused.fork(x, self.heads.conv.weight)
        wanted = tuple(None if len(branch) else place for branch, place in zip(rest, places))
        outputs = list(fused.norm_relu(heads, self.heads.bn, self.parts, wanted))
        for i, branch in enumerate(rest):
            for layer in branch:
                is_last = layer is branch[-1]
                outputs[i] = layer(outputs[i], places[i] if is_last else None)
        joined = fused.join(whole, outputs)
        return fused.add_conv(x, joined, self.conv2d, self.scale, self.act is not None)

    def _layers(self) -> Iterator[nn.Module]:
        yield self.heads
        for branch in self._rest():
            yield from branch

    def _rest(self) -> Iterator[nn.Sequential]:
        """Yield the layers after the merged one, branch by branch."""
        return (getattr(self, name) for name in self.merged)

    def _widths(self) -> tuple[int, ...]:
        """Channels of each branch's output."""
        last = (branch[-1].conv.out_channels if len(branch) else None for branch in self._rest())
        return tuple(width or part for width, part in zip(last, self.parts))


class FusedStack(Stack):
    """Blocks that overwrite each other's results in inference, where no hook can observe that."""

    def forward(self, x: Tensor) -> Tensor:
        if not (fused.infers(x) and all(map(_is_private, self))):
            return super().forward(x)
        for i, block in enumerate(self):
            x = block(x, in_place=i > 0)
        return x


def _is_private(block: nn.Module) -> bool:
    """True if no hook can observe the block's input or output."""
    return type(block) is FusedBlock and _are_unwatched(block, block.heads)


def _are_unwatched(*modules: nn.Module | None) -> bool:
    return all(module is None or is_unwatched(module) for module in modules)


# Plain class -> the class that accelerate() puts in its place.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    ConvNormAct: FusedConvNormAct,
    MergedBlock: FusedBlock,
    Stack: FusedStack,
}
