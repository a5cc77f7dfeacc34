"""Evaluations: a network, its images and their right answers; those of a run in training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import label_sets, sources, stream, subset
from data.base import Source
from data.errors import DataError
from data.label_files import LabelledFolder
from data.label_sets import LabelSet
from data.loader import Batch
from data.names import are_same, shown
from data.protocols import PROTOCOLS
from data.shards.disk_cache import CacheError
from data.workers import Workers
from irv2 import input_pipeline, scoring
from irv2.config import Config
from irv2.data_section import Data
from irv2.report import figures
from irv2.report.statistics import Interval, wilson
from irv2.run import trained
from irv2.run.logbook import Logbook
from irv2.run.stopping import Stopped, StopRequest, until_stopped
from irv2.run.trained import Trained
from irv2.scoring import EvalOptions
from irv2.training import graph
from irv2.training.distributed import World
from irv2.training.metrics import Predictions

MANY_IMAGES = 1000  # of which the 95 % interval is 6 % wide at most, and is not shown in training


class LabelFiles(NamedTuple):
    """Files, and an order, that select images or give right answers where class folders do not."""

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
    if data.classes is not None and network.classes is not None and files.class_index is None:
        source = subset.of_classes(source, network.classes, images, network.name)
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
    """Open images of all classes, without a run's cache if that belongs to another machine.
    Raises DataError.
    """
    data = data.model_copy(update={"classes": None})  # a run's list may be gone; names are not
    try:
        return input_pipeline.open_source(images, data)
    except CacheError as error:
        line = shown(f"{error}; this evaluation continues without")
        print(line, file=sys.stderr, flush=True)
        return input_pipeline.open_source(images, data.model_copy(update={"cache_dir": None}))


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


# ------------------------------------------------------------------------ in training


def predict(
    cfg: Config,
    model: nn.Module,
    val_data: Source,
    world: World,
    bar: tqdm,
    stop: StopRequest,
    call: graph.Run = graph.plainly,
) -> Predictions | None:
    """Predictions for a run's validation images; None if a signal came first.

    call: as `StepOptions.run`, for the network's forward.
    """
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
        return scoring.collect(
            scoring.scored(model, with_answers, EvalOptions(cfg.train.precision, run=call)),
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
    """Show the confusion matrix and the most confident mistakes in the run's trackers."""
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
