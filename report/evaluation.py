"""The page of an evaluation: what a network gets right and wrong, and how sure it is of it.

DIR/index.html           the page, which opens from the disk and asks for nothing else
DIR/per_class.csv        its table of classes, with every digit
DIR/predictions.csv.gz   a line an image: right class, whether it was found, first five answers
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from irv2.statistics import Interval, calibration, wilson
from report import page, plots
from report.pictures import Gallery, Picture

PAIRS, PAIR_PICTURES = 10, 4
MISTAKES = 24
MATRIX_CLASSES = 30  # most for which a confusion matrix can be read
SIZE_BINS = 6
_wilson = cache(wilson)  # a thousand classes of fifty images ask thousands of times


@dataclass(frozen=True)
class Evaluation:
    """What the page is made of. Classes are the network's outputs, in their order."""

    title: str  # "runs/quickstart, step 180 (ema)"
    facts: list[tuple[str, str]]  # rows of the headline table, ready for people
    predictions: Any  # irv2.metrics.Predictions
    classes: list[str]  # folder or class id
    names: list[str]  # the same in words; may equal `classes`
    image_name: Callable[[int], str]  # image number -> path
    thumbnail: Callable[[int], Image.Image]  # image number -> the whole picture, of any size
    sizes: np.ndarray  # int32 [N, 2], width and height in px of each row of predictions
    log: list[dict[str, Any]]  # lines of the run's log.jsonl; empty without a run


class Score(NamedTuple):
    """Of some images, how many are right, in percent; not to be asked of no images."""

    correct: int
    images: int

    @property
    def percent(self) -> float:
        return 100.0 * self.correct / self.images

    @property
    def interval(self) -> Interval:
        return _wilson(self.correct, self.images)


class ClassRow(NamedTuple):
    """How the images of a class fared."""

    id: str
    name: str
    top1: Score
    top5: Score
    mistaken_for: str  # the commonest wrong answer, "" if there is none
    times: int


class Pair(NamedTuple):
    """Images of one class that were taken for another."""

    true: str
    predicted: str
    images: int
    share: float  # of the true class's images, percent
    pictures: list[Picture]


class Mistake(NamedTuple):
    """An image that the network got wrong."""

    picture: Picture
    true: str
    true_percent: float
    predicted: str
    predicted_percent: float


class SizeRow(NamedTuple):
    """Images whose shorter side lies within bounds, both included."""

    low: int
    high: int
    top1: Score


class Calibration(NamedTuple):
    """How sure the network is, beside how often it is right; percent."""

    error: float
    confidence: float
    plot: Markup


def write(directory: Path, evaluation: Evaluation) -> None:
    """Write page and tables into `directory`, which is made if need be. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = class_rows(evaluation)
    page.write(directory / "per_class.csv", per_class_csv(rows))
    table = page.encoded(predictions_csv(evaluation))
    page.write(directory / "predictions.csv.gz", gzip.compress(table, mtime=0))
    page.write(directory / "index.html", render(evaluation, rows))


def render(evaluation: Evaluation, rows: list[ClassRow]) -> str:
    """The page as HTML."""
    found = evaluation.predictions
    few = len(evaluation.classes) <= MATRIX_CLASSES
    seen = [row for row in rows if row.top1.images]
    return page.render(
        "evaluation.html",
        title=evaluation.title,
        facts=evaluation.facts,
        top1=Score(found.top1_correct, found.images),
        top5=Score(found.top5_correct, found.images),
        mean_per_class=found.mean_per_class,
        wrong=found.images - found.top1_correct,
        rows=sorted(rows, key=lambda row: row.top1.percent if row.top1.images else 101.0),
        seen=len(seen),
        has_names=evaluation.names != evaluation.classes,
        rows_floor=floor(row.top1 for row in seen),
        pairs=confused_pairs(evaluation),
        mistakes=confident_mistakes(evaluation),
        calibration=calibrated(found),
        size=only_size(evaluation.sizes),
        sizes=(sizes := size_rows(evaluation)),
        sizes_floor=floor(row.top1 for row in sizes),
        matrix=found.confusion_matrix(len(evaluation.classes)).tolist() if few else None,
        names=evaluation.names,
        panels=plots.curve_panels([evaluation.log]) if evaluation.log else [],
    )


def floor(scores: Any) -> int:
    """Where bars may begin so that every interval is on them: a multiple of ten, percent."""
    return min((int(score.interval.low // 10 * 10) for score in scores), default=0)


# ------------------------------------------------------------------------- classes


def confusions(found: Any) -> list[tuple[int, int, int]]:
    """(right class, answer, images) of what was confused, the commonest first."""
    wrong = found.rank >= 1
    pairs = np.stack([found.label[wrong], found.top[wrong, 0]], axis=1)
    pairs, images = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-images, kind="stable")
    return [(*map(int, pairs[i]), int(images[i])) for i in order]


def class_rows(evaluation: Evaluation) -> list[ClassRow]:
    """A row a class, in the order of the network's outputs."""
    found, classes = evaluation.predictions, len(evaluation.classes)
    images, first, five = (
        np.bincount(found.label[where], minlength=classes).tolist()
        for where in (found.rank >= 0, found.rank < 1, found.rank < 5)
    )
    commonest: dict[int, tuple[str, int]] = {}
    for true, predicted, times in confusions(found):
        commonest.setdefault(true, (evaluation.names[predicted], times))
    return [
        ClassRow(
            evaluation.classes[i],
            evaluation.names[i],
            Score(first[i], images[i]),
            Score(five[i], images[i]),
            *commonest.get(i, ("", 0)),
        )
        for i in range(classes)
    ]


