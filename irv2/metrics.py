"""Exact top-k counts and the pace of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNRANKED = 2**31


@dataclass(frozen=True)
class EvalResult:
    """What one evaluation found; percentages are derived from the counts."""

    top1_correct: int
    top5_correct: int
    images: int
    loss_sum: float

    @property
    def top1(self) -> float:
        """Percent of images whose label has the highest logit."""
        return 100.0 * self.top1_correct / self.images

    @property
    def top5(self) -> float:
        """Percent of images whose label is among the five highest logits."""
        return 100.0 * self.top5_correct / self.images

    @property
    def loss(self) -> float:
        """Mean cross-entropy, without label smoothing."""
        return self.loss_sum / self.images


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Position of each label among its image's logits, 0 = highest: [B, C], [B] -> [B] int64.

    Equal logits rank by class index, the lower first, on every device. A label whose logit is
    not finite ranks behind every place that counts.
    """
    own = logits.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (index < labels[:, None]))
    return torch.where(own.squeeze(1).isfinite(), ahead.sum(1), UNRANKED)


class EvalCounter:
    """Running integer counts of an evaluation, kept on the device until asked."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # top-1, top-5, images
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, C], labels [B] int64."""
        logits = logits.float()
        ranks = label_ranks(logits, labels)
        images = torch.full_like(ranks, 1).sum()
        self.counts += torch.stack([(ranks < 1).sum(), (ranks < 5).sum(), images])
        self.loss_sum += F.cross_entropy(logits, labels, reduction="none").double().sum()


class Pace:
    """Images per second and the share of time spent waiting for data, between two readings."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count anew, so that what came between is not the training's time."""
        self.started, self.images, self.waited_s = time.perf_counter(), 0, 0.0

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Around the wait for a batch: time in which the model stood still for want of it.

        A GPU works on while the host waits; the time counts if it came to the end of its work.
        """
        asked, work = time.perf_counter(), None
        if device.type == "cuda":
            work = torch.cuda.Event()
            work.record()
        yield
        if work is None or work.query():
            self.waited_s += time.perf_counter() - asked

    def trained(self, images: int) -> None:
        """Add images of a finished step (global count)."""
        self.images += images

    def read(self) -> dict[str, float]:
        """{"images_per_s", "data_wait"} since the last reading, and start again."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        reading = {"images_per_s": self.images / elapsed, "data_wait": self.waited_s / elapsed}
        self.restart()
        return reading
