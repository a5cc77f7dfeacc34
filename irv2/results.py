"""Results of evaluations, beside published ones, as lines for people."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from data.names import in_order, shown
from irv2.evaluation import Evaluation
from irv2.network import imagenet_names
from irv2.report import reference
from irv2.report.reference import Reference, distance
from irv2.report.statistics import Interval, mcnemar, wilson
from irv2.training.metrics import Predictions

Rows = list[tuple[str, str]]
VIEW = ("image_size", "eval_crop", "eval_interpolation", "mean", "std")  # keys of section "data"
HALVES = [0.5, 0.5, 0.5]  # the published networks' mean and deviation, which go without saying
BESIDE_TABLE = ("images", "labels", "view", "compare")  # rows that its columns do not hold
LABELS = {
    "folders": "class folders, by name",
    "labels": "of each image, by name",
    "order": "class folders in their order, as the network does not name its classes",
    "natural order": "class folders in natural order, as the network does not name its classes",
    "numbered": "class folders, numbers of outputs",
    "class index": "class folders, among whose classes alone it chooses",
    "real": "ReaL, any of several",
}  # kinds of label sets


@dataclass(frozen=True)
class Result:
    """Outcome of an evaluation, or of an ensemble on the images of its first network's."""

    evaluation: Evaluation
    name: str  # of the weights
    which: str  # "ema", "raw", "as published"; "mean softmax" of an ensemble
    step: int | None
    predictions: Predictions
    seconds: float
    precision: str
    references: list[Reference]  # published results on the same images

    @property
    def view(self) -> dict[str, Any]:
        """View of the images: the protocol and the keys of VIEW."""
        return _view(self.evaluation)

    @property
    def selection(self) -> dict[str, str]:
        """Files and orders that say which images count or what is right, by option."""
        return {key: str(value) for key, value in self.evaluation.files._asdict().items() if value}

    @property
    def rates(self) -> dict[str, tuple[int, float, Interval]]:
        """Correct images, percent and its 95 % interval, of "top1" and "top5"."""
        p = self.predictions
        return {
            "top1": (p.top1_correct, p.top1, wilson(p.top1_correct, p.images)),
            "top5": (p.top5_correct, p.top5, wilson(p.top5_correct, p.images)),
        }


def of_network(
    evaluation: Evaluation,
    predictions: Predictions,
    seconds: float,
    precision: str,
    references: list[Reference],
) -> Result:
    """Result of one network, beside published results on the same images."""
    network = evaluation.network
    published = _published(evaluation, predictions, references, networks=1)
    about = (network.name, network.which, network.step)
    return Result(evaluation, *about, predictions, seconds, precision, published)


def of_ensemble(
    results: list[Result], predictions: Predictions, references: list[Reference]
) -> Result:
    """Result of the mean of several networks' probabilities."""
    first, count = results[0], len(results)
    return replace(
        first,
        name=f"ensemble of {count}",
        which="mean softmax",
        step=None,
        predictions=predictions,
        seconds=sum(each.seconds for each in results),
        references=_published(first.evaluation, predictions, references, networks=count),
    )


def _view(evaluation: Evaluation) -> dict[str, Any]:
    keys = {key: getattr(evaluation.data, key) for key in VIEW}
    return {"protocol": evaluation.protocol, **keys}


def _published(
    evaluation: Evaluation, predictions: Predictions, references: list[Reference], networks: int
) -> list[Reference]:
    """Published results on the same images, labels and protocol."""
    labels, synsets = evaluation.labels, imagenet_names.synsets()
    if evaluation.network.classes != synsets:
        return []
    competing = labels.competing
    asked = (
        None if competing is None else [n for n, is_asked in zip(synsets, competing) if is_asked]
    )
    references = [each for each in references if each.classes == asked]
    kinds = {"folders": "imagenet", "class index": "imagenet", "numbered": "imagenetv2"}
    kind = kinds.get(labels.name, labels.name)
    view = {key: value for key, value in _view(evaluation).items() if key in Reference._fields}
    return reference.matching(
        references, labels=kind, images=predictions.images, ensemble=networks, **view
    )


# ------------------------------------------------------------------------ lines


def in_words(results: list[Result], compare: bool = False) -> str:
    """Format one result as lines, several side by side; with `compare` also each pair."""
    text = _lines(rows(results[0])) if len(results) == 1 else _side_by_side(results)
    pairs = comparisons(results) if compare else []
    return "\n".join([text, *map(_compared, pairs)])


