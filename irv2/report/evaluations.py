"""The page of an evaluation: what a network gets right and wrong, and how confident it is.

DIR/index.html           the page, which opens from the disk and loads nothing else
DIR/per_class.csv        its table of classes, with every digit
DIR/predictions.csv.gz   a line per image: right class, whether it was given, first five answers

The columns image, label, class, name, mistaken_for and class_1 to class_5 hold names, with an
apostrophe before one that begins with = + - @, tab or a line's end: spreadsheets would compute it.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from irv2.report import page, plots
from irv2.report.statistics import Interval, calibration, wilson
from irv2.report.thumbnails import EXPLAINED, Thumbnail, thumbnail

PAIRS, PAIR_PICTURES = 10, 4
MISTAKES = 24
MATRIX_CLASSES = 30  # most for which a confusion matrix can be read
SIZE_BINS = 6
_wilson = cache(wilson)  # a thousand classes of fifty images ask thousands of times


@dataclass(frozen=True)
class Content:
    """Content of the page. Classes are the network's outputs, in their order."""

    title: str  # "runs/quickstart, step 180 (ema)"
    facts: list[tuple[str, str]]  # rows of the headline table, ready for people
    predictions: Any  # irv2.training.metrics.Predictions, which needs torch
    classes: list[str]  # folder or class id
    names: list[str]  # the same in words; may equal `classes`
    image_name: Callable[[int], str]  # image number -> path
    thumbnail: Callable[[int], Image.Image]  # image number -> the whole picture, of any size
    log: list[dict[str, Any]]  # lines of the run's log.jsonl; empty without a run
    # (image number, classes) -> the view, and where the network saw each class, side by side
    explanation: Callable[[int, list[int]], Image.Image] | None = None


class Score(NamedTuple):
    """Right answers to some images, of which there must be at least one."""

    correct: int
    images: int

    @property
    def percent(self) -> float:
        return 100.0 * self.correct / self.images

    @property
    def interval(self) -> Interval:
        return _wilson(self.correct, self.images)


class ClassRow(NamedTuple):
    """Results on the images of a class."""

    id: str
    name: str
    top1: Score
    top5: Score
    mistaken_for: str  # the most frequent wrong answer, "" if there is none
    times: int


class Confusion(NamedTuple):
    """Images of one class that were taken for another."""

    true: str
    predicted: str
    images: int
    share: float  # of the true class's images, percent
    pictures: list[Thumbnail]


class Mistake(NamedTuple):
    """An image that the network got wrong."""

    picture: Thumbnail
    true: str
    true_percent: float
    predicted: str
    predicted_percent: float
    explanation: Thumbnail | None


class SizeRow(NamedTuple):
    """Images whose shorter side lies within bounds, both included."""

    low: int
    high: int
    top1: Score


class Calibration(NamedTuple):
    """Confidence of the network beside its accuracy; percent."""

    error: float
    confidence: float
    plot: Markup


