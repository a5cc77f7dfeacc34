"""Loader processes: that none outlives its program, and none that died or hangs goes unnoticed."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from torch.utils.data import DataLoader

from data.sources import DataError

Made = TypeVar("Made")  # what the loader's processes make

RESCUE_S = 5  # torch tells of most time-outs itself, and by then has


class WorkerError(DataError):
    """A loader process died or gives nothing any more; only the rank that met it knows."""


@dataclass(frozen=True)
class Workers:
    """Loader processes."""

    count: int | None = None  # 0: the calling process itself; None: `default_workers()`
    timeout_s: float = 0.0  # longest wait for a batch; 0: for ever


def default_workers() -> int:
    """This rank's share of the cores the process may use, from 1 to 8."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks_here))


def start_worker(_worker: int) -> None:
    """What each loader process does first."""
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
    """Raise WorkerError, one line, for what torch says of dead or hanging loader processes.

    `load` does so itself, but torch tells of a death wherever the main thread happens to be (its
    handler of SIGCHLD raises), so that a program wants this around its whole work.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition(". ")[0]
        if said.startswith("Pin memory thread exited"):  # it was fetching from one that died
            said = "DataLoader worker exited unexpectedly"
        if said.startswith("DataLoader worker"):
            raise WorkerError(
                f"{said}; most often memory has run out, or shared memory (/dev/shm): make more "
                "available, or lower data.workers"
            ) from None
        if said.startswith("DataLoader timed out"):
            raise WorkerError(
                f"{said}; the storage of the images hangs, or run.timeout_s is too short for it"
            ) from None
        raise


def batches_of(loader: DataLoader[Made]) -> Iterator[Made]:
    """The loader's batches. However this ends, no worker is left behind."""
    others = multiprocessing.active_children()
    iterator = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    end_workers = partial(end, workers)
    atexit.register(end_workers)  # a traceback may keep this generator open until then
    try:
        while (batch := next_batch(iterator, workers, loader.timeout)) is not None:
            yield batch
    except GeneratorExit:
        del iterator  # torch's own end: workers finish what they do
        raise
    finally:
        end_workers()
        atexit.unregister(end_workers)


def next_batch(
    iterator: Iterator[Made], workers: list[BaseProcess], timeout_s: float
) -> Made | None:
    """The next batch, None after the last. Raises RuntimeError, in torch's words, for what torch
    overlooks: a batch's memory is fetched from its worker, which may be about to die, or hang."""
    hung = threading.Event()

    def cut_off() -> None:
        hung.set()
        for worker in workers:
            worker.kill()

    alarm = threading.Timer(timeout_s + RESCUE_S, cut_off)
    if timeout_s and workers:
        alarm.start()
    try:
        return next(iterator, None)
    except (OSError, EOFError, RuntimeError) as error:
        if hung.is_set():
            raise RuntimeError(f"DataLoader timed out after {timeout_s:g} seconds") from None
        if isinstance(error, RuntimeError):
            raise
        dead = wait([worker.sentinel for worker in workers], timeout=1)
        pids = [worker.pid for worker in workers if worker.sentinel in dead]
        if not pids:
            raise
        raise RuntimeError(f"DataLoader worker (pid {pids[0]}) exited unexpectedly") from None
    finally:
        alarm.cancel()


def end(workers: list[BaseProcess]) -> None:
    """Kill loader processes: they ignore SIGTERM, and Python waits for them when it exits."""
    for worker in (*workers, *workers):  # again, where torch's handler of SIGCHLD cut in, once
        with suppress(RuntimeError):
            worker.kill()
            worker.join(timeout=5)