def rows(result: Result) -> Rows:
    """Describe a result in (name, value) rows."""
    predictions, source = result.predictions, result.evaluation.source
    images = f"{predictions.images:,} of {result.evaluation.images}"
    if predictions.images < len(source):
        images += f" ({len(source) - predictions.images:,} left out)"
    if source.resized_to is not None:
        images += f", scaled down to a shorter side of {source.resized_to} px"
    return [
        ("weights", f"{result.name} ({result.which})"),
        ("images", images),
        ("labels", _labels(result)),
        ("view", _view_in_words(result)),
        ("top-1", _rate(*result.rates["top1"])),
        ("top-5", _rate(*result.rates["top5"])),
        ("classes", f"{predictions.mean_per_class:.3f} % top-1, mean over classes"),
        ("loss", f"{predictions.mean_loss:.4f}"),
        ("time", f"{result.seconds:.1f} s, {predictions.images / result.seconds:.0f} images/s"),
        *[("compare", line) for line in _beside_published(result)],
    ]


def _labels(result: Result) -> str:
    """Kind of the labels, the files that changed them, and which class folder is which output."""
    evaluation = result.evaluation
    kind, noun = evaluation.labels.name, "folders"
    if evaluation.files.labels is not None:
        kind, noun = kind.replace("folders", "labels"), "classes"
    files = [f"--{option.replace('_', '-')} {path}" for option, path in result.selection.items()]
    folders, outputs = evaluation.source.classes, evaluation.network.model.num_classes
    ordered = in_order([folders[place] for place in evaluation.labels.outputs.argsort()])
    return "; ".join(
        [LABELS[kind], *files, f"{len(folders):,} {noun} for {outputs:,} outputs: {ordered}"]
    )


def _view_in_words(result: Result) -> str:
    view = result.view
    text = f"{view['protocol']}, {view['image_size']} px"
    if view["protocol"] in ("timm", "flip"):
        text += f", crop {view['eval_crop']:g}, {view['eval_interpolation']}"
    for key in ("mean", "std"):
        if view[key] != HALVES:
            text += f", {key} {' '.join(f'{value:g}' for value in view[key])}"
    return text + ("" if result.precision == "fp32" else f"; {result.precision}")


def _rate(correct: int, percent: float, interval: Interval) -> str:
    between = f"95 % interval {interval.low:.2f} to {interval.high:.2f}"
    return f"{percent:.3f} %  ({correct:,} correct; {between})"


def _beside_published(result: Result) -> list[str]:
    """Lines on the result's distance from each published one, in images."""
    lines = []
    for published in result.references:
        parts = []
        for key, (correct, _, interval) in result.rates.items():
            percent = getattr(published, key)
            here = distance(correct, result.predictions.images, interval, percent)
            name, where = key.replace("top", "top-"), "within" if here.within else "outside"
            parts.append(f"{name} {percent:g} %: {here.images:+,} images, {where} the interval")
        lines.append(f"{published.name}: {'; '.join(parts)} [{published.source}]")
    return lines


def _lines(pairs: Rows) -> str:
    """Format (name, value) rows as text."""
    return "\n".join(f"{name:<8} {shown(value)}" for name, value in pairs)


def _side_by_side(results: list[Result]) -> str:
    """Format several results: rows that they share, a table, and the rows of each alone."""
    every = [[row for row in rows(result) if row[0] in BESIDE_TABLE] for result in results]
    shared = [row for row in every[0] if all(row in each for each in every)]
    own = [
        (row[0], f"{result.name}: {row[1]}")
        for result, each in zip(results, every)
        for row in each
        if row not in shared
    ]
    return "\n\n".join(part for part in (_lines(shared), _table(results), _lines(own)) if part)


def _table(results: list[Result]) -> str:
    """Format several results, a line each."""
    names = [shown(f"{result.name} ({result.which})") for result in results]
    width = max(len("weights"), *map(len, names))
    lines = [
        f"{'weights':<{width}}  {'top-1':>8}  {'95 % interval':>16}  {'top-5':>8}  {'loss':>7}"
    ]
    for name, result in zip(names, results):
        _, top1, (low, high) = result.rates["top1"]
        between, top5 = f"{low:.2f} to {high:.2f}", result.predictions.top5
        loss = result.predictions.mean_loss
        lines.append(f"{name:<{width}}  {top1:8.3f}  {between:>16}  {top5:8.3f}  {loss:7.4f}")
    return "\n".join(lines)


def comparisons(results: list[Result]) -> list[dict[str, Any]]:
    """McNemar's test of each pair, on the same images."""
    pairs = []
    for first, second in combinations(results, 2):
        paired = mcnemar(*(each.predictions.rank < 1 for each in (first, second)))
        pairs.append({"first": first.name, "second": second.name, **paired._asdict()})
    return pairs


def _compared(comparison: dict[str, Any]) -> str:
    """Format a comparison as a line."""
    return shown(
        f"{comparison['first']} against {comparison['second']}: right where the other is wrong on "
        f"{comparison['only_first']:,} and {comparison['only_second']:,} images, "
        f"McNemar's p = {comparison['p_value']:.3g}"
    )
