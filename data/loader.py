"""Workers -> uint8 batches -> the network's input on the device."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.base import Source
from data.errors import DataError, ImageError
from data.shards.prefetch import Request, requests
from data.stream import REPLACEMENT, Key
from data.to_input import Colour, ToInput
from data.transforms import DecodeError, decode
from data.workers import (
    InHand,
    Workers,
    batches_of,
    default_workers,
    start_worker,
    worker_errors,
)

MAX_REPLACEMENTS = 10  # a class of which as many cannot be decoded needs a person


class View(Protocol):
    """A way to show an image: as one square, or as several."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output for one image: (side, side, 3), or (views, side, side, 3)."""

    def __call__(
        self, pixels: np.ndarray, epoch: int, index: int, out: np.ndarray
    ) -> tuple[bool, Colour | None]:
        """Put the view of uint8 [H, W, 3] into `out`, uint8 of `shape`.

        Returns whether it is still to be mirrored, and the colour change still to be applied.
        """


class Replaced(NamedTuple):
    """An image that could not be used, and what stood in its place."""

    epoch: int
    index: int
    name: str
    reason: str
    replacement: int  # index of the image used


@dataclass(frozen=True)
class WorkerBatch:
    """A batch as a worker makes it; what is not explained here is as in `Batch`.

    Only the pixels travel in shared memory: for each tensor there, two processes shake hands.
    """

    images: Tensor  # uint8 [B, H, W, 3]; with V views of each image, [B * V, H, W, 3]
    flips: np.ndarray  # bool, one for each of them
    colours: np.ndarray | None  # float32 [B, 3]
    labels: np.ndarray  # int64 [B]
    sizes: np.ndarray  # int32 [B, 2]
    keys: list[Key]
    replaced: list[Replaced] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)

    def pin_memory(self) -> WorkerBatch:
        """Copy the pixels into page-locked memory; the DataLoader calls this by its name."""
        return replace(self, images=self.images.pin_memory())


class Batch(NamedTuple):
    """Images and labels as the network takes them, and where they come from."""

    images: Tensor  # float32 [B or B * V, 3, H, W], normalised, on the device
    labels: Tensor  # int64 [B], on the device; mixed: float32 [B, C], shares of the classes
    sizes: np.ndarray  # int32 [B, 2], width and height before anything was done, px
    keys: list[Key]  # as requested
    replaced: list[Replaced]  # those of the keys that could not be used
    checksums: list[int]  # `fingerprint` of each image; empty unless asked for


