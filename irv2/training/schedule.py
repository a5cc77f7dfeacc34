"""Images seen -> learning rate. Pure, so a resumed or rescaled run needs nothing restored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


def whole_periods(images_seen: int, epochs: float, images_per_epoch: int) -> int:
    """Number of times that `epochs` epochs have passed.

    Exact: 0.1 means a tenth, not its nearest float.
    """
    return images_seen // (Fraction(str(epochs)) * images_per_epoch)


def total_steps(images: int, epochs: float, global_batch: int, max_steps: int | None) -> int:
    """Updates of a run over so many images an epoch."""
    steps = math.ceil(epochs * images / global_batch)
    return min(steps, max_steps or steps)


def length_is_free(before: str, after: str) -> bool:
    """True if a run may be made longer or shorter when it goes on, under these kinds of schedule.

    A staircase's rate does not depend on how long the run is; a cosine's does.
    """
    return before == after == "staircase"


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the images a run has seen.

    staircase: `base_lr * decay_rate ** floor(epoch / decay_epochs)` (the paper: 0.94 every 2).
    cosine: from `base_lr` to `min_lr` over `total_epochs`, warm-up included.
    Both: over the first `warmup_epochs` the rate is scaled linearly from 0 to its full value.
    """

    kind: Literal["staircase", "cosine"]
    base_lr: float
    images_per_epoch: int
    total_epochs: float
    global_batch: int
    max_steps: int | None = None
    decay_rate: float = 0.94
    decay_epochs: float = 2.0
    warmup_epochs: float = 0.0
    min_lr: float = 0.0

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return total_steps(
            self.images_per_epoch, self.total_epochs, self.global_batch, self.max_steps
        )

    def learning_rate(self, images_seen: int) -> float:
        """Rate of the step that begins after `images_seen` images."""
        epoch = images_seen / self.images_per_epoch
        if self.kind == "staircase":
            stair = whole_periods(images_seen, self.decay_epochs, self.images_per_epoch)
            rate = self.base_lr * self.decay_rate**stair
        elif self.kind == "cosine":
            progress = min(1.0, epoch / self.total_epochs)
            rate = (
                self.min_lr + (self.base_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2
            )
        else:
            raise ValueError(f"no schedule is called {self.kind}")
        if epoch < self.warmup_epochs:
            rate *= epoch / self.warmup_epochs
        return rate

    def period_ended(self, images_seen: int, epochs: float) -> bool:
        """True if the last step reached or passed a multiple of `epochs` epochs."""
        before = max(0, images_seen - self.global_batch)
        now, then = (
            whole_periods(seen, epochs, self.images_per_epoch) for seen in (images_seen, before)
        )
        return now > then
