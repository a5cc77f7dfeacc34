"""Sources of images that tell which they are, and batches of them."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from itertools import count

import torch
from PIL import Image

from data.base import Source
from data.loader import Batch, load
from data.to_input import ToInput
from data.transforms import EvalView
from data.workers import Workers

IDENTITY = ToInput([0.0] * 3, [1.0] * 3, torch.device("cpu"))
VIEW = EvalView(8, 1.0, "bilinear")


class Numbered(Source):
    """Image i is all of grey level i, its label 100 + i; those of `broken` hold no image."""

    classes = ("unused",)

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 256

    def read(self, index: int) -> tuple[bytes, int]:
        buffer = io.BytesIO(b"no image")
        if index not in self.broken:
            Image.new("L", (10, 10), index).save(buffer, "PNG")
        return buffer.getvalue(), 100 + index

    def name(self, index: int) -> str:
        return f"numbered/{index}.png"


class Hanging(Numbered):
    """Images from the twentieth on never arrive."""

    def read(self, index: int) -> tuple[bytes, int]:
        if index >= 20:
            time.sleep(600)
        return super().read(index)


class Slow(Numbered):
    """An image takes its time, so that a batch is taken as soon as it is there."""

    def read(self, index: int) -> tuple[bytes, int]:
        time.sleep(0.2)
        return super().read(index)


class Faulty(Numbered):
    """Has a mistake in its own program."""

    def read(self, index: int) -> tuple[bytes, int]:
        raise RuntimeError("a mistake")


def endless(source: Source, workers: Workers) -> Iterator[Batch]:
    """Batches of one image, 0 to 255 again and again."""
    batches = ([(0, i % 256)] for i in count())
    return load(source, VIEW, batches, IDENTITY, workers)
