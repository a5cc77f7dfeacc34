"""An evaluation's outcome, as lines for people and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from data.names import shown
from irv2.report.reference import Reference, distance
from irv2.report.statistics import Interval, mcnemar, wilson

Rows = list[tuple[str, str]]
HALVES = [0.5, 0.5, 0.5]  # the published networks' mean and deviation, which go without saying
BESIDE_TABLE = ("images", "labels", "view", "compare")  # rows that its columns do not hold


@dataclass(frozen=True)
class Result:
    """Outcome of an evaluation, with what was evaluated and how."""

    name: str  # of the weights
    which: str  # "ema", "raw", "as published"; "mean softmax" of an ensemble
    step: int | None
    data: str  # where the images are
    images_in_data: int
    resized_to: int | None  # px of the shorter side, if they were made smaller
    labels: str  # kind of the labels: as LabelSet.name
    selection: dict[str, str]  # files that say which images count or what is right, by option
    view: dict[str, Any]  # protocol, image_size, eval_crop, eval_interpolation, mean, std
    precision: str
    predictions: Any  # irv2.training.metrics.Predictions
    seconds: float
    references: list[Reference] = field(default_factory=list)
    paired: str = ""  # class folders and outputs, how many

    @property
    def top1_interval(self) -> Interval:
        """95 % interval, in percent."""
        return wilson(self.predictions.top1_correct, self.predictions.images)

    @property
    def top5_interval(self) -> Interval:
        """95 % interval, in percent."""
        return wilson(self.predictions.top5_correct, self.predictions.images)


def rows(result: Result) -> Rows:
    """Describe one evaluation in (name, value) rows."""
    predictions = result.predictions
    images = f"{predictions.images:,} of {result.data}"
    if predictions.images < result.images_in_data:
        images += f" ({result.images_in_data - predictions.images:,} left out)"
    if result.resized_to is not None:
        images += f", scaled down to a shorter side of {result.resized_to} px"
    return [
        ("weights", f"{result.name} ({result.which})"),
        ("images", images),
        ("labels", _labels(result)),
        ("view", _view(result)),
        ("top-1", _rate(predictions.top1, predictions.top1_correct, result.top1_interval)),
        ("top-5", _rate(predictions.top5, predictions.top5_correct, result.top5_interval)),
        ("classes", f"{predictions.mean_per_class:.3f} % top-1, mean over classes"),
        ("loss", f"{predictions.mean_loss:.4f}"),
        ("time", f"{result.seconds:.1f} s, {predictions.images / result.seconds:.0f} images/s"),
        *[("compare", line) for line in _beside_published(result)],
    ]


def _labels(result: Result) -> str:
    """Kind of the labels, and the files that changed them."""
    kinds = {
        "folders": "class folders, by name",
        "order": "class folders in their order, as the network does not name its classes",
        "natural order": "class folders in natural order, as the network does not name its classes",
        "numbered": "class folders, numbers of outputs",
        "class index": "class folders, among whose classes alone it chooses",
        "real": "ReaL, any of several",
    }
    if "labels" in result.selection:
        kinds["folders"] = "of each image, by name"
    files = [f"--{option.replace('_', '-')} {path}" for option, path in result.selection.items()]
    paired = [result.paired] if result.paired else []
    return "; ".join([kinds[result.labels], *files, *paired])


def _view(result: Result) -> str:
    view = result.view
    text = f"{view['protocol']}, {view['image_size']} px"
    if view["protocol"] in ("timm", "flip"):
        text += f", crop {view['eval_crop']:g}, {view['eval_interpolation']}"
    for key in ("mean", "std"):
        if view.get(key, HALVES) != HALVES:
            text += f", {key} {' '.join(f'{value:g}' for value in view[key])}"
    return text + ("" if result.precision == "fp32" else f"; {result.precision}")


def _rate(percent: float, correct: int, interval: Interval) -> str:
    between = f"95 % interval {interval.low:.2f} to {interval.high:.2f}"
    return f"{percent:.3f} %  ({correct:,} correct; {between})"


def _beside_published(result: Result) -> list[str]:
    """Lines on the result's distance from each published one, in images."""
    predictions, lines = result.predictions, []
    for reference in result.references:
        parts = []
        for name, correct, interval, published in (
            ("top-1", predictions.top1_correct, result.top1_interval, reference.top1),
            ("top-5", predictions.top5_correct, result.top5_interval, reference.top5),
        ):
            here = distance(correct, predictions.images, interval, published)
            where = "within" if here.within else "outside"
            parts.append(f"{name} {published:g} %: {here.images:+,} images, {where} the interval")
        lines.append(f"{reference.name}: {'; '.join(parts)} [{reference.source}]")
    return lines


