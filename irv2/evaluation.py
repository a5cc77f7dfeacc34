"""Evaluations: a network, its images with their right answers, and its scores."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import label_sets, sources, stream, user_cache
from data.base import Source
from data.errors import DataError, UserError
from data.label_files import LabelledFolder
from data.label_sets import LabelSet
from data.loader import Batch
from data.names import are_same, shown
from data.protocols import PROTOCOLS
from data.shards.disk_cache import CacheError
from data.workers import Workers
from irv2 import input_pipeline
from irv2.config import Config, Data
from irv2.network.accelerate import fold_batch_norm
from irv2.report import figures
from irv2.report.statistics import Interval, wilson
from irv2.run import trained
from irv2.run.logbook import Logbook
from irv2.run.stopping import Stopped, StopRequest, until_stopped
from irv2.run.trained import Trained
from irv2.training.distributed import World, WorldError
from irv2.training.metrics import Collector, Predictions, Scored
from irv2.training.step import PRECISIONS

MANY_IMAGES = 1000  # of which the 95 % interval is 6 % wide at most, and is not shown in training

# ------------------------------------------------------------------------ what is evaluated


class LabelFiles(NamedTuple):
    """What selects images, or gives right answers where class folders do not: files, an order."""

    labels: Path | None = None
    class_index: Path | None = None
    real: Path | None = None
    subset: Path | None = None
    exclude: Path | None = None
    class_order: str | None = None  # of class folders: "natural" or "alphabetical"


@dataclass(frozen=True)
class Evaluation:
    """A network, the images it is evaluated on, how they are preprocessed, the right answers."""

    network: Trained
    images: str  # where they come from
    data: Data  # how they are preprocessed
    protocol: str
    source: Source
    labels: LabelSet
    files: LabelFiles

    @property
    def classes(self) -> list[str]:
        """Class folder of each of the network's outputs."""
        if self.network.classes is not None:
            return self.network.classes
        names = [""] * self.network.model.num_classes
        for folder, output in zip(self.source.classes, self.labels.outputs):
            names[output] = folder
        return names

    def share(self, world: World) -> int:
        """Number of images in this rank's share."""
        return len(stream.evaluation_share(len(self.labels.indices), world.rank, world.size))

    def options(self, precision: str, views_at_once: int, world: World) -> EvalOptions:
        """Options of its forward passes; precision: as in EvalOptions, or "fast", which is bf16."""
        competing = self.labels.competing
        return EvalOptions(
            "bf16" if precision == "fast" else precision,
            PROTOCOLS[self.protocol].mirrored,
            None if competing is None else torch.from_numpy(competing).to(world.device),
            views_at_once,
        )

    def batches(
        self, views_at_once: int, workers: Workers, world: World
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield this rank's batches with their images' right answers: int64 [B] or [B, A]."""
        for batch in input_pipeline.evaluation_batches(
            self.data,
            self.source,
            self.labels.indices,
            views_at_once,
            workers,
            world,
            self.protocol,
        ):
            numbers = [index for _, index in batch.keys]
            yield batch, self.labels.answers(batch.labels, numbers)


def prepare(
    network: Trained,
    stated: dict[str, Any],
    files: LabelFiles,
    protocol: str = "timm",
    allow_resized: bool = False,
) -> Evaluation:
    """Open the images of an evaluation; `stated` keys of section "data" override its own.
    Raises DataError if its images cannot be used, or none is left.
    """
    images = stated.get("val", network.images)
    data = trained.seen_as(network, stated).data
    if images is None:
        raise DataError("--data DIR is needed: these weights do not say what to look at")
    is_own = "val" not in stated  # else the run's cache is for other images
    if files.labels is not None:
        source = LabelledFolder(images, files.labels)
    else:
        source = _open(images, data if is_own else data.model_copy(update={"cache_dir": None}))
    if not (allow_resized or (is_own and data.allow_resized)):
        sources.refuse_resized(source, images, "--allow-resized")

    outputs = (network.classes, network.model.num_classes)
    if files.class_index is not None:
        labels = label_sets.from_class_index(source, images, *outputs, files.class_index)
    else:
        order = files.class_order or (network.class_order if network.classes is None else None)
        labels = label_sets.from_folders(source, images, *outputs, network.name, order)
    if files.real is not None:
        labels = label_sets.with_real_labels(labels, source, files.real)
    if files.subset is not None:
        labels = label_sets.only(labels, source, files.subset)
    if files.exclude is not None:
        labels = label_sets.without(labels, source, files.exclude)
    label_sets.check_not_empty(labels, images)
    return Evaluation(network, images, data, protocol, source, labels, files)


def _open(images: str, data: Data) -> Source:
    """Open images, without a run's cache if that belongs to another machine. Raises DataError."""
    try:
        return input_pipeline.open_source(images, data)
    except CacheError as error:
        line = shown(f"{error}; this evaluation continues without")
        print(line, file=sys.stderr, flush=True)
        return input_pipeline.open_source(images, data.model_copy(update={"cache_dir": None}))


def check_compiler(device: torch.device) -> None:
    """Raise WorldError where torch.compile would find no compiler."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise WorldError(
            "--fast compiles the network, and there is no C++ compiler (g++) here; "
            "use --precision bf16"
        )


def check_same_images(evaluations: list[Evaluation]) -> None:
    """Raise DataError unless all networks have the same images and classes."""
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.images != first.images or not are_same(other.classes, first.classes):
            raise DataError(
                f"{other.network.name} and {first.network.name} have other images or classes; "
                "--ensemble and --compare want the same: give --data DIR"
            )


def say_remarks(evaluations: list[Evaluation], say: Callable[[str], None]) -> None:
    """Say what was noticed as weights and images were opened, once where networks share them."""
    lines = [
        line
        for each in evaluations
        for line in (*each.network.remarks, *each.source.remarks, *_other_form(each), *_order(each))
    ]
    for line in dict.fromkeys(lines):
        say(f"note: {line}")


def _other_form(each: Evaluation) -> list[str]:
    """A remark, where class folders are found by another Unicode form of their names."""
    missing = set(each.source.classes) - set(each.classes)
    is_by_name = each.labels.name == "folders" and missing
    return [sources.other_form(each.images, each.network.name)] if is_by_name else []


def _order(each: Evaluation) -> list[str]:
    """A remark, where nothing but a guess says which class folder is which output."""
    is_known = each.files.class_order or each.network.class_order
    if is_known or not label_sets.order_matters(each.labels, each.source.classes):
        return []
    return [
        f"{each.network.name}: does not name its classes, and their folders have two orders; "
        "alphabetical is taken (class10 before class2), as torchvision and train.py sort, while "
        "timm sorts naturally (class2 first): --class-order says which, or --class-index FILE"
    ]


# ------------------------------------------------------------------------ scores


@dataclass(frozen=True)
class EvalOptions:
    """Options of a network's forward passes in an evaluation."""

    precision: str = "fp32"
    mirrored: bool = False  # show each view also mirrored left to right
    competing: Tensor | None = None  # bool [C], the classes that may be answers; None: all
    at_once: int | None = None  # most views in one forward


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
    for batch, answers in batches:
        with torch.inference_mode():
            scores = _scores(model, batch.images, len(batch.keys), options)
            if options.competing is not None:
                scores = scores.masked_fill(~options.competing, -float("inf"))
        yield Scored(scores, answers, [index for _, index in batch.keys], batch.sizes)


def _scores(model: nn.Module, views: Tensor, images: int, options: EvalOptions) -> Tensor:
    """Return one row of scores per image, NaN where a logit is not finite."""
    dtype = PRECISIONS[options.precision]
    with torch.autocast(views.device.type, dtype, enabled=dtype is not None):
        parts = views.split(options.at_once or len(views))
        logits = [torch.cat([model(part) for part in parts])]
        if options.mirrored:
            logits.append(torch.cat([model(part.flip(3)) for part in parts]))
    each = torch.cat([part.view(images, -1, part.shape[1]) for part in logits], 1).float()
    is_sound = each.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    each = each.where(is_sound, float("nan"))
    count = each.shape[1]  # of views of an image
    return each[:, 0] if count == 1 else each.log_softmax(2).logsumexp(1) - math.log(count)


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


# ------------------------------------------------------------------------ in training


def predict(
    cfg: Config, model: nn.Module, val_data: Source, world: World, bar: tqdm, stop: StopRequest
) -> Predictions | None:
    """Predictions for a run's validation images; None if a signal came first."""
    batches = input_pipeline.evaluation_batches(
        cfg.data,
        val_data,
        range(len(val_data)),
        cfg.eval.batch,
        Workers(cfg.data.workers, cfg.run.timeout_s),
        world,
        compiled=bool(cfg.train.compile),
    )
    rounds = stream.evaluation_rounds(len(val_data), cfg.eval.batch, world.size)
    batches = until_stopped(batches, rounds, lambda: world.any(stop.signal is not None))
    with_answers = ((batch, batch.labels) for batch in batches)
    try:
        return collect(
            scored(model, with_answers, EvalOptions(cfg.train.precision)),
            world,
            lambda images, _: bar.update(images * world.size),
        )
    except Stopped:
        return None


def shown_interval(predictions: Predictions) -> Interval | None:
    """Top-1's 95 % interval, percent, where there are so few images that it should be seen."""
    if predictions.images >= MANY_IMAGES:
        return None
    return wilson(predictions.top1_correct, predictions.images)


def draw(cfg: Config, predictions: Predictions, source: Source, log: Logbook, step: int) -> None:
    """Show the confusion matrix and the most confident mistakes in TensorBoard."""
    if not log.active:
        return
    if len(source.classes) <= figures.MOST_CLASSES:
        matrix = figures.confusion_matrix(predictions, source.classes)
        log.figure("confusion matrix", matrix, step)
    mistakes = figures.most_confident_mistakes(predictions)
    pictures = input_pipeline.pictures(cfg.data, source, mistakes)
    if pictures:
        drawn = figures.mistakes(predictions, pictures, source.classes)
        log.figure("most confident mistakes", drawn, step)
