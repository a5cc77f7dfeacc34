"""Results of evaluations, beside published ones: as lines, JSON and pages."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from data import loader
from data.base import Source
from data.files import write_atomically
from data.names import in_order, shown
from irv2.evaluation import Evaluation
from irv2.network import imagenet_names
from irv2.report import evaluations as pages
from irv2.report import reference, result
from irv2.report.reference import Reference
from irv2.report.result import Result
from irv2.run import directory, jsonl
from irv2.training.metrics import Predictions


def outcome(
    each: Evaluation,
    predictions: Predictions,
    started: float,
    precision: str,
    references: list[Reference],
) -> Result:
    """Result of one network, beside published results on the same images.

    started: when the evaluation began, by time.perf_counter().
    """
    network, labels = each.network, each.labels
    return Result(
        name=network.name,
        which=network.which,
        step=network.step,
        data=each.images,
        images_in_data=len(each.source),
        resized_to=each.source.resized_to,
        labels=labels.name,
        selection={option: str(path) for option, path in each.files._asdict().items() if path},
        view=_view(each),
        precision=precision,
        predictions=predictions,
        seconds=time.perf_counter() - started,
        references=_published(each, predictions, references, networks=1),
        paired=_paired(each),
    )


def _paired(each: Evaluation) -> str:
    """How many class folders stand for how many outputs, and the first and last of them."""
    folders, outputs = each.source.classes, each.network.model.num_classes
    noun = "folders" if each.files.labels is None else "classes"
    ordered = [folders[place] for place in each.labels.outputs.argsort()]
    return f"{len(folders):,} {noun} for {outputs:,} outputs: {in_order(ordered)}"


def ensemble_result(
    evaluations: list[Evaluation],
    results: list[Result],
    predictions: Predictions,
    references: list[Reference],
) -> Result:
    """Result of the mean of the networks' probabilities."""
    return replace(
        results[0],
        name=f"ensemble of {len(evaluations)}",
        which="mean softmax",
        step=None,
        predictions=predictions,
        seconds=sum(each.seconds for each in results),
        references=_published(evaluations[0], predictions, references, networks=len(evaluations)),
    )


def _view(each: Evaluation) -> dict[str, Any]:
    keys = ("image_size", "eval_crop", "eval_interpolation", "mean", "std")
    return {"protocol": each.protocol, **{key: getattr(each.data, key) for key in keys}}


def _published(
    each: Evaluation, predictions: Predictions, references: list[Reference], networks: int
) -> list[Reference]:
    """Published results on the same images, labels and protocol."""
    labels = each.labels
    if each.network.classes != imagenet_names.synsets() or labels.competing is not None:
        return []
    kind = {"folders": "imagenet", "numbered": "imagenetv2"}.get(labels.name, labels.name)
    view = {key: value for key, value in _view(each).items() if key in Reference._fields}
    return reference.matching(
        references, labels=kind, images=predictions.images, ensemble=networks, **view
    )


# ------------------------------------------------------------------------ writing


def check_writable(json_path: Path | None, report: Path | None) -> None:
    """Make the folders that results go to. Raises OSError if they cannot be written to."""
    if json_path is not None and json_path.is_dir():
        raise IsADirectoryError(f"{json_path}: is a folder; --json wants the name of a file")
    for folder in (json_path and json_path.parent, report):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"{folder}: cannot be written to ({error.strerror})") from None


def write_json(path: Path, results: list[Result], compare: bool) -> None:
    """Write results, and with `compare` McNemar's test of each pair, as JSON."""
    content = [result.as_json(each, directory.software()) for each in results]
    several = {
        "results": content,
        "comparisons": result.comparisons(results) if compare else [],
    }
    written = content[0] if len(content) == 1 else several
    text = json.dumps(written, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_pages(folder: Path, evaluations: list[Evaluation], results: list[Result]) -> None:
    """Write the page of each result, in folders 1, 2, … where there are several."""
    for number, each in enumerate(results):
        evaluation = evaluations[min(number, len(evaluations) - 1)]  # the ensemble's come last
        place = folder if len(results) == 1 else folder / str(number + 1)
        page = pages.Evaluation(
            title=f"{each.name} ({each.which})",
            facts=result.rows(each),
            predictions=each.predictions,
            classes=evaluation.classes,
            names=imagenet_names.in_words(evaluation.classes),
            image_name=evaluation.source.name,
            thumbnail=_thumbnails(evaluation.source),
            log=[] if each.step is None else log_beside(evaluation.network.name),
        )
        pages.write(place, page)
        print(shown(f"report   {place / 'index.html'}"))


def log_beside(weights_path: str) -> list[dict[str, Any]]:
    """Log of the run that weights come from, if they still lie in its directory."""
    for folder in Path(weights_path).parents[:2]:
        if (folder / "log.jsonl").exists():
            return jsonl.read(folder / "log.jsonl")
    return []


def _thumbnails(source: Source) -> Callable[[int], Image.Image]:
    """Image number -> picture."""
    return lambda index: Image.fromarray(loader.read_image(source, index)[0])
