"""Workers -> uint8 batches -> the network's input on the device."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.sources import ImageError, Source
from data.stream import Key
from data.transforms import Colour, decode, to_input

View = Callable[[Image.Image, int, int], tuple[np.ndarray, Colour | None]]
Sample = tuple[np.ndarray, Colour | None, int]


class Images(Dataset):
    """(epoch, index) -> (pixels, colour change, label); an unusable image is returned as its error.

    Returned, not raised: an exception that crosses from a worker arrives wrapped in a traceback.
    """

    def __init__(self, source: Source, view: View) -> None:
        self.source, self.view = source, view

    def __getitem__(self, key: Key) -> Sample | ImageError:
        epoch, index = key
        try:
            encoded, label = self.source.read(index)
            image = decode(encoded, self.source.name(index))
        except ImageError as error:
            return error
        pixels, colour = self.view(image, epoch, index)
        return pixels, colour, label


@dataclass(frozen=True)
class WorkerBatch:
    """What a worker makes: uint8 [B, H, W, 3], colour changes [B, 3] or None, int64 [B]."""

    images: Tensor
    colours: Tensor | None
    labels: Tensor

    def pin_memory(self) -> WorkerBatch:
        """The same in page-locked memory; the DataLoader calls it by this name."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> WorkerBatch:
        """The same on a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> WorkerBatch:
        colours = None if self.colours is None else change(self.colours)
        return WorkerBatch(change(self.images), colours, change(self.labels))


def collate(samples: list[Sample | ImageError]) -> WorkerBatch | ImageError:
    """Samples -> one batch, or the first error among them."""
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    pixels, colours, labels = zip(*samples)
    return WorkerBatch(
        torch.from_numpy(np.stack(pixels)),
        None if colours[0] is None else torch.tensor(colours),
        torch.tensor(labels),
    )


def leave_signals_to_main(_worker: int) -> None:
    """A Ctrl-C reaches workers too, but the loop needs them until it has stopped in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def default_workers() -> int:
    """This rank's share of the cores the process may use, from 1 to 8."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks_here))


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
    workers: int | None,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the given keys, in that order: float32 [B, 3, H, W] and labels, on the device.

    `workers`: loader processes, 0 for none, None for `default_workers()`.
    Raises ImageError, naming the file, for an image that cannot be read or decoded.
    """
    mean = torch.tensor(normalisation.mean, device=device)
    std = torch.tensor(normalisation.std, device=device)
    loader = DataLoader(
        Images(source, view),
        batch_sampler=batches,
        num_workers=default_workers() if workers is None else workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )
    for batch in loader:
        if isinstance(batch, ImageError):
            raise batch
        batch = batch.to(device)
        yield to_input(batch.images, batch.colours, mean, std), batch.labels
