"""What a network is asked in an evaluation, which images, seen how, and what is right; and the
outcome beside what others published.

What validate.py's options come to; feed.py is its counterpart for training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data import label_sets, loader, shards, sources, stream
from data.label_sets import LabelSet
from data.protocols import PROTOCOLS
from data.to_input import ToInput
from data.workers import Workers
from irv2 import imagenet_names
from irv2.distributed import World
from irv2.metrics import Predictions
from irv2.trained import Trained
from report import reference
from report.result import Result


class LabelFiles(NamedTuple):
    """Files that say which images count and what is right, where class folders do not."""

    class_index: Path | None = None
    real: Path | None = None
    subset: Path | None = None
    exclude: Path | None = None


@dataclass(frozen=True)
class Exam:
    """A network, and what it is asked."""

    network: Trained
    view: dict[str, Any]  # keys of the config's section "data", and "protocol"
    source: sources.Source
    labels: LabelSet
    files: LabelFiles

    @property
    def classes(self) -> list[str]:
        """Class folder of each of the network's outputs."""
        if self.network.classes is not None:
            return self.network.classes
        names = [""] * self.network.model.classif.out_features
        for folder, output in zip(self.source.classes, self.labels.outputs):
            names[output] = folder
        return names


def prepare(
    network: Trained, stated: dict[str, Any], files: LabelFiles, allow_resized: bool
) -> Exam:
    """What a network is asked, where `stated` settings go before its own.

    Raises DataError if its images cannot be used, or none counts.
    """
    view = {**network.data, **stated}
    where = view["val"]
    if where is None:
        raise sources.DataError("--data DIR is needed: these weights do not say what to look at")
    source = sources.open_source(where)
    if not (allow_resized or ("val" not in stated and view.get("allow_resized"))):
        shards.refuse_resized(source, where, "--allow-resized")

    of = (network.classes, network.model.classif.out_features)
    if files.class_index is not None:
        labels = label_sets.of_class_index(source, where, *of, files.class_index)
    else:
        labels = label_sets.of_folders(source, where, *of, network.name)
    if files.real is not None:
        labels = label_sets.with_real_labels(labels, source, files.real)
    if files.subset is not None:
        labels = label_sets.only(labels, source, files.subset)
    if files.exclude is not None:
        labels = label_sets.without(labels, source, files.exclude)
    label_sets.check_not_empty(labels, where)
    return Exam(network, view, source, labels, files)


def check_comparable(exams: list[Exam]) -> None:
    """Raise DataError unless all networks are asked the same questions."""
    first = exams[0]
    for exam in exams[1:]:
        if exam.view["val"] != first.view["val"] or exam.classes != first.classes:
            raise sources.DataError(
                f"{exam.network.name} and {first.network.name} have other images or classes; "
                "--ensemble and --compare want the same: give --data DIR"
            )


def batches(
    exam: Exam, at_once: int, workers: Workers, sizes: dict[int, np.ndarray], world: World
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """This rank's batches as engine.scored takes them: views, right answers, image numbers.

    at_once: views of a batch, but at least those of one image. `sizes` learns the width and height
    of each image.
    """
    view, indices = exam.view, exam.labels.indices
    make = PROTOCOLS[view["protocol"]].view
    shown = make(view["image_size"], view["eval_crop"], view["eval_interpolation"])
    views = shown.shape[0] if len(shown.shape) == 4 else 1
    places = stream.evaluation_batches(
        len(indices), max(1, at_once // views), world.rank, world.size
    )
    keys = [[(0, int(indices[place])) for _, place in each] for each in places]
    to_input = ToInput(view["mean"], view["std"], world.device)
    for batch in loader.load(exam.source, shown, keys, to_input, workers):
        numbers = [index for _, index in batch.keys]
        sizes.update(zip(numbers, batch.sizes))
        yield batch.images, exam.labels.answers(batch.labels, numbers), numbers


def outcome(
    each: Exam,
    predictions: Predictions,
    seconds: float,
    precision: str,
    references: list[reference.Reference],
) -> Result:
    """What came out for one network, beside what others published of the same images."""
    network, labels = each.network, each.labels
    keys = ("protocol", "image_size", "eval_crop", "eval_interpolation")
    return Result(
        name=network.name,
        which=network.which,
        step=network.step,
        data=each.view["val"],
        images_in_data=len(each.source),
        resized_to=getattr(each.source, "resized_to", None),
        labels=labels.name,
        selection={option: str(path) for option, path in each.files._asdict().items() if path},
        view={key: each.view[key] for key in keys},
        precision=precision,
        predictions=predictions,
        seconds=seconds,
        references=published(each, predictions, references, networks=1),
    )


def ensemble_of(
    exams: list[Exam],
    predictions: Predictions,
    seconds: float,
    precision: str,
    references: list[reference.Reference],
) -> Result:
    """What came out for the mean of the networks' probabilities."""
    first = outcome(exams[0], predictions, seconds, precision, [])
    found = published(exams[0], predictions, references, networks=len(exams))
    name = f"ensemble of {len(exams)}"
    return replace(first, name=name, which="mean softmax", step=None, references=found)


def published(
    each: Exam, predictions: Predictions, references: list[reference.Reference], networks: int
) -> list[reference.Reference]:
    """What others published of the same images, labels and protocol."""
    labels = each.labels
    if each.network.classes != imagenet_names.synsets() or labels.competing is not None:
        return []
    kind = {"folders": "imagenet", "numbered": "imagenetv2"}.get(labels.name, labels.name)
    return reference.matching(
        references,
        labels=kind,
        protocol=each.view["protocol"],
        images=predictions.images,
        ensemble=networks,
        **{key: each.view[key] for key in ("image_size", "eval_crop", "eval_interpolation")},
    )
