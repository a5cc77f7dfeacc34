"""Work recorded as CUDA graphs, which a GPU runs without waiting for its host.

The work is functions of tensors: a forward and backward of a micro-batch, the update, the forward
of an evaluation. Whatever changes from step to step - images, labels, learning rates, the average's
share - comes in as a tensor; dropout's seed is the generator's, which a graph asks at each replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from data.errors import UserError
from irv2.training.distributed import World

Mode = Literal[False, "regions", "graph"]  # of train.compile
Run = Callable[..., Any]  # a function and its arguments -> its outputs
Outputs = Tensor | tuple[Tensor, ...]
WARM_UP = 3  # plain calls, in which kernels are compiled and chosen and memory is laid out


class GraphError(UserError):
    """A step cannot be recorded."""


def plainly(function: Callable[..., Outputs], *arguments: Any) -> Outputs:
    """Call a function."""
    return function(*arguments)


def chosen(asked: Mode, precision: str, world: World, kind: str = "rmsprop_tf") -> tuple[bool, Run]:
    """Return whether to compile, and what a step's functions are called by: `StepOptions`' fields.

    Says it where the step cannot be recorded.
    """
    mode = mode_here(asked, precision, world, kind)
    return bool(mode), Recorder(CudaGraphs()) if mode == "graph" else plainly


def mode_here(asked: Mode, precision: str, world: World, kind: str) -> Mode:
    """Return how to compile with this optimizer in this world; says so if not as asked."""
    if asked != "graph":
        return asked
    if world.device.type != "cuda":
        world.say("train.compile=graph: needs a GPU; here the step runs uncompiled")
        return False
    obstacle = None
    if precision == "fp16":
        obstacle = "fp16's loss scaler asks the host about every step"
    elif kind != "rmsprop_tf":
        obstacle = f"with {kind} the host decides whether it was good"
    if obstacle is not None:
        world.say(f"train.compile=graph: the step is not recorded, {obstacle}; regions it is")
        return "regions"
    return asked


class Graphs(Protocol):
    """A device that can record work.

    All that is recorded shares one memory. That is safe in any order of replays, one at a time: no
    graph reads what another has left there, and outputs are copied before the next replay.
    """

    def run(self, work: Callable[[], Outputs]) -> Outputs:
        """Do the work as it will be recorded, but at once."""

    def record(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record the work without doing it; returns what does it, and the places of its outputs."""


class CudaGraphs:
    """CUDA's: one stream and one pool of memory for all graphs, which never run side by side."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], Outputs]) -> Outputs:
        """Do the work on the stream that records it: autograd remembers streams."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def record(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record the work. Raises RuntimeError if it does anything that a graph cannot."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # The loader and a save under way use the device from threads of their own.
        recording = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        with torch.cuda.stream(stream), recording:  # an error in the second leaves its stream
            outputs = work()
        return graph.replay, outputs


class Recorded(NamedTuple):
    """A function's graph, with the places of its arguments and outputs."""

    replay: Callable[[], None]
    arguments: list[Any]
    outputs: Outputs

    def __call__(self, *arguments: Any) -> Outputs:
        for place, argument in zip(self.arguments, arguments, strict=True):
            if isinstance(argument, Tensor):
                place.copy_(argument)
        self.replay()
        if isinstance(self.outputs, Tensor):
            return self.outputs.clone()
        return tuple(output.clone() for output in self.outputs)


class Recorder:
    """Calls functions, plainly at first; then records each once, and replays it from then on.

    Anew for other shapes of a function's tensors, and for other values of its remaining arguments.
    Tensors that a function finds elsewhere, as a model's, stay where they are.
    """

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._calls: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, Recorded] = {}

    def __call__(self, function: Callable[..., Outputs], *arguments: Any) -> Outputs:
        """Call the function, or replay it. Raises GraphError if it cannot be recorded."""
        call = function, *map(_form, arguments)
        self._calls[call] += 1
        if self._calls[call] > WARM_UP and call not in self._recorded:
            self._recorded[call] = self._record(function, arguments)
        if call in self._recorded:
            return self._recorded[call](*arguments)
        return self._graphs.run(partial(function, *arguments))

    def _record(self, function: Callable[..., Outputs], arguments: tuple) -> Recorded:
        places = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        try:
            replay, outputs = self._graphs.record(partial(function, *places))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            # The device, its memory and its generators are in an unknown state from here on.
            raise GraphError(
                f"train.compile=graph: {function.__name__} cannot be recorded ({reason}); the same "
                "command with train.compile=regions trains on"
            ) from error
        return Recorded(replay, places, outputs)


def _form(argument: Any) -> Hashable:
    """Return what must be the same in a replay: of a tensor its form."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return argument
