"""A network in int8, and what that costs in accuracy."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import sources
from data.workers import TIMEOUT_S, Workers
from irv2 import cli, evaluation, formats, input_pipeline, scoring
from irv2.engines import int8
from irv2.engines.graph import onnx_graph
from irv2.evaluation import Evaluation, LabelFiles
from irv2.formats import ExportError
from irv2.run.trained import Trained
from irv2.training.distributed import World
from irv2.training.metrics import Predictions

ALONE = World(0, 1, torch.device("cpu"))
IMAGES, BATCH = 300, 10  # that ranges are measured on: NNCF's default
MAKERS = {
    "openvino": (int8.by_openvino, formats.save_openvino),
    "onnx": (int8.by_onnxruntime, formats.save_onnx),
}


class Quantized(NamedTuple):
    """A network in int8 that loses no more accuracy than allowed."""

    run: nn.Module
    save: Callable[[Path], None]


def quantized(
    network: Trained, arguments: argparse.Namespace, row: Callable[[str, str], None]
) -> Quantized:
    """Quantize a network and evaluate it before and after; `row` shows both.

    Raises ExportError if it loses more of top-1 than `arguments.most_loss` points, and DataError
    for images that cannot be used.
    """
    stated = {} if arguments.data is None else {"val": arguments.data}
    validation = evaluation.prepare(network, stated, LabelFiles())
    make, save = MAKERS[arguments.format]
    graph = onnx_graph(network.model.eval(), network.data.image_size)
    content, run = make(graph, calibration(network, arguments.calibrate))
    row("calibrated", f"on images of {arguments.calibrate}")
    before = evaluated(network.model, validation, "before")
    after = evaluated(run, validation, "int8")
    loss = before.top1 - after.top1
    row("before", in_words(before, validation))
    row("int8", f"{in_words(after, validation)}; {loss:+.2f} points lost, "
        f"allowed: {arguments.most_loss:g}")  # fmt: skip
    if not loss <= arguments.most_loss:
        raise ExportError(
            f"{arguments.out}: int8 loses {loss:.2f} points of top-1, more than --most-loss "
            f"{arguments.most_loss:g}; nothing was kept"
        )
    note = {
        "calibrated_on": Path(arguments.calibrate).name,  # no path of this machine
        "validated_on": Path(validation.images).name,
        "images": after.images,
        "top1_before": before.top1,
        "top1": after.top1,
    }
    texts = formats.metadata(network) | {"int8": json.dumps(note)}
    return Quantized(run, lambda path: save(content, path, texts))


def calibration(network: Trained, location: str) -> Iterator[Tensor]:
    """Yield batches of images from all over a data set, as the network takes them."""
    source = sources.open_source(location)
    count = min(IMAGES, len(source))
    numbers = [i * len(source) // count for i in range(count)]
    workers = Workers(0, TIMEOUT_S)
    for batch in input_pipeline.evaluation_batches(
        network.data, source, numbers, BATCH, workers, ALONE
    ):
        yield batch.images


def evaluated(run: nn.Module, validation: Evaluation, title: str) -> Predictions:
    """Evaluate a network on one process, with a bar on a terminal."""
    batches = validation.batches(64, Workers(None, TIMEOUT_S), ALONE)
    with cli.progress(title, validation.share(ALONE), ALONE) as shown:
        return scoring.collect(
            scoring.scored(run, batches, validation.options("fp32", 64, ALONE)), ALONE, shown
        )


def in_words(predictions: Predictions, validation: Evaluation) -> str:
    correct, images = predictions.top1_correct, predictions.images
    return (
        f"top-1 {predictions.top1:.2f} % ({correct:,} of {images:,} images of {validation.images})"
    )
