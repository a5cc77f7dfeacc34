"""Workers -> uint8 batches -> the network's input on the device."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.sources import DataError, ImageError, Source
from data.stream import Key
from data.transforms import Colour, decode, to_input

MAX_REPLACEMENTS = 10  # a class of which as many cannot be decoded needs a person
RESCUE_S = 5  # torch tells of most time-outs itself, and by then has
REPLACEMENT = 2  # keeps these draws apart from a view's, seeded by (seed, epoch, index, VIEW)

View = Callable[[Image.Image, int, int], tuple[np.ndarray, Colour | None]]


class WorkerError(DataError):
    """A loader process died or gives nothing any more; only the rank that met it knows."""


class Replaced(NamedTuple):
    """An image that could not be used, and what stood in its place."""

    epoch: int
    index: int
    name: str
    reason: str
    replacement: int  # index of the image used


class Sample(NamedTuple):
    """One image as a worker makes it."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    colour: Colour | None
    label: int
    index: int  # as asked for
    replaced: Replaced | None
    checksum: int | None


class Images(Dataset):
    """(epoch, index) -> Sample; an unusable image is returned as its error.

    Returned, not raised: an exception that crosses from a worker arrives wrapped in a traceback.
    `replacement_seed`: of the draw of another image of the class; None replaces nothing.
    """

    def __init__(
        self, source: Source, view: View, replacement_seed: int | None, checksums: bool
    ) -> None:
        self.source, self.view = source, view
        self.replacement_seed, self.checksums = replacement_seed, checksums

    def __getitem__(self, key: Key) -> Sample | ImageError:
        epoch, index = key
        replaced = None
        try:
            image, label = self._open(index)
        except ImageError as error:
            if self.replacement_seed is None:
                return error
            try:
                image, label, replaced = self._replace(epoch, index, error)
            except ImageError as in_vain:
                return in_vain
        pixels, colour = self.view(image, epoch, index)  # the draws of the image asked for
        checksum = fingerprint(pixels, colour) if self.checksums else None
        return Sample(pixels, colour, label, index, replaced, checksum)

    def _open(self, index: int) -> tuple[Image.Image, int]:
        encoded, label = self.source.read(index)
        return decode(encoded, self.source.name(index)), label

    def _replace(
        self, epoch: int, index: int, why: ImageError
    ) -> tuple[Image.Image, int, Replaced]:
        """Another image of the class, its label, and what there is to report."""
        name = self.source.name(index)
        tried = replacements(self.source.members(index), (self.replacement_seed, epoch, index))
        for other in tried:
            with suppress(ImageError):
                image, label = self._open(other)
                reason = str(why).removeprefix(f"{name}: ")
                return image, label, Replaced(epoch, index, name, reason, other)
        raise ImageError(
            f"{why}, and none of the {len(tried)} other images of its class that were tried can "
            f"stand in for it: see to {os.path.dirname(name)}"
        )


def replacements(members: Sequence[int], key: tuple[int, int, int]) -> list[int]:
    """What to try in place of an image, `key` (seed, epoch, index): others of its `members`.

    In a random order, up to MAX_REPLACEMENTS, a function of the key alone: the same on any number
    of ranks and workers, another choice in each epoch.
    """
    itself = members.index(key[2])
    rng = np.random.default_rng((*key, REPLACEMENT))
    count = min(MAX_REPLACEMENTS, len(members) - 1)
    drawn = rng.choice(len(members) - 1, count, replace=False).tolist()
    return [members[place + (place >= itself)] for place in drawn]


def fingerprint(pixels: np.ndarray, colour: Colour | None) -> int:
    """CRC32 of uint8 pixels [H, W, 3] and the float32 colour change that goes with them."""
    checksum = zlib.crc32(np.ascontiguousarray(pixels))
    return checksum if colour is None else zlib.crc32(np.asarray(colour, "<f4"), checksum)


@dataclass(frozen=True)
class WorkerBatch:
    """What a worker makes: uint8 [B, H, W, 3], colour changes [B, 3] or None, int64 [B]; the rest
    as in `Batch`."""

    images: Tensor
    colours: Tensor | None
    labels: Tensor
    indices: list[int]
    replaced: list[Replaced]
    checksums: list[int]

    def pin_memory(self) -> WorkerBatch:
        """The same in page-locked memory; the DataLoader calls it by this name."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> WorkerBatch:
        """The same on a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> WorkerBatch:
        colours = None if self.colours is None else change(self.colours)
        return replace(
            self, images=change(self.images), colours=colours, labels=change(self.labels)
        )


class Batch(NamedTuple):
    """What the network gets, and what there is to tell about it."""

    images: Tensor  # float32 [B, 3, H, W], normalised, on the device
    labels: Tensor  # int64 [B], on the device
    indices: list[int]  # in the source, as asked for
    replaced: list[Replaced]  # those of the indices that could not be used
    checksums: list[int]  # `fingerprint` of each image; empty unless asked for


def collate(samples: list[Sample | ImageError]) -> WorkerBatch | ImageError:
    """Samples -> one batch, or the first error among them."""
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    pixels, colours, labels, indices, replaced, checksums = zip(*samples)
    return WorkerBatch(
        torch.from_numpy(np.stack(pixels)),
        None if colours[0] is None else torch.tensor(colours),
        torch.tensor(labels),
        list(indices),
        [report for report in replaced if report is not None],
        [checksum for checksum in checksums if checksum is not None],
    )


# ---------------------------------------------------------------------------------- workers


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
    # A Ctrl-C reaches workers too, but the loop needs them until it has stopped in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
        if said.startswith("DataLoader worker (pid"):
            raise WorkerError(
                f"{said}; most often memory has run out, or shared memory (/dev/shm): make more "
                "available, or lower data.workers"
            ) from None
        if said.startswith("DataLoader timed out"):
            raise WorkerError(
                f"{said}; the storage of the images hangs, or run.timeout_s is too short for it"
            ) from None
        raise


def batches_of(loader: DataLoader) -> Iterator[WorkerBatch | ImageError]:
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
    iterator: Iterator[WorkerBatch | ImageError], workers: list[BaseProcess], timeout_s: float
) -> WorkerBatch | ImageError | None:
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


# ---------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Normalisation:
    """Of each channel: subtracted from, then dividing, pixels in [0, 1]."""

    mean: list[float]
    std: list[float]


def load(
    source: Source,
    view: View,
    batches: Iterable[list[Key]],
    normalisation: Normalisation,
    workers: Workers,
    device: torch.device,
    replace_bad: bool = False,
    checksums: bool = False,
) -> Iterator[Batch]:
    """Batches of the given keys, in that order, on the device.

    `replace_bad`: another image of the class stands in for one that cannot be read or decoded,
    drawn from (view.seed, epoch, index); else, or if `MAX_REPLACEMENTS` cannot be used either,
    raises ImageError naming the file. Raises WorkerError for a worker that died or hangs.
    """
    mean = torch.tensor(normalisation.mean, device=device)
    std = torch.tensor(normalisation.std, device=device)
    count = default_workers() if workers.count is None else workers.count
    loader = DataLoader(
        Images(source, view, view.seed if replace_bad else None, checksums),
        batch_sampler=batches,
        num_workers=count,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        timeout=workers.timeout_s if count else 0,
        worker_init_fn=start_worker,
    )
    with worker_errors():
        for batch in batches_of(loader):
            if isinstance(batch, ImageError):
                raise batch
            batch = batch.to(device)
            images = to_input(batch.images, batch.colours, mean, std)
            yield Batch(images, batch.labels, batch.indices, batch.replaced, batch.checksums)
