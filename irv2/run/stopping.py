"""Stopping gracefully: a signal becomes a request that the loop grants between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from irv2.training import distributed

Item = TypeVar("Item")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, schedulers, Slurm's warning
GRACE_S = 2.0  # torchrun forwards what the process got itself; the echo is no second request
REQUEUE = os.EX_TEMPFAIL  # 75: nothing is wrong, start the same command again


class Stopped(Exception):
    """Work was left unfinished because of a signal."""


class StopRequest:
    """Remembers the first of `SIGNALS` in a `with` block; a second one ends the process at once.

    Python runs handlers only between two of its own instructions, which a hanging collective never
    reaches. So a thread, which learns of each signal as it arrives, acts on the second.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        arrivals, self._arrived = os.pipe()
        os.set_blocking(self._arrived, False)
        self._fd_before = signal.set_wakeup_fd(self._arrived, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(arrivals,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._arrived)  # which ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, as a shell reports it; `REQUEUE` after any other signal."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else REQUEUE


def _watch(arrivals: int) -> None:
    """Read signals' numbers from a pipe until it is closed; end the process at a later one."""
    first_at = None
    with open(arrivals, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in SIGNALS:
                continue
            if first_at is None:
                first_at = time.monotonic()
                if number[0] == signal.SIGINT and distributed.place().rank == 0:
                    os.write(2, b"\nfinishing this step; Ctrl-C again leaves at once\n")
            elif time.monotonic() - first_at > GRACE_S:
                os._exit(128 + number[0])


def until_stopped(
    items: Iterator[Item], rounds: int, stopping: Callable[[], bool]
) -> Iterator[Item]:
    """Yield the items as long as `stopping` is false, then raise Stopped.

    `stopping` is called once a round: ranks that vote in it must agree on `rounds`, the most
    items that any of them has.
    """
    for _ in range(rounds):
        if stopping():
            raise Stopped
        item = next(items, None)
        if item is not None:
            yield item
