#!/usr/bin/env python3
"""Evaluate a run or published weights: exact top-1 and top-5, every image counted once.

  python validate.py --run runs/quickstart
  python validate.py --weights timm:inception_resnet_v2.tf_in1k --data IMAGENET/val
  torchrun --nproc-per-node=8 -- validate.py --run runs/irv2_rmsprop --json result.json

Runs say themselves how their images are to be seen; for other weights it is 299 px, crop 0.8975,
bicubic, mean = std = 0.5. Exit status: 0 done, 1 something must be mended first, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data import loader, shards, sources, stream, transforms, workers
from data.to_input import ToInput
from irv2 import checkpoint, distributed, engine, rundir, trained, weights
from irv2.distributed import World
from irv2.metrics import Predictions
from irv2.trained import Trained

MISTAKES = (
    checkpoint.CheckpointError,
    distributed.WorldError,
    sources.DataError,
    weights.WeightsError,
    OSError,  # no permission, no space: its own words name the file
)


def validate(arguments: argparse.Namespace, world: World) -> None:
    """An evaluation from its weights to its table."""
    # Weights
    if arguments.run is not None:
        subject = trained.of_run(arguments.run, arguments.which, world.say)
    else:
        subject = trained.of_weights(arguments.weights)
    settings = {**subject.data, **given(arguments)}

    if arguments.json is not None and world.is_main:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)

    # Images
    if settings["val"] is None:
        raise sources.DataError("--data DIR is needed: these weights do not say what to look at")
    source = sources.open_source(settings["val"])
    is_allowed_by_run = arguments.data is None and settings.get("allow_resized")
    if not (arguments.allow_resized or is_allowed_by_run):
        shards.refuse_resized(source, settings["val"], "--allow-resized")
    if subject.classes is not None:
        sources.check_same_classes(source.classes, subject.classes, settings["val"], subject.name)
    elif len(source.classes) != subject.model.classif.out_features:
        raise sources.DataError(
            f"{settings['val']}: {len(source.classes)} classes, but {subject.name} tells apart "
            f"{subject.model.classif.out_features}"
        )

    # Counts
    started = time.perf_counter()
    model = subject.model.to(world.device, memory_format=torch.channels_last)
    result = evaluate(model, source, settings, arguments, world)
    seconds = time.perf_counter() - started

    # Report
    if world.is_main:
        settings["resized_to"] = getattr(source, "resized_to", None)
        print(table(subject, settings, result, seconds))
        if arguments.json is not None:
            write_json(arguments.json, subject, settings, result)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The evaluation settings stated on the command line, under their config names."""
    stated = {
        "val": arguments.data,
        "image_size": arguments.image_size,
        "eval_crop": arguments.crop,
        "eval_interpolation": arguments.interpolation,
    }
    return {key: value for key, value in stated.items() if value is not None}


def evaluate(
    model: nn.Module,
    source: sources.Source,
    settings: dict[str, Any],
    arguments: argparse.Namespace,
    world: World,
) -> Predictions:
    """Counts over all ranks, with a progress bar on a terminal."""
    view = transforms.EvalView(
        settings["image_size"], settings["eval_crop"], settings["eval_interpolation"]
    )
    keys = stream.evaluation_batches(len(source), arguments.batch, world.rank, world.size)
    to_input = ToInput(settings["mean"], settings["std"], world.device)
    processes = workers.Workers(arguments.workers)
    batches = loader.load(source, view, keys, to_input, processes)
    asked = ((b.images, b.labels, [index for _, index in b.keys]) for b in batches)
    hidden = not (world.is_main and sys.stderr.isatty())
    with tqdm(total=len(source), unit="image", leave=False, disable=hidden) as bar:
        return engine.evaluate(
            model,
            asked,
            world,
            engine.EvalOptions(arguments.precision),
            lambda images, _: bar.update(images * world.size),
        )


def table(subject: Trained, settings: dict[str, Any], result: Predictions, seconds: float) -> str:
    scaled = settings["resized_to"]
    smaller = "" if scaled is None else f", scaled down to a shorter side of {scaled} px"
    rows = (
        ("weights", f"{subject.name} ({subject.which})"),
        ("images", f"{result.images:,} of {settings['val']}{smaller}"),
        (
            "view",
            f"{settings['image_size']} px, crop {settings['eval_crop']:g}, "
            f"{settings['eval_interpolation']}",
        ),
        ("top-1", f"{result.top1:.3f} %  ({result.top1_correct:,} correct)"),
        ("top-5", f"{result.top5:.3f} %  ({result.top5_correct:,} correct)"),
        ("loss", f"{result.mean_loss:.4f}"),
        ("time", f"{seconds:.1f} s, {result.images / seconds:.0f} images/s"),
    )
    return "\n".join(f"{name:<8} {value}" for name, value in rows)


def write_json(path: Path, subject: Trained, settings: dict[str, Any], result: Predictions) -> None:
    content = {
        "top1": result.top1,
        "top5": result.top5,
        "top1_correct": result.top1_correct,
        "top5_correct": result.top5_correct,
        "images": result.images,
        "loss": result.mean_loss,
        "weights": subject.which,
        "step": subject.step,
        "source": subject.name,
        "data": settings["val"],
        "resized_to": settings["resized_to"],
        "image_size": settings["image_size"],
        "eval_crop": settings["eval_crop"],
        "eval_interpolation": settings["eval_interpolation"],
        "software": rundir.software(),
    }
    text = json.dumps(content, indent=2) + "\n"
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def whole(least: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return number


def share(text: str) -> float:
    """Argument type: a number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", type=Path, metavar="DIR", help="a run's newest checkpoint")
    subject.add_argument(
        "--weights",
        metavar="FILE|timm:NAME",
        help="a .pth, .pt or .safetensors file with timm's names, or weights from timm's hub",
    )
    parser.add_argument("--data", metavar="DIR", help="images; default: the run's data.val")
    parser.add_argument(
        "--allow-resized", action="store_true", help="evaluate shards of scaled-down images, too"
    )
    parser.add_argument(
        "--which", choices=["ema", "raw"], default="ema", help="of a run: averaged (default) or raw"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    parser.add_argument("--image-size", type=whole(75), metavar="PX", help="side of the input")
    parser.add_argument("--crop", type=share, help="centre crop's share of the resized side")
    parser.add_argument("--interpolation", choices=["bicubic", "bilinear"])
    parser.add_argument("--batch", type=whole(1), default=64, help="images at once (default: 64)")
    parser.add_argument("--workers", type=whole(0), help="loader processes of each rank")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=list(engine.PRECISIONS), default="fp32")
    return parser.parse_args()


def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()

    def body() -> int:
        with distributed.start(arguments.device) as world, workers.worker_errors():
            validate(arguments, world)
        return 0

    return distributed.exit_status(
        body, MISTAKES, of_one_rank=(sources.ImageError, workers.WorkerError)
    )


if __name__ == "__main__":
    sys.exit(main())
