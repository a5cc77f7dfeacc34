"""Loader processes: none outlives its program, and none dies or hangs unnoticed."""

from __future__ import annotations

import atexit
import ctypes
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from typing import TypeVar

from torch.utils.data import DataLoader

from data import limits
from data.errors import WorkerError, enumeration

Made = TypeVar("Made")  # a batch as the loader's processes make it

RESCUE_S = 5  # torch reports most time-outs itself, and by then has
TIMEOUT_S = 600.0  # as run.timeout_s, where there is no run
SLOW_S = 60.0  # of waiting, after which a line says for what
LONGEST_NAME = 1024  # bytes of a name in hand


@dataclass(frozen=True)
class Workers:
    """Number of loader processes of a rank, and how long it waits for them."""

    count: int | None = None  # 0: the calling process itself; None: `default_workers()`
    timeout_s: float = 0.0  # longest wait for a batch; 0: for ever


class InHand:
    """Names of the files that processes have in hand, and since when, in memory they share."""

    def __init__(self, processes: int) -> None:
        self._names = RawArray("c", max(1, processes) * LONGEST_NAME)
        self._since = RawArray("d", max(1, processes))  # by the machine's clock; 0: nothing
        self.for_too_long = False  # of the process that waits for them

    def note(self, process: int, name: str) -> None:
        """Note what a process has in hand from now on; nothing for an empty name."""
        begin = process * LONGEST_NAME
        encoded = os.fsencode(name)[: LONGEST_NAME - 1]
        self._names[begin : begin + len(encoded) + 1] = encoded + b"\0"
        self._since[process] = time.monotonic() if name else 0.0

    def names(self, seconds: float = 0.0) -> list[str]:
        """List what processes have had in hand for so long."""
        latest = time.monotonic() - seconds
        held = [number for number, since in enumerate(self._since) if 0 < since <= latest]
        starts = (number * LONGEST_NAME for number in held)
        return [
            os.fsdecode(self._names[start : start + LONGEST_NAME].split(b"\0")[0])
            for start in starts
        ]


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def default_workers() -> int:
    """Return this rank's share of the usable cores, from 1 to 8."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, usable_cores() // ranks_here))


def start_worker(_worker: int) -> None:
    """Make a loader process ready; it calls this first."""
    # Ctrl-C, torchrun and Slurm signal workers too; the loop needs them until it has stopped.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent has gone, however that came about.

    torch's own look-out sees it after 5 s, and never in a worker that hangs. Does nothing where the
    C library has no prctl (Linux has).
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    is_child_of_main = multiprocessing.get_start_method() != "forkserver"
    if is_child_of_main and os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)  # it had gone before the kernel was asked


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn what torch raises for dead or hanging loader processes into a WorkerError of one line.

    `load` does so itself, but torch reports a death wherever the main thread happens to be (its
    handler of SIGCHLD raises), so that a program wants this around its whole work.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
        if reason.startswith("Pin memory thread exited"):  # it was fetching from one that died
            reason = "DataLoader worker exited unexpectedly"
        if reason.startswith("DataLoader worker"):
            raise WorkerError(
                f"{reason}; most often memory has run out, or shared memory (/dev/shm): make more "
                "available, or lower data.workers"
            ) from None
        if reason.startswith("Too many open files"):
            raise WorkerError(
                f"{reason}: raise their limit (ulimit -n), or lower data.workers"
            ) from None
        raise


def batches_of(loader: DataLoader[Made], in_hand: InHand) -> Iterator[Made]:
    """Yield the loader's batches. However this ends, no worker is left behind.

    in_hand: what its workers note. Raises WorkerError for a batch that takes too long, and where
    the system does not let as many processes work.
    """
    others = multiprocessing.active_children()
    if loader.num_workers:
        # Training needs as many again in its evaluations, and must not end at the first of them.
        limits.check_open_files(loader.num_workers, 0 if others else loader.num_workers)
        limits.shorten_sockets()
    with all_or_none():
        iterator = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    end_workers = partial(end, workers)
    atexit.register(end_workers)  # a traceback may keep this generator open until then
    try:
        while (batch := next_batch(iterator, workers, loader.timeout, in_hand)) is not None:
            yield batch
    except GeneratorExit:
        del iterator  # torch's own end: workers finish what they do
        raise
    except RuntimeError:  # of torch's handler of SIGCHLD, which cuts in once for each worker
        if in_hand.for_too_long:
            raise hanging(loader.timeout, in_hand.names()) from None
        raise
    finally:
        end_workers()
        atexit.unregister(end_workers)


def next_batch(
    iterator: Iterator[Made], workers: list[BaseProcess], timeout_s: float, in_hand: InHand
) -> Made | None:
    """Return the next batch, None after the last; a line says what a slow one waits for.

    workers: none where this process makes it itself, which nothing can end. Raises WorkerError for
    one that takes longer than `timeout_s`, and RuntimeError, in torch's words, for what torch
    overlooks: a batch's memory is fetched from its worker, which may be about to die, or hang.
    """
    arrived = threading.Event()

    def watch() -> None:
        limit = timeout_s + RESCUE_S if workers else math.inf
        first = min(SLOW_S, limit)
        if arrived.wait(first):
            return
        if first < limit:
            say_waiting(first, in_hand.names())
        if workers and not arrived.wait(limit - first):
            in_hand.for_too_long = True
            for worker in workers:
                worker.kill()

    if timeout_s or not workers:
        threading.Thread(target=watch, daemon=True).start()
    try:
        return next(iterator, None)
    except (OSError, EOFError, RuntimeError) as error:
        if in_hand.for_too_long or str(error).startswith("DataLoader timed out"):
            raise hanging(timeout_s, in_hand.names()) from None
        if isinstance(error, RuntimeError):
            raise
        dead = wait([worker.sentinel for worker in workers], timeout=1)
        pids = [worker.pid for worker in workers if worker.sentinel in dead]
        if not pids:
            raise
        raise RuntimeError(f"DataLoader worker (pid {pids[0]}) exited unexpectedly") from None
    finally:
        arrived.set()


def say_waiting(seconds: float, names: list[str]) -> None:
    """Say in a line that processes have had these files in hand for so long."""
    what = enumeration(names) or "a process that has none in hand"
    logging.getLogger(__name__).warning("waiting since %g s for %s", seconds, what)


def hanging(timeout_s: float, names: list[str]) -> WorkerError:
    """Make the error for processes that have had these files in hand for too long."""
    at = f" at {enumeration(names)}" if names else ""
    return WorkerError(
        f"timed out after {timeout_s:g} seconds{at}; the storage of the images hangs, or the time "
        "allowed (of a run: run.timeout_s) is too short for it"
    )


@contextmanager
def all_or_none() -> Iterator[None]:
    """Start processes: if one cannot be, those before it are ended, as the program could not end.

    Raises WorkerError for what the system refuses.
    """
    others = multiprocessing.active_children()
    try:
        yield
    except BaseException as error:
        end([child for child in multiprocessing.active_children() if child not in others])
        if isinstance(error, OSError) or "start new thread" in str(error):
            with quiet_finalizers():  # torch's half-made iterator would complain of itself
                traceback.clear_frames(error.__traceback__)
            raise WorkerError(
                f"not all worker processes could be started ({error}): raise the limit that this "
                f"is about (ulimit -n: open files, -u: processes), or lower {limits.WORKERS}"
            ) from None
        raise


@contextmanager
def quiet_finalizers() -> Iterator[None]:
    """Print nothing of errors in finalizers that run meanwhile."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def end(workers: list[BaseProcess]) -> None:
    """Kill loader processes: they ignore SIGTERM, and Python waits for them when it exits."""
    for worker in (*workers, *workers):  # again, where torch's handler of SIGCHLD cut in, once
        with suppress(RuntimeError):
            worker.kill()
            worker.join(timeout=5)