def in_lines(pairs: Rows) -> str:
    """Format (name, value) rows as text."""
    return "\n".join(f"{name:<8} {shown(value)}" for name, value in pairs)


def side_by_side(results: list[Result]) -> str:
    """Format several evaluations: rows that they share, a line each, and the rows of each alone."""
    every = [[row for row in rows(result) if row[0] in BESIDE_TABLE] for result in results]
    shared = [row for row in every[0] if all(row in each for each in every)]
    own = [
        (row[0], f"{result.name}: {row[1]}")
        for result, each in zip(results, every)
        for row in each
        if row not in shared
    ]
    return "\n\n".join(part for part in (in_lines(shared), table(results), in_lines(own)) if part)


def table(results: list[Result]) -> str:
    """Format several evaluations, a line each."""
    names = [shown(f"{result.name} ({result.which})") for result in results]
    width = max(len("weights"), *map(len, names))
    lines = [
        f"{'weights':<{width}}  {'top-1':>8}  {'95 % interval':>16}  {'top-5':>8}  {'loss':>7}"
    ]
    for name, result in zip(names, results):
        predictions, interval = result.predictions, result.top1_interval
        between = f"{interval.low:.2f} to {interval.high:.2f}"
        lines.append(
            f"{name:<{width}}  {predictions.top1:8.3f}  {between:>16}  {predictions.top5:8.3f}  "
            f"{predictions.mean_loss:7.4f}"
        )
    return "\n".join(lines)


def comparisons(results: list[Result]) -> list[dict[str, Any]]:
    """McNemar's test of each pair, on the same images."""
    pairs = []
    for first, second in combinations(results, 2):
        right = [result.predictions.rank < 1 for result in (first, second)]
        paired = mcnemar(*right)
        pairs.append({"first": first.name, "second": second.name, **paired._asdict()})
    return pairs


def in_words(results: list[Result], compare: bool = False) -> str:
    """Format one result as lines, several side by side; with `compare` also each pair."""
    text = in_lines(rows(results[0])) if len(results) == 1 else side_by_side(results)
    pairs = comparisons(results) if compare else []
    return "\n".join([text, *map(_compared, pairs)])


def _compared(comparison: dict[str, Any]) -> str:
    """Format a comparison as a line."""
    return shown(
        f"{comparison['first']} against {comparison['second']}: right where the other is wrong on "
        f"{comparison['only_first']:,} and {comparison['only_second']:,} images, "
        f"McNemar's p = {comparison['p_value']:.3g}"
    )


def as_json(result: Result, software: dict[str, str]) -> dict[str, Any]:
    """Everything about an evaluation, for programs."""
    predictions = result.predictions
    published = []
    for reference in result.references:
        entry = reference._asdict()
        for name, correct, interval in (
            ("top1", predictions.top1_correct, result.top1_interval),
            ("top5", predictions.top5_correct, result.top5_interval),
        ):
            here = distance(correct, predictions.images, interval, entry[name])
            entry |= {f"{name}_difference": here.images, f"{name}_within": here.within}
        published.append(entry)
    return {
        "top1": predictions.top1,
        "top5": predictions.top5,
        "top1_interval": list(result.top1_interval),
        "top5_interval": list(result.top5_interval),
        "top1_correct": predictions.top1_correct,
        "top5_correct": predictions.top5_correct,
        "images": predictions.images,
        "mean_per_class": predictions.mean_per_class,
        "loss": predictions.mean_loss if math.isfinite(predictions.mean_loss) else None,
        "weights": result.which,
        "step": result.step,
        "source": result.name,
        "data": result.data,
        "labels": result.labels,
        "selection": result.selection,
        "resized_to": result.resized_to,
        **result.view,
        "precision": result.precision,
        "references": published,
        "software": software,
    }
