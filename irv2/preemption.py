"""Stopping politely: Ctrl-C and SIGTERM become a wish that the loop grants between two steps."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

GRACE_S = 1.0  # a terminal and torchrun both pass Ctrl-C on; the echo is not a second wish


class StopRequest:
    """In a `with` block: remembers the first SIGINT or SIGTERM; a later SIGINT leaves at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked_at = 0.0

    def __enter__(self) -> StopRequest:
        self._before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._asked_at = number, now
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nfinishing this step; Ctrl-C again leaves at once\n")
        elif number == signal.SIGINT and now - self._asked_at > GRACE_S:
            os._exit(128 + number)

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as a shell reports it; SIGTERM's where only a peer got one."""
        return 128 + (self.signal or signal.SIGTERM)
