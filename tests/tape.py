"""A stand-in for CUDA graphs on a CPU: records operations with the tensors they read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from irv2.training.graph import Outputs, Recorder
from irv2.training.state import TrainState

TO_THE_HOST = ("_local_scalar_dense", "nonzero")


class Tape(TorchDispatchMode):
    """Operations in order. Replayed, each reads the memory that it read and writes the memory that
    it wrote; a Python number is the one of the recording, as in a graph. What a graph may not do,
    tell the host a number, raises RuntimeError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split("::")[-1].split(".")[0] in TO_THE_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, output in self.operations:
                read = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
                new = func(*args, **kwargs)
                for place, value in zip(tree_leaves(output), tree_leaves(new)):
                    is_made_here = isinstance(place, Tensor) and id(place) not in read
                    if is_made_here and value.data_ptr() != place.data_ptr():
                        place.detach().copy_(value.detach())


class Tapes:
    """Records work on tapes, as graph.CudaGraphs does in graphs; `kept` lives before and after."""

    def __init__(self, kept: Callable[[], list[Tensor]]) -> None:
        self.tapes: list[Tape] = []
        self._kept = kept

    def run(self, work: Callable[[], Outputs]) -> Outputs:
        return work()

    def record(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        generator = torch.get_rng_state()
        before = [(tensor, tensor.clone()) for tensor in self._kept()]
        tape = Tape()
        try:
            with tape:
                outputs = work()
        finally:  # recording does nothing yet
            torch.set_rng_state(generator)
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
        self.tapes.append(tape)
        return tape.replay, outputs


def recorder(state: TrainState) -> Recorder:
    """Records the steps of a state that is laid out in buffers."""

    def kept() -> list[Tensor]:
        tensors = [t for part in state.tensors().values() for t in part.values()]
        return [*tensors, *(group.gradient for group in state.flat.groups)]

    return Recorder(Tapes(kept))