def write(directory: Path, content: Content) -> None:
    """Write page and tables into `directory`, which is made if need be. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = class_rows(content)
    page.write(directory / "per_class.csv", per_class_csv(rows))
    table_of_images = page.encoded(predictions_csv(content))
    page.write(directory / "predictions.csv.gz", gzip.compress(table_of_images, mtime=0))
    page.write(directory / "index.html", render(content, rows))


def render(content: Content, rows: list[ClassRow]) -> str:
    """Render the page as HTML."""
    predictions = content.predictions
    few = len(content.classes) <= MATRIX_CLASSES
    seen = [row for row in rows if row.top1.images]
    return page.render(
        "evaluation.html",
        title=content.title,
        facts=content.facts,
        top1=Score(predictions.top1_correct, predictions.images),
        top5=Score(predictions.top5_correct, predictions.images),
        mean_per_class=predictions.mean_per_class,
        wrong=predictions.images - predictions.top1_correct,
        rows=sorted(rows, key=lambda row: row.top1.percent if row.top1.images else 101.0),
        seen=len(seen),
        has_names=content.names != content.classes,
        rows_floor=floor(row.top1 for row in seen),
        pairs=confused_pairs(content),
        mistakes=confident_mistakes(content),
        calibration=calibrated(predictions),
        size=only_size(content.predictions.size),
        sizes=(sizes := size_rows(content)),
        sizes_floor=floor(row.top1 for row in sizes),
        matrix=predictions.confusion_matrix(len(content.classes)).tolist() if few else None,
        names=content.names,
        panels=plots.curve_panels([content.log]) if content.log else [],
    )


def floor(scores: Any) -> int:
    """Start of a bar chart that shows every interval: a multiple of ten, percent."""
    return min((int(score.interval.low // 10 * 10) for score in scores), default=0)


# ------------------------------------------------------------------------- classes


def confusions(predictions: Any) -> list[tuple[int, int, int]]:
    """Return (right class, answer, images) of each confusion, the most frequent first."""
    wrong = predictions.rank >= 1
    pairs = np.stack([predictions.label[wrong], predictions.top[wrong, 0]], axis=1)
    pairs, images = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-images, kind="stable")
    return [(*map(int, pairs[i]), int(images[i])) for i in order]


def class_rows(content: Content) -> list[ClassRow]:
    """Return a row per class, in the order of the network's outputs."""
    predictions, classes = content.predictions, len(content.classes)
    images, first, five = (
        np.bincount(predictions.label[where], minlength=classes).tolist()
        for where in (predictions.rank >= 0, predictions.rank < 1, predictions.rank < 5)
    )
    commonest: dict[int, tuple[str, int]] = {}
    for true, predicted, times in confusions(predictions):
        commonest.setdefault(true, (content.names[predicted], times))
    return [
        ClassRow(
            content.classes[i],
            content.names[i],
            Score(first[i], images[i]),
            Score(five[i], images[i]),
            *commonest.get(i, ("", 0)),
        )
        for i in range(classes)
    ]


def confused_pairs(content: Content) -> list[Confusion]:
    """Most frequent confusions, with the images whose wrong answer was the most confident."""
    predictions, names = content.predictions, content.names
    wrong = predictions.mistakes()
    pairs = []
    for true, predicted, images in confusions(predictions)[:PAIRS]:
        rows = wrong[(predictions.label[wrong] == true) & (predictions.top[wrong, 0] == predicted)]
        pictures = [_picture(content, row) for row in rows[:PAIR_PICTURES]]
        share = 100.0 * images / int((predictions.label == true).sum())
        pairs.append(Confusion(names[true], names[predicted], images, share, pictures))
    return pairs


def confident_mistakes(content: Content) -> list[Mistake]:
    """Wrong answers, the most confident first."""
    predictions, names = content.predictions, content.names
    sure = confidence(predictions)
    return [
        Mistake(
            _picture(content, row),
            names[predictions.label[row]],
            100.0 * float(np.exp(-predictions.loss[row])),  # cross-entropy is -log of its softmax
            names[predictions.top[row, 0]],
            100.0 * float(sure[row]),
            _explanation(content, row),
        )
        for row in predictions.mistakes()[:MISTAKES]
    ]


def _picture(content: Content, row: int) -> Thumbnail:
    """Scale down the picture of an image, which stands in this row of the predictions."""
    index = int(content.predictions.index[row])
    return thumbnail(content.thumbnail(index), content.image_name(index))


def _explanation(content: Content, row: int) -> Thumbnail | None:
    """Draw where the network saw its answer to an image, and where the right one."""
    if content.explanation is None:
        return None
    predictions, index = content.predictions, int(content.predictions.index[row])
    classes = [int(predictions.top[row, 0]), int(predictions.label[row])]
    return thumbnail(content.explanation(index, classes), content.image_name(index), EXPLAINED)


# ------------------------------------------------------------------------- confidence, sizes


