"""Independent jobs on several processes, for preparing data."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from data.errors import DataError
from data.limits import check_open_files
from data.workers import all_or_none, end_with_parent

Result = TypeVar("Result")

_jobs: Sequence[Callable[[], Any]] = ()  # of a worker process
_stop: Event | None = None


class Cancelled(Exception):
    """Another job has failed, or the program was told to stop."""


def stop_if_cancelled() -> None:
    """Raise Cancelled if this job's result is no longer wanted; long jobs call it now and then."""
    if _stop is not None and _stop.is_set():
        raise Cancelled


def run_all(
    jobs: Sequence[Callable[[], Result]], workers: int, done: Callable[[Result], None]
) -> list[Result]:
    """Run jobs and return their results in order; `done` gets each as soon as it is there.

    The processes are forked, so that what the jobs hold is not copied. A job's error ends all the
    others and is raised; DataError also for a process that has died.
    """
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    count = max(1, min(workers, len(jobs)))
    check_open_files(count)
    pool = ProcessPoolExecutor(count, context, _start, (jobs, stop))
    try:
        with all_or_none():
            futures = [pool.submit(_run, number) for number in range(len(jobs))]
        for future in as_completed(futures):
            done(future.result())
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise DataError(
            "a worker process has died; most often memory has run out: make more available, then "
            "start again"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _start(jobs: Sequence[Callable[[], Any]], stop: Event) -> None:
    global _jobs, _stop
    _jobs, _stop = jobs, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears it, and sets `stop`
    end_with_parent()


def _run(number: int) -> Any:
    return _jobs[number]()