class Images(Dataset):
    """Requests for batches -> batches, each image written where its batch keeps it.

    An error of the data is returned, not raised: an exception that crosses from a worker arrives
    wrapped in a traceback. `replacement_seed`: of the draw of another image of the class; None
    replaces nothing.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        replacement_seed: int | None,
        checksums: bool,
        workers: int = 0,
    ) -> None:
        self.source, self.view = source, view
        self.replacement_seed, self.checksums = replacement_seed, checksums
        self.in_hand = InHand(workers)

    def __getitems__(self, request: Request) -> WorkerBatch | DataError:
        """Make the batch of a request; the DataLoader calls this by its name."""
        self.source.fetch(request.soon)
        keys = request.keys
        images = torch.empty((len(keys), *self.view.shape), dtype=torch.uint8)
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        if worker is not None:
            images.share_memory_()  # while it is empty, so that no filled pages are copied
        labels, sizes, flips, colours = [], [], [], []
        replaced: list[Replaced] = []
        checksums: list[int] = []
        for (epoch, index), out in zip(keys, images.numpy()):
            self.in_hand.note(number, self.source.where(index))
            try:
                pixels, label = self._open(epoch, index, replaced)
            except DataError as error:
                return error
            flip, colour = self.view(pixels, epoch, index, out)  # drawn for the image asked for
            labels.append(label)
            sizes.append(pixels.shape[1::-1])
            flips.append(flip)
            colours.append(colour)
            if self.checksums:
                checksums.append(fingerprint(out, flip, colour))
        self.in_hand.note(number, "")
        images = images.flatten(0, -4)
        return WorkerBatch(
            images,
            np.repeat(flips, len(images) // len(keys)),
            None if colours[0] is None else np.array(colours, np.float32),
            np.array(labels),
            np.array(sizes, np.int32),
            keys,
            replaced,
            checksums,
        )

    def _open(self, epoch: int, index: int, replaced: list[Replaced]) -> tuple[np.ndarray, int]:
        """Read an image and its label, or a replacement, which is then added to `replaced`."""
        try:
            return read_image(self.source, index)
        except ImageError as error:
            if self.replacement_seed is None:
                raise
            why, name = error, self.source.name(index)
        tried = replacements(self.source.members(index), (self.replacement_seed, epoch, index))
        for other in tried:
            with suppress(ImageError):
                pixels, label = read_image(self.source, other)
                reason = str(why).removeprefix(f"{name}: ")
                replaced.append(Replaced(epoch, index, name, reason, other))
                return pixels, label
        raise ImageError(
            f"{why}, and none of the {len(tried)} other images of its class that were tried can "
            f"stand in for it: check {os.path.dirname(name)}"
        )


def read_image(source: Source, index: int) -> tuple[np.ndarray, int]:
    """Read an image: its RGB pixels, uint8 [H, W, 3], and label. Raises ImageError naming it."""
    encoded, label = source.read(index)
    try:
        return decode(encoded), label
    except DecodeError as error:
        raise ImageError(f"{source.name(index)}: {error}") from None


def replacements(members: Sequence[int], key: tuple[int, int, int]) -> list[int]:
    """Draw others of its `members` to try in place of an image; `key`: (seed, epoch, index).

    Up to MAX_REPLACEMENTS in a random order, a function of the key alone: the same on any number of
    ranks and workers, another choice in each epoch.
    """
    itself = members.index(key[2])
    rng = np.random.default_rng((*key, REPLACEMENT))
    count = min(MAX_REPLACEMENTS, len(members) - 1)
    drawn = rng.choice(len(members) - 1, count, replace=False).tolist()
    return [members[place + (place >= itself)] for place in drawn]


def fingerprint(pixels: np.ndarray, flip: bool, colour: Colour | None) -> int:
    """Compute the CRC-32 of uint8 pixels [H, W, 3] and of what is still to be done to them."""
    checksum = zlib.crc32(np.ascontiguousarray(pixels))
    return zlib.crc32(np.asarray([flip, *(colour or ())], "<f4"), checksum)


def load(
    source: Source,
    view: View,
    batches: Iterable[list[Key]],
    to_input: ToInput,
    workers: Workers,
    replace_bad: bool = False,
    checksums: bool = False,
) -> Iterator[Batch]:
    """Yield batches of the given keys, in that order, on the device of `to_input`.

    `replace_bad`: another image of the class stands in for one that cannot be read or decoded,
    drawn from (view.seed, epoch, index); else, or if `MAX_REPLACEMENTS` cannot be used either,
    raises ImageError naming the file. Raises StorageError for an object store that does not answer,
    WorkerError for a worker that died or hangs.
    """
    count = default_workers() if workers.count is None else workers.count
    # Compile what the view needs now: each worker forked later would have to.
    view(np.zeros((2, 2, 3), np.uint8), 0, 0, np.empty(view.shape, np.uint8))
    dataset = Images(source, view, view.seed if replace_bad else None, checksums, count)
    loader = DataLoader(
        dataset,
        batch_sampler=requests(announce(batches, source), source.fetches_ahead, max(1, count)),
        num_workers=count,
        collate_fn=_as_it_is,
        pin_memory=to_input.device.type == "cuda",
        timeout=workers.timeout_s if count else 0,
        worker_init_fn=start_worker,
    )
    to_device = ToDevice(to_input.device)
    with worker_errors():
        for batch in batches_of(loader, dataset.in_hand):
            if isinstance(batch, DataError):
                raise batch
            small = (batch.flips, batch.colours, batch.labels)
            arrays = (None if array is None else torch.from_numpy(array) for array in small)
            # The small ones first: the host waits for whatever is copied before them.
            flips, colours, labels, images = to_device(*arrays, batch.images)
            images = to_input(images, flips, colours)
            yield Batch(images, labels, batch.sizes, batch.keys, batch.replaced, batch.checksums)


def announce(batches: Iterable[list[Key]], source: Source) -> Iterator[list[Key]]:
    """Yield the batches, each announced to the source some batches before a worker reads it."""
    for keys in batches:
        source.will_read([index for _, index in keys])
        yield keys


def _as_it_is(batch: WorkerBatch | DataError) -> WorkerBatch | DataError:
    return batch


class ToDevice:
    """Copier from the host's memory to the device's, beside what the device is doing.

    On a GPU the copies have a stream of their own, so that they need not queue behind the step
    under way. The host waits for copies from memory that is not page-locked, and for nothing else.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Copy tensors to the device, for use on the current stream."""
        if self.stream is None:
            return list(tensors)
        with torch.cuda.stream(self.stream):
            there = [None if t is None else t.to(self.device, non_blocking=True) for t in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in there:
            if tensor is not None:  # its memory must not go to another copy while in use here
                tensor.record_stream(current)
        return there
