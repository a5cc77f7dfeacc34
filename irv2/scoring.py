"""Scores of a network for batches of images, and what they come to over all ranks."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data import user_cache
from data.errors import UserError
from data.loader import Batch
from irv2.network.accelerate import fold_batch_norm
from irv2.training.distributed import World, WorldError
from irv2.training.graph import Run, plainly
from irv2.training.metrics import Collector, Predictions, Scored
from irv2.training.step import PRECISIONS


@dataclass(frozen=True)
class EvalOptions:
    """Options of a network's forward passes in an evaluation."""

    precision: str = "fp32"
    mirrored: bool = False  # show each view also mirrored left to right
    competing: Tensor | None = None  # bool [C], the classes that may be answers; None: all
    at_once: int | None = None  # most views in one forward
    run: Run = plainly  # or a Recorder: see irv2/training/graph.py


def check_compiler(device: torch.device) -> None:
    """Raise WorldError where torch.compile would find no compiler."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise WorldError(
            "--fast compiles the network, and there is no C++ compiler (g++) here; "
            "use --precision bf16"
        )


def ready(model: nn.Module, device: torch.device, fast: bool = False) -> nn.Module:
    """Prepare the network for an evaluation; fast: fold batch norm, and compile."""
    model = fold_batch_norm(model) if fast else model
    model = model.to(device, memory_format=torch.channels_last)
    if not fast:
        return model
    user_cache.give_inductor_its_own(torch.__version__)
    return torch.compile(model)


def scored(
    model: nn.Module, batches: Iterable[tuple[Batch, Tensor]], options: EvalOptions
) -> Iterator[Scored]:
    """Yield the scores of batches, with their right answers.

    Scores are the logits of a single view, or the logarithm of the mean softmax of several; -inf
    for classes that do not compete; NaN, which is counted wrong, where a logit is not finite.
    """
    model.eval()
    # What is recorded shares a generator with training, whose tensors must stay ordinary ones.
    mode = torch.inference_mode if options.run is plainly else torch.no_grad
    full = None  # size of a batch; the last is smaller, and comes too seldom to be recorded
    for batch, answers in batches:
        full = full or batch.images.shape
        run = options.run if batch.images.shape == full else plainly
        with mode():
            scores = _scores(model, batch.images, len(batch.keys), options, run)
            if options.competing is not None:
                scores = scores.masked_fill(~options.competing, -float("inf"))
        yield Scored(scores, answers, [index for _, index in batch.keys], batch.sizes)


def _scores(model: nn.Module, views: Tensor, images: int, options: EvalOptions, run: Run) -> Tensor:
    """Return one row of scores per image, NaN where a logit is not finite."""
    logits = run(_logits, model, views, options)
    each = torch.cat([part.view(images, -1, part.shape[1]) for part in logits], 1).float()
    is_sound = each.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    each = each.where(is_sound, float("nan"))
    count = each.shape[1]  # of views of an image
    return each[:, 0] if count == 1 else each.log_softmax(2).logsumexp(1) - math.log(count)


def _logits(model: nn.Module, views: Tensor, options: EvalOptions) -> tuple[Tensor, ...]:
    """Return logits [N, C] of views [N, 3, H, W], and of their mirror images if these count."""
    dtype = PRECISIONS[options.precision]
    # Weights are cast once for all parts; but a cast that was kept would outlive a graph's memory.
    keeps = options.run is plainly
    with torch.autocast(views.device.type, dtype, enabled=dtype is not None, cache_enabled=keeps):
        parts = views.split(options.at_once or len(views))
        straight = torch.cat([model(part) for part in parts])
        if not options.mirrored:
            return (straight,)
        return straight, torch.cat([model(part.flip(3)) for part in parts])


def collect(
    batches: Iterable[Scored],
    world: World,
    on_batch: Callable[[int, Collector], None] = lambda images, collected: None,
) -> Predictions:
    """Collect the predictions of all ranks, each image counted once.

    on_batch: called with the number of images of each finished batch of this rank, and what has
    been collected so far.
    """
    collected = Collector()
    for batch in batches:
        collected.add(batch)
        on_batch(len(batch.indices), collected)
    return Predictions.merged(world.gather(collected.predictions()))


class ScoreError(UserError):
    """A network whose scores are not finite, so that its counts mean nothing."""


def check_finite(predictions: Predictions, network: str, image_name: Callable[[int], str]) -> None:
    """Raise ScoreError, naming the first image, if scores were not finite."""
    if len(unscored := predictions.unscored):
        raise ScoreError(
            f"{network}: its scores of {len(unscored):,} of {predictions.images:,} images are not "
            f"finite, first of {image_name(unscored[0])}; such a network cannot be evaluated"
        )


class Ensemble:
    """The mean of several networks' probabilities on the same images."""

    def __init__(self) -> None:
        self._networks = 0
        self._sums: list[Scored] = []  # logarithms of sums of probabilities, batch by batch

    def adding(self, batches: Iterable[Scored]) -> Iterator[Scored]:
        """Yield the batches of one network, adding up their probabilities."""
        self._networks += 1
        for number, batch in enumerate(batches):
            logarithms = batch.scores.float().log_softmax(1).cpu()
            if number == len(self._sums):
                self._sums.append(batch._replace(scores=logarithms, answers=batch.answers.cpu()))
            else:
                total = torch.logaddexp(self._sums[number].scores, logarithms)
                self._sums[number] = self._sums[number]._replace(scores=total)
            yield batch

    def mean(self) -> Iterator[Scored]:
        """Yield logarithms of the mean probabilities, which rank like scores."""
        for batch in self._sums:
            yield batch._replace(scores=batch.scores - math.log(self._networks))