def confused_pairs(evaluation: Evaluation) -> list[Pair]:
    """The commonest confusions, with the images whose wrong answer was the most confident."""
    found, names = evaluation.predictions, evaluation.names
    gallery = Gallery(evaluation.thumbnail, evaluation.image_name)
    wrong = found.mistakes()
    pairs = []
    for true, predicted, images in confusions(found)[:PAIRS]:
        rows = wrong[(found.label[wrong] == true) & (found.top[wrong, 0] == predicted)]
        pictures = [gallery.picture(int(found.index[row])) for row in rows[:PAIR_PICTURES]]
        share = 100.0 * images / int((found.label == true).sum())
        pairs.append(Pair(names[true], names[predicted], images, share, pictures))
    return pairs


def confident_mistakes(evaluation: Evaluation) -> list[Mistake]:
    """Wrong answers, the most confident first."""
    found, names = evaluation.predictions, evaluation.names
    gallery = Gallery(evaluation.thumbnail, evaluation.image_name)
    sure = confidence(found)
    return [
        Mistake(
            gallery.picture(int(found.index[row])),
            names[found.label[row]],
            100.0 * float(np.exp(-found.loss[row])),  # cross-entropy is -log of its softmax
            names[found.top[row, 0]],
            100.0 * float(sure[row]),
        )
        for row in found.mistakes()[:MISTAKES]
    ]


# ------------------------------------------------------------------------- confidence, sizes


def confidence(found: Any) -> np.ndarray:
    """Probability of each image's answer, float64 [N]; 0 where the network gave no number."""
    return np.nan_to_num(found.probability[:, 0].astype(np.float64))


def calibrated(found: Any) -> Calibration:
    """The reliability diagram and its figures."""
    sure = confidence(found)
    bins, error = calibration(sure, found.rank < 1)
    plot = plots.inline_svg(
        plots.reliability(bins, found.images), "Accuracy over confidence", size=(4.4, 3.6)
    )
    return Calibration(100.0 * error, 100.0 * float(sure.mean()), plot)


def only_size(sizes: np.ndarray) -> tuple[int, int] | None:
    """(width, height) of all images, if they have the same."""
    return tuple(sizes[0].tolist()) if (sizes == sizes[0]).all() else None


def size_rows(evaluation: Evaluation) -> list[SizeRow]:
    """Images by their shorter side, about as many in each row."""
    shorter = evaluation.sizes.min(axis=1)
    begins = np.quantile(shorter, np.arange(SIZE_BINS) / SIZE_BINS, method="lower")
    if len(different := np.unique(shorter)) <= SIZE_BINS:
        begins = different
    begins = np.unique(begins)
    place = np.searchsorted(begins, shorter, side="right") - 1
    rows = []
    for number in range(len(begins)):
        mine = place == number
        correct = int((evaluation.predictions.rank[mine] < 1).sum())
        score = Score(correct, int(mine.sum()))
        rows.append(SizeRow(int(shorter[mine].min()), int(shorter[mine].max()), score))
    return rows


# ------------------------------------------------------------------------- tables


def per_class_csv(rows: list[ClassRow]) -> str:
    """The table of classes; what a class without images lacks is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    head = "class,name,images,correct,top1,top1_low,top1_high,top5,mistaken_for,times"
    table.writerow(head.split(","))
    for row in rows:
        shares = ["", "", "", ""]
        if row.top1.images:
            shares = [row.top1.percent, *row.top1.interval, row.top5.percent]
        counts = [row.top1.images, row.top1.correct]
        table.writerow([row.id, row.name, *counts, *shares, row.mistaken_for, row.times])
    return text.getvalue()


def predictions_csv(evaluation: Evaluation) -> str:
    """A line an image; fewer than five answers where there are fewer classes."""
    found, classes = evaluation.predictions, evaluation.classes
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    places = range(1, found.top.shape[1] + 1)
    answers = [name for k in places for name in (f"class_{k}", f"probability_{k}")]
    table.writerow(["image", "label", "correct", *answers])
    for row, index in enumerate(found.index.tolist()):
        pairs = zip(found.top[row].tolist(), found.probability[row].tolist())
        said = [part for top, share in pairs for part in (classes[top], f"{share:.6g}")]
        label, is_correct = classes[found.label[row]], int(found.rank[row] < 1)
        table.writerow([evaluation.image_name(index), label, is_correct, *said])
    return text.getvalue()
