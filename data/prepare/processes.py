"""Independent jobs on several processes, for preparing data."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from data.errors import DataError
from data.limits import check_open_files
from data.workers import (
    SLOW_S,
    TIMEOUT_S,
    InHand,
    all_or_none,
    end,
    end_with_parent,
    hanging,
    say_waiting,
)

Result = TypeVar("Result")

LOOK_S = 1.0  # from one look at the processes to the next

# Of a worker process
_jobs: Sequence[Callable[[], Any]] = ()
_stop: Event | None = None
_in_hand: InHand | None = None
_number = 0


class Cancelled(Exception):
    """Another job has failed, or the program is stopping."""


def take_in_hand(name: str) -> None:
    """Note what this job works on from now on; long jobs do so now and then.

    Raises Cancelled if the job's result is no longer wanted.
    """
    if _in_hand is not None:
        _in_hand.note(_number, name)
    if _stop is not None and _stop.is_set():
        raise Cancelled


def run_all(
    jobs: Sequence[Callable[[], Result]], workers: int, done: Callable[[Result], None]
) -> list[Result]:
    """Run jobs and return their results in order; `done` gets each as soon as it is there.

    The processes are forked, so that what the jobs hold is not copied. A job's error ends all the
    others and is raised; DataError also for a process that has died, or that has had a file in hand
    for TIMEOUT_S.
    """
    context = multiprocessing.get_context("fork")
    stop, started = context.Event(), context.Value("i", 0)
    count = max(1, min(workers, len(jobs)))
    check_open_files(count)
    in_hand = InHand(count)
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(count, context, _start, (jobs, stop, in_hand, started))
    try:
        with all_or_none():
            futures = [pool.submit(_run, number) for number in range(len(jobs))]
        _collect(futures, in_hand, done)
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise DataError(
            "a worker process has died; most often memory has run out: make more available, then "
            "start again"
        ) from None
    finally:
        stop.set()
        processes = [child for child in multiprocessing.active_children() if child not in others]
        alarm = threading.Timer(0 if in_hand.names(TIMEOUT_S) else SLOW_S, end, [processes])
        alarm.start()
        try:
            pool.shutdown(cancel_futures=True)
        finally:  # Ctrl-C may come just now
            alarm.cancel()


def _collect(
    futures: Sequence[Future[Result]], in_hand: InHand, done: Callable[[Result], None]
) -> None:
    """Give `done` each result. Raises WorkerError for a process that hangs."""
    finished: SimpleQueue[Future[Result]] = SimpleQueue()
    for future in futures:
        future.add_done_callback(finished.put)
    left, reported, at_work = len(futures), set[str](), time.monotonic()
    while left:
        with suppress(Empty):
            done(finished.get(timeout=LOOK_S).result())
            left, at_work = left - 1, time.monotonic()
        if in_hand.names():
            at_work = time.monotonic()
        names, idle_s = in_hand.names(TIMEOUT_S), time.monotonic() - at_work
        if names or idle_s > TIMEOUT_S:  # one that is stopped between two jobs may block them all
            raise hanging(TIMEOUT_S, names)
        if names := [name for name in in_hand.names(SLOW_S) if name not in reported]:
            reported.update(names)
            say_waiting(SLOW_S, names)


def _start(
    jobs: Sequence[Callable[[], Any]], stop: Event, in_hand: InHand, started: Synchronized
) -> None:
    global _jobs, _stop, _in_hand, _number
    _jobs, _stop, _in_hand = jobs, stop, in_hand
    with started.get_lock():
        _number = started.value
        started.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears it, and sets `stop`
    end_with_parent()


def _run(number: int) -> Any:
    try:
        take_in_hand(f"job {number + 1} of {len(_jobs)}")
        return _jobs[number]()
    finally:
        _in_hand.note(_number, "")
