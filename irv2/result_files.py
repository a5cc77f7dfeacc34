"""Results of evaluations as files: JSON for programs, pages for people."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from data import loader
from data.base import Source
from data.files import write_atomically
from data.names import shown
from irv2 import explain
from irv2.network import imagenet_names
from irv2.report import evaluations
from irv2.report.evaluations import Content
from irv2.report.reference import distance
from irv2.results import Result, comparisons, rows
from irv2.run import directory, jsonl


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
    content = list(map(as_json, results))
    several = {"results": content, "comparisons": comparisons(results) if compare else []}
    written = content[0] if len(content) == 1 else several
    write_atomically(path, json.dumps(written, indent=2, allow_nan=False) + "\n")


def as_json(result: Result) -> dict[str, Any]:
    """Everything about a result, for programs."""
    predictions, evaluation = result.predictions, result.evaluation
    published = []
    for entry in (each._asdict() for each in result.references):
        for key, (correct, _, interval) in result.rates.items():
            here = distance(correct, predictions.images, interval, entry[key])
            entry |= {f"{key}_difference": here.images, f"{key}_within": here.within}
        published.append(entry)
    (top1_correct, top1, top1_interval), (top5_correct, top5, top5_interval) = result.rates.values()
    return {
        "top1": top1,
        "top5": top5,
        "top1_interval": list(top1_interval),
        "top5_interval": list(top5_interval),
        "top1_correct": top1_correct,
        "top5_correct": top5_correct,
        "images": predictions.images,
        "mean_per_class": predictions.mean_per_class,
        "loss": predictions.mean_loss if math.isfinite(predictions.mean_loss) else None,
        "weights": result.which,
        "step": result.step,
        "source": result.name,
        "data": evaluation.images,
        "labels": evaluation.labels.name,
        "selection": result.selection,
        "resized_to": evaluation.source.resized_to,
        **result.view,
        "precision": result.precision,
        "references": published,
        "software": directory.software(),
    }


def write_pages(folder: Path, results: list[Result], explained: bool = False) -> None:
    """Write the page of each result, in folders 1, 2, … where there are several.

    explained: show where the network looked in its most confident mistakes.
    """
    for number, result in enumerate(results, 1):
        place = folder if len(results) == 1 else folder / str(number)
        evaluation = result.evaluation
        content = Content(
            title=f"{result.name} ({result.which})",
            facts=rows(result),
            predictions=result.predictions,
            classes=evaluation.classes,
            names=imagenet_names.in_words(evaluation.classes),
            image_name=evaluation.source.name,
            thumbnail=_thumbnails(evaluation.source),
            explanation=explain.of_images(evaluation) if explained else None,
            log=[] if result.step is None else log_beside(evaluation.network.name),
        )
        evaluations.write(place, content)
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
