"""A trace of some steps of a run, which Perfetto and TensorBoard's profiler open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch


class Profile:
    """Records the steps from `first` to `last` and writes RUN/profile/rank0.pt.trace.json.

    A trace that cannot be written is said and harms no run.
    """

    def __init__(
        self, steps: list[int] | None, directory: Path, rank: int, say: Callable[[str], None]
    ) -> None:
        """steps: [first, last], counted from 1; None: nothing is recorded."""
        self._first, self._last = steps or (0, 0)
        self._path = directory / "profile" / f"rank{rank}.pt.trace.json"
        self._say = say
        self._profiler: torch.profiler.profile | None = None

    def between_steps(self, step: int) -> None:
        """Begin or end, after step number `step`."""
        if self._profiler is None and self._first - 1 <= step < self._last:
            try:
                self._profiler = torch.profiler.profile()
                self._profiler.start()
            except RuntimeError as error:
                self._profiler, self._last = None, 0
                self._say(f"{self._path}: no trace ({error})")
        elif step >= self._last:
            self.close()

    def close(self) -> None:
        """Write what has been recorded, if anything."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        try:
            profiler.stop()
            self._path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            self._say(f"{self._path}: no trace ({error})")
            return
        self._say(f"profile: {self._path}, for https://ui.perfetto.dev or tensorboard")
