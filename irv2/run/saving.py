"""Save checkpoints while training continues.

Between two updates nothing changes the weights, their average or the optimizer's slots, so they
are copied beside the next forward and backward; only the few tensors that a forward itself
changes are copied at once. A thread then writes the copy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irv2.run import checkpoint
from irv2.run.checkpoint import Parts


class BackgroundSaver:
    """The checkpoints of one run, one save at a time.

        with BackgroundSaver(...) as saver:         leaving waits for the disk
            saver.begin(step, parts, meta)          returns at once
            ... forward, backward ...
            saver.wait_for_copy()                   before anything in `parts` changes

    A save that fails is reported and leaves older checkpoints alone; `saved_step` is the last one
    that succeeded. `stalled_s` adds up the seconds that the caller was kept waiting.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        saved_step: int,
        say: Callable[[str], None],
        changed_by_forward: tuple[str, ...] = (),
    ) -> None:
        """`changed_by_forward`: suffixes of the names of tensors that are copied at once."""
        self.directory, self.keep, self.say = directory, keep, say
        self.saved_step = saved_step
        self.stalled_s = 0.0
        self._changed_by_forward = changed_by_forward
        self._host: Parts = {}  # kept from save to save: fresh memory costs more than the copy
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.finish()

    def begin(self, step: int, parts: Parts, meta: dict[str, Any]) -> None:
        """Save the tensors of `parts` as they are now."""
        self.finish()
        started = time.perf_counter()
        later, stream = [], None
        for name, host, tensor in self._host_pairs(parts):
            if name.endswith(self._changed_by_forward):
                host.copy_(tensor, non_blocking=True)
            else:
                later.append((host, tensor))
            if tensor.is_cuda and stream is None:
                stream = torch.cuda.Stream(tensor.device)
        if stream is not None:  # after the update and the copies queued so far, beside what follows
            stream.wait_stream(torch.cuda.current_stream())
        self._copied.clear()
        work = (step, later, meta, stream)
        self._thread = threading.Thread(target=self._work, args=work, daemon=True)
        self._thread.start()
        self.stalled_s += time.perf_counter() - started

    def wait_for_copy(self) -> None:
        """Hold the caller until the tensors given to `begin` may change."""
        started = time.perf_counter()
        self._copied.wait()
        self.stalled_s += time.perf_counter() - started

    def finish(self) -> None:
        """Hold the caller until the save under way, if any, has ended."""
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.stalled_s += time.perf_counter() - started

    def _host_pairs(self, parts: Parts) -> Iterable[tuple[str, Tensor, Tensor]]:
        """Yield (name, the tensor's place on the host, the tensor)."""
        for part, tensors in parts.items():
            host = self._host.setdefault(part, {})
            for name, tensor in tensors.items():
                if name not in host:
                    host[name] = torch.empty(
                        tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                    )
                yield name, host[name], tensor

    def _work(
        self,
        step: int,
        pairs: list[tuple[Tensor, Tensor]],
        meta: dict[str, Any],
        stream: torch.cuda.Stream | None,
    ) -> None:
        try:
            try:
                with torch.cuda.stream(stream):
                    for host, tensor in pairs:
                        host.copy_(tensor, non_blocking=True)
                if stream is not None:
                    stream.synchronize()
            finally:
                self._copied.set()
            checkpoint.save(self.directory, step, self._host, meta)
        except Exception as error:  # whatever it is, training must go on
            self.say(f"NOT SAVED, training goes on: {str(error) or type(error).__name__}")
            return
        self.saved_step = step
        try:
            checkpoint.prune(self.directory, self.keep)
        except OSError as error:
            self.say(f"older checkpoints were not removed: {error}")
