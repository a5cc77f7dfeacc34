"""Exact top-k counts, from a network's prediction for each image, and the pace of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

UNRANKED = 2**31
TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Predictions for every image of an evaluation, from which each count and rate follows.

    One row an image, in ascending order of `index`, the image's number in its source.
    """

    index: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N], the right class; of several right ones the best placed
    rank: np.ndarray  # int64 [N], place of `label` among the classes, 0 = first
    loss: np.ndarray  # float64 [N], cross-entropy without label smoothing
    top: np.ndarray  # int64 [N, 5], the classes in first places; fewer columns if there are fewer
    probability: np.ndarray  # float32 [N, 5], their softmax
    size: np.ndarray  # int32 [N, 2], width and height of the image, px

    @classmethod
    def merged(cls, parts: Iterable[Predictions]) -> Predictions:
        """Merge several ranks' predictions; each image is on exactly one rank."""
        parts = list(parts)
        columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)}
        order = np.argsort(columns["index"], kind="stable")
        return cls(**{name: column[order] for name, column in columns.items()})

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.index)

    @property
    def top1_correct(self) -> int:
        """Images whose label has the highest score."""
        return int((self.rank < 1).sum())

    @property
    def top5_correct(self) -> int:
        """Images whose label is among the five highest scores."""
        return int((self.rank < TOP).sum())

    @property
    def top1(self) -> float:
        """`top1_correct` in percent."""
        return 100.0 * self.top1_correct / self.images

    @property
    def top5(self) -> float:
        """`top5_correct` in percent."""
        return 100.0 * self.top5_correct / self.images

    @property
    def mean_per_class(self) -> float:
        """Mean over the classes that occur of the percentage of their images that are correct."""
        labels, inverse = np.unique(self.label, return_inverse=True)
        counts = np.bincount(inverse, minlength=len(labels))
        correct = np.bincount(inverse, weights=self.rank < 1, minlength=len(labels))
        return float(100.0 * (correct / counts).mean())

    def confusion_matrix(self, classes: int) -> np.ndarray:
        """Images by label (row) and first answer (column): int64 [C, C]."""
        cells = self.label * classes + self.top[:, 0]
        return np.bincount(cells, minlength=classes**2).reshape(classes, classes)

    def mistakes(self) -> np.ndarray:
        """Rows whose first answer is wrong, the most confident first: int64 [M]."""
        wrong = np.flatnonzero(self.rank >= 1)
        confidence = np.nan_to_num(self.probability[wrong, 0])
        return wrong[np.argsort(-confidence, kind="stable")]

    @property
    def unscored(self) -> np.ndarray:
        """Numbers of the images, in their source, whose scores were not finite."""
        return self.index[~np.isfinite(self.loss)]

    @property
    def mean_loss(self) -> float:
        """Mean of `loss`."""
        return float(self.loss.mean())


class Scored(NamedTuple):
    """A batch's scores, with the right answers."""

    scores: Tensor  # float [B, C], higher is likelier: logits, or logarithms of probabilities
    answers: Tensor  # int64 [B], right class; or [B, A], several (repeated to fill a row)
    indices: list[int]  # number of each image in its source
    sizes: np.ndarray  # int32 [B, 2], width and height of the images, px


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Position of each label among its image's scores, 0 = highest: [B, C], [B] -> [B] int64.

    Equal scores rank by class index, the lower first, on every device. A label whose score is
    not finite ranks behind every place that counts.
    """
    own = scores.gather(1, labels[:, None])
    index = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (index < labels[:, None]))
    return torch.where(own.squeeze(1).isfinite(), ahead.sum(1), UNRANKED)


def best_answers(scores: Tensor, answers: Tensor) -> Tensor:
    """Best placed of several right classes: [B, C], [B, A] int64 -> [B] int64."""
    candidates = answers.sort(1).values  # so that of equal scores the lower class comes first
    own = scores.gather(1, candidates).nan_to_num(nan=-float("inf"))
    first = (own == own.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    return candidates.gather(1, first).squeeze(1)


class Collector:
    """Collects predictions batch by batch, on the device until they are read."""

    def __init__(self) -> None:
        self._indices: list[int] = []
        self._sizes: list[np.ndarray] = []
        self._columns: list[tuple[Tensor, ...]] = []

    def add(self, batch: Scored) -> None:
        """Rank a batch's answers."""
        scores = batch.scores.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        labels = batch.answers
        labels = best_answers(scores, labels) if labels.ndim == 2 else labels
        top = scores.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        self._indices += batch.indices
        self._sizes.append(batch.sizes)
        self._columns.append(
            (
                labels,
                label_ranks(scores, labels),
                F.cross_entropy(scores, labels, reduction="none").double(),
                top,
                scores.softmax(1).gather(1, top),
            )
        )

    def top1(self) -> float:
        """Percent of the images so far that are correct. Waits for the device."""
        return (
            100.0 * torch.cat([column[1] for column in self._columns]).lt(1).double().mean().item()
        )

    def predictions(self) -> list[Predictions]:
        """Return the predictions for all images so far; an empty list if there are none."""
        if not self._columns:
            return []
        columns = [torch.cat(parts).cpu().numpy() for parts in zip(*self._columns)]
        return [Predictions(np.array(self._indices), *columns, np.concatenate(self._sizes))]


class Pace:
    """Images per second, the share of time spent waiting for data and, where the images per second
    are known that the matrix rate would allow, their share (MFU), between two readings."""

    def __init__(self) -> None:
        self.ceiling: float | None = None  # images/s of all devices
        self.restart()

    def restart(self) -> None:
        """Restart the count, so that the time since the last reading is not training's."""
        self.started, self.images, self.waited_s = time.perf_counter(), 0, 0.0

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Time the wait for a batch, as far as it keeps the model waiting.

        A GPU works on while the host waits; the time counts if it ran out of work.
        """
        began, work = time.perf_counter(), None
        if device.type == "cuda":
            work = torch.cuda.Event()
            work.record()
        yield
        if work is None or work.query():
            self.waited_s += time.perf_counter() - began

    def trained(self, images: int) -> None:
        """Add images of a finished step (global count)."""
        self.images += images

    def read(self) -> dict[str, float]:
        """Return {"images_per_s", "data_wait", "mfu"} since the last reading, and start again."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        reading = {"images_per_s": self.images / elapsed, "data_wait": self.waited_s / elapsed}
        if self.ceiling is not None:
            reading["mfu"] = reading["images_per_s"] / self.ceiling
        self.restart()
        return reading
