"""Stopping politely: a signal becomes a wish that the loop grants between two steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

Item = TypeVar("Item")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, schedulers, Slurm's warning
GRACE_S = 2.0  # torchrun passes on what the process got itself; the echo is not a second wish
REQUEUE = os.EX_TEMPFAIL  # 75: nothing is wrong, start the same command again


class Stopped(Exception):
    """Work is left unfinished because a signal asked for it."""


class StopRequest:
    """In a `with` block: remembers the first of `SIGNALS`; a second one leaves at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked_at = 0.0

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
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
        elif now - self._asked_at > GRACE_S:
            os._exit(128 + number)

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, as a shell reports it; `REQUEUE` after any other signal."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else REQUEUE


def until_stopped(
    items: Iterator[Item], rounds: int, stopping: Callable[[], bool]
) -> Iterator[Item]:
    """The items, as long as `stopping` is false; then raises Stopped.

    `stopping` is called once a round: ranks that vote in it must agree on `rounds`, the most
    items that any of them has.
    """
    for _ in range(rounds):
        if stopping():
            raise Stopped
        item = next(items, None)
        if item is not None:
            yield item
