"""torch.compile for functions and parts of a network; what fails to compile runs uncompiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch._functorch.config as autograd_config
from torch import nn

PACE_S = 5.0  # between two lines of progress
BACKWARD = "force_non_lazy_backward_lowering"  # compile backward with forward; not in all versions


def compile_each(
    regions: list[nn.Module],
    say: Callable[[str], None] | None = None,
    backend: str | Callable[..., Callable] = "inductor",
) -> None:
    """torch.compile modules at their next call, each for the one size of images that it meets.

    Equal parts share one result. say: takes a line of progress now and then.
    """
    # Seven kinds of blocks and as many of layers, in training and in evaluation.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Equal blocks see maps of one size; a layer without parts, such as a maximum, of its own.
    kinds = len({repr(region) if list(region.children()) else id(region) for region in regions})
    compiler = _Compiler(backend, kinds, say or logging.getLogger(__name__).info)
    for region in regions:
        region.compile(backend=compiler, dynamic=False)  # else a second size is symbolic


@cache
def compiled(
    function: Callable[..., Any], backend: str | Callable[..., Callable] = "inductor"
) -> Callable[..., Any]:
    """torch.compile a small function, once; from its second size on for any."""
    compiler = _Compiler(backend, 0, logging.getLogger(__name__).warning)
    return torch.compile(function, backend=compiler)


class _Compiler:
    """A backend that reports progress, and leaves uncompiled what another fails at."""

    def __init__(
        self, backend: str | Callable[..., Callable], kinds: int, say: Callable[[str], None]
    ) -> None:
        named = isinstance(backend, str)
        self._backend = torch._dynamo.lookup_backend(backend) if named else backend
        self._kinds, self._say = kinds, say
        self._graphs, self._said_at, self._has_failed = 0, -PACE_S, False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        if self._kinds and time.monotonic() - self._said_at >= PACE_S:
            number = self._graphs % self._kinds + 1  # evaluation has as many once more
            self._say(f"compiling {number} of {self._kinds} regions, once per machine and version")
            self._said_at = time.monotonic()
        self._graphs += 1
        try:
            with _backward_too():
                return self._backend(graph, inputs)
        except Exception as error:  # of whichever part of a compiler
            if not self._has_failed:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                self._say(f"a part could not be compiled and runs uncompiled: {reason}")
            self._has_failed = True
            return graph


def _backward_too() -> AbstractContextManager:
    """Have the backward compiled beside the forward, where its failure can be met, too."""
    if not hasattr(autograd_config, BACKWARD):
        return nullcontext()
    return autograd_config.patch({BACKWARD: True})