def confidence(predictions: Any) -> np.ndarray:
    """Probability of each image's answer, float64 [N]; 0 where it is NaN."""
    return np.nan_to_num(predictions.probability[:, 0].astype(np.float64))


def calibrated(predictions: Any) -> Calibration:
    """The reliability diagram and its figures."""
    sure = confidence(predictions)
    bins, error = calibration(sure, predictions.rank < 1)
    plot = plots.inline_svg(
        plots.reliability(bins, predictions.images), "Accuracy over confidence", size=(4.4, 3.6)
    )
    return Calibration(100.0 * error, 100.0 * float(sure.mean()), plot)


def only_size(sizes: np.ndarray) -> tuple[int, int] | None:
    """Return (width, height) of all images, if they have the same."""
    return tuple(sizes[0].tolist()) if (sizes == sizes[0]).all() else None


def size_rows(content: Content) -> list[SizeRow]:
    """Divide the images by their shorter side, about as many to each row."""
    shorter = content.predictions.size.min(axis=1)
    begins = np.quantile(shorter, np.arange(SIZE_BINS) / SIZE_BINS, method="lower")
    if len(different := np.unique(shorter)) <= SIZE_BINS:
        begins = different
    begins = np.unique(begins)
    place = np.searchsorted(begins, shorter, side="right") - 1
    rows = []
    for number in range(len(begins)):
        mine = place == number
        correct = int((content.predictions.rank[mine] < 1).sum())
        score = Score(correct, int(mine.sum()))
        rows.append(SizeRow(int(shorter[mine].min()), int(shorter[mine].max()), score))
    return rows


# ------------------------------------------------------------------------- tables

# What a spreadsheet takes for a formula: https://owasp.org/www-community/attacks/CSV_Injection,
# with its full-width forms.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def cell(name: str) -> str:
    """A name of a file or class as a spreadsheet shows it: after an apostrophe, where it would be
    taken for a formula."""
    return f"'{name}" if name.startswith(FORMULA) else name


class Lines(list):
    """Lines that a csv.writer writes."""

    write = list.append


def table(rows: Iterable[Iterable[object]]) -> str:
    """Rows as CSV. A cell that holds either half of a line's end is quoted."""
    lines = Lines()
    csv.writer(lines, lineterminator="\r\n").writerows(rows)  # it quotes what is in this
    return "".join(f"{line[:-2]}\n" for line in lines)


def per_class_csv(rows: list[ClassRow]) -> str:
    """Table of classes as CSV; cells that a class without images lacks are empty."""
    head = "class,name,images,correct,top1,top1_low,top1_high,top5,mistaken_for,times"
    lines: list[list[object]] = [head.split(",")]
    for row in rows:
        shares = ["", "", "", ""]
        if row.top1.images:
            shares = [row.top1.percent, *row.top1.interval, row.top5.percent]
        counts = [row.top1.images, row.top1.correct]
        label, words, mistaken_for = map(cell, (row.id, row.name, row.mistaken_for))
        lines.append([label, words, *counts, *shares, mistaken_for, row.times])
    return table(lines)


def predictions_csv(content: Content) -> str:
    """Table of images as CSV; fewer than five answers where there are fewer classes."""
    predictions, classes = content.predictions, list(map(cell, content.classes))
    places = range(1, predictions.top.shape[1] + 1)
    answers = [name for k in places for name in (f"class_{k}", f"probability_{k}")]
    lines: list[list[object]] = [["image", "label", "correct", *answers]]
    for row, index in enumerate(predictions.index.tolist()):
        pairs = zip(predictions.top[row].tolist(), predictions.probability[row].tolist())
        cells = [part for top, share in pairs for part in (classes[top], f"{share:.6g}")]
        label, is_correct = classes[predictions.label[row]], int(predictions.rank[row] < 1)
        lines.append([cell(content.image_name(index)), label, is_correct, *cells])
    return table(lines)
