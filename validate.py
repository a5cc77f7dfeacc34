#!/usr/bin/env python3
"""Evaluate runs or published weights: exact top-1 and top-5, every image counted once.

  python validate.py --run runs/quickstart
  python validate.py --weights timm:inception_resnet_v2.tf_in1k --data IMAGENET/val
  torchrun --nproc-per-node=8 -- validate.py --run runs/irv2_rmsprop --json result.json
  python validate.py --run runs/quickstart --report runs/quickstart/report
  python validate.py --weights A.safetensors B.safetensors --data DIR --compare --ensemble

Runs say themselves how their images are to be seen; for other weights it is 299 px, crop 0.8975,
bicubic, mean = std = 0.5. Exit status: 0 done, 1 something must be mended first, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import exam
from data import loader, sources, stream, workers
from data.protocols import PROTOCOLS
from exam import Exam, LabelFiles
from irv2 import checkpoint, distributed, engine, imagenet_names, jsonl, rundir, trained, weights
from irv2.distributed import World
from irv2.folding import fold_batch_norm
from irv2.metrics import Collector, Predictions, Scored
from irv2.program import exit_status
from irv2.trained import Trained
from report import evaluation, reference, result
from report.result import Result
from scripts.arguments import share, whole

MISTAKES = (
    checkpoint.CheckpointError,
    distributed.WorldError,
    reference.PublishedError,
    sources.DataError,
    weights.WeightsError,
    OSError,  # no permission, no space: its own words name the file
)
REFERENCE = Path(__file__).parent / "configs" / "reference.yaml"


def validate(arguments: argparse.Namespace, world: World) -> None:
    """Evaluations from their weights to their tables."""
    # Everything that can be wrong is looked at before the first image
    references = reference.read(arguments.reference)
    files = LabelFiles(arguments.class_index, arguments.real, arguments.subset, arguments.exclude)
    exams = [
        exam.prepare(network, stated(arguments), files, arguments.allow_resized)
        for network in open_networks(arguments, world)
    ]
    if arguments.ensemble or arguments.compare:
        exam.check_comparable(exams)
    if arguments.fast:
        check_compiler(world.device)
    check_outputs(arguments.json, arguments.report)

    # Counts
    results = []
    precision = "fast" if arguments.fast else arguments.precision
    sizes: list[np.ndarray] = []  # of the images of each exam
    sums: list[Scored] = []  # probabilities, added up over the networks
    for each in exams:
        started = time.perf_counter()
        seen: dict[int, np.ndarray] = {}
        scored = scores(each, seen, arguments, world)
        if arguments.ensemble:
            scored = adding_up(scored, sums)
        predictions = counted(scored, each, world)
        seconds = time.perf_counter() - started
        sizes.append(gathered(seen, world))
        results.append(exam.outcome(each, predictions, seconds, precision, references))
    if arguments.ensemble:
        predictions = engine.collect(mean_of(sums, len(exams)), world)
        seconds = sum(each.seconds for each in results)
        results.append(exam.ensemble_of(exams, predictions, seconds, precision, references))

    # Report
    if world.is_main:
        tell(results, arguments)
        if arguments.report is not None:
            write_pages(exams, results, sizes, arguments)


def open_networks(arguments: argparse.Namespace, world: World) -> list[Trained]:
    """What the command line asks for. Raises CheckpointError or WeightsError."""
    if arguments.weights is not None:
        return [trained.of_weights(source) for source in arguments.weights]
    if not (arguments.all or arguments.average):
        return [trained.of_run(arguments.run, arguments.which, world.say)]
    found = trained.of_checkpoints(arguments.run, arguments.which, world.say, arguments.average)
    if arguments.all:
        return found
    if len(found) < arguments.average:
        raise checkpoint.CheckpointError(
            f"{arguments.run}: --average {arguments.average} needs as many checkpoints, and it has "
            f"{len(found)}; train with a larger checkpoint.keep"
        )
    return [trained.averaged(found)]


def check_compiler(device: torch.device) -> None:
    """Raise WorldError where torch.compile would find no compiler."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise distributed.WorldError(
            "--fast compiles the network, and there is no C++ compiler (g++) here; "
            "use --precision bf16"
        )


def check_outputs(json_path: Path | None, report_folder: Path | None) -> None:
    """Make the folders that results go to. Raises OSError where they could not be written."""
    if json_path is not None and json_path.is_dir():
        raise IsADirectoryError(f"{json_path}: is a folder; --json wants the name of a file")
    for folder in (json_path and json_path.parent, report_folder):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"{folder}: cannot be written to ({error.strerror})") from None


def stated(arguments: argparse.Namespace) -> dict[str, Any]:
    """The evaluation settings stated on the command line, under their config names."""
    settings = {
        "val": arguments.data,
        "image_size": arguments.image_size,
        "eval_crop": arguments.crop,
        "eval_interpolation": arguments.interpolation,
        "protocol": arguments.protocol,
    }
    return {key: value for key, value in settings.items() if value is not None}


def scores(
    each: Exam, sizes: dict[int, np.ndarray], arguments: argparse.Namespace, world: World
) -> Iterator[Scored]:
    """What a network says of this rank's images; `sizes` learns their width and height."""
    model, precision, competing = each.network.model, arguments.precision, each.labels.competing
    if arguments.fast:
        model, precision = fold_batch_norm(model), "bf16"
    model = model.to(world.device, memory_format=torch.channels_last)
    options = engine.EvalOptions(
        precision,
        PROTOCOLS[arguments.protocol].mirrored,
        None if competing is None else torch.from_numpy(competing).to(world.device),
        arguments.batch,
    )
    processes = workers.Workers(arguments.workers)
    batches = exam.batches(each, arguments.batch, processes, sizes, world)
    return engine.scored(torch.compile(model) if arguments.fast else model, batches, options)


def counted(scored: Iterable[Scored], each: Exam, world: World) -> Predictions:
    """All ranks' answers, ranked, with a progress bar on a terminal."""
    hidden = not (world.is_main and sys.stderr.isatty())
    title = Path(each.network.name).name
    share = stream.evaluation_share(len(each.labels.indices), world.rank, world.size)
    with tqdm(total=len(share), desc=title, unit="image", leave=False, disable=hidden) as bar:
        return engine.collect(scored, world, shown_on(bar))


def adding_up(batches: Iterable[Scored], sums: list[Scored]) -> Iterator[Scored]:
    """The batches, whose probabilities are added to `sums`, as logarithms, batch by batch."""
    for number, batch in enumerate(batches):
        logarithms = batch.scores.float().log_softmax(1).cpu()
        if number == len(sums):
            sums.append(Scored(logarithms, batch.answers.cpu(), batch.indices))
        else:
            total = torch.logaddexp(sums[number].scores, logarithms)
            sums[number] = sums[number]._replace(scores=total)
        yield batch


def mean_of(sums: list[Scored], networks: int) -> Iterator[Scored]:
    """Logarithms of sums of probabilities -> of their mean, which rank as scores."""
    for batch in sums:
        yield batch._replace(scores=batch.scores - math.log(networks))


def shown_on(bar: tqdm) -> Callable[[int, Collector], None]:
    """What moves the bar on, and shows this rank's top-1 at most once a second: it waits for the
    device."""
    last = [time.perf_counter()]

    def show(images: int, collected: Collector) -> None:
        if not bar.disable and time.perf_counter() - last[0] > 1:
            bar.set_postfix_str(f"top-1 {collected.top1():.2f} %", refresh=False)
            last[0] = time.perf_counter()
        bar.update(images)

    return show


def gathered(sizes: dict[int, np.ndarray], world: World) -> np.ndarray:
    """All ranks' image sizes in order of the images: int32 [N, 2]."""
    pairs = world.gather(list(sizes.items()))
    return np.array([size for _, size in sorted(pairs, key=lambda pair: pair[0])])


def tell(results: list[Result], arguments: argparse.Namespace) -> None:
    """Write --json, and print the outcome."""
    compared = result.comparisons(results) if arguments.compare else []
    if arguments.json is not None:
        content = [result.as_json(each, rundir.software()) for each in results]
        several = {"results": content, "comparisons": compared}
        written = content[0] if len(content) == 1 else several
        text = json.dumps(written, indent=2, allow_nan=False) + "\n"
        checkpoint.write_atomically(arguments.json, lambda file: file.write(text.encode()))
    if len(results) == 1:
        print(result.in_lines(result.rows(results[0])))
    else:
        print(result.side_by_side(results))
    for comparison in compared:
        print(result.in_words(comparison))


def write_pages(
    exams: list[Exam],
    results: list[Result],
    sizes: list[np.ndarray],
    arguments: argparse.Namespace,
) -> None:
    """The page of each result, in folders 1, 2, … where there are several."""
    for number, each in enumerate(results):
        place_of_exam = min(number, len(exams) - 1)  # the ensemble, of the same images, comes last
        asked = exams[place_of_exam]
        place = arguments.report if len(results) == 1 else arguments.report / str(number + 1)
        page = evaluation.Evaluation(
            title=f"{each.name} ({each.which})",
            facts=result.rows(each),
            predictions=each.predictions,
            classes=asked.classes,
            names=[imagenet_names.in_words(name) for name in asked.classes],
            image_name=asked.source.name,
            thumbnail=picture_of(asked.source),
            sizes=sizes[place_of_exam],
            log=[] if each.step is None else log_of(asked.network.name),
        )
        evaluation.write(place, page)
        print(f"report   {place / 'index.html'}")


def log_of(weights_path: str) -> list[dict[str, Any]]:
    """The log of the run that weights come from, if they still lie in its directory."""
    for folder in Path(weights_path).parents[:2]:
        if (folder / "log.jsonl").exists():
            return jsonl.read(folder / "log.jsonl")
    return []


def picture_of(source: sources.Source) -> Callable[[int], Image.Image]:
    """Image number -> picture."""
    return lambda index: Image.fromarray(loader.read_image(source, index)[0])


def parse_arguments() -> argparse.Namespace:
    described = "\n".join(f"  {name:<13} {each.description}" for name, each in PROTOCOLS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"protocols, over whose views the softmax is averaged:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what is evaluated")
    subject = add.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", type=Path, metavar="DIR", help="a run's newest checkpoint")
    subject.add_argument(
        "--weights",
        nargs="+",
        metavar="FILE|timm:NAME",
        help=".pth, .pt or .safetensors files with timm's names, or weights from timm's hub",
    )
    add.add_argument(
        "--which", choices=["ema", "raw"], help="of a run: averaged weights (default) or raw"
    )
    add.add_argument("--all", action="store_true", help="of a run: each of its checkpoints")
    add.add_argument(
        "--average",
        type=whole(2),
        metavar="N",
        help="of a run: the mean of the weights of its newest N checkpoints",
    )
    add.add_argument(
        "--ensemble", action="store_true", help="also the mean of all networks' probabilities"
    )

    add = parser.add_argument_group("images and labels")
    add.add_argument("--data", metavar="DIR", help="images; default: the run's data.val")
    add.add_argument(
        "--allow-resized", action="store_true", help="evaluate shards of scaled-down images, too"
    )
    add.add_argument("--subset", type=Path, metavar="FILE", help="only the images it lists")
    add.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="all but the images it lists, by file name, or by number as the ImageNet devkit's "
        "blacklist",
    )
    labels = add.add_mutually_exclusive_group()
    labels.add_argument(
        "--real", type=Path, metavar="JSON", help="ReaL labels of ImageNet's validation images"
    )
    labels.add_argument(
        "--class-index",
        type=Path,
        metavar="FILE",
        help="which class folder is which output, if only some outputs compete (ImageNet-A, -R): "
        'folder names one a line, or JSON, {"0": ["n01440764", "tench"]} or {"n01440764": 0}',
    )

    add = parser.add_argument_group("how")
    add.add_argument("--protocol", choices=list(PROTOCOLS), default="timm", help="see below")
    add.add_argument("--image-size", type=whole(75), metavar="PX", help="side of the input")
    add.add_argument("--crop", type=share, help="centre crop's share of the resized side")
    add.add_argument("--interpolation", choices=["bicubic", "bilinear"])
    add.add_argument("--batch", type=whole(1), default=64, help="views at once (default: 64)")
    add.add_argument("--workers", type=whole(0), help="loader processes of each rank")
    add.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    speed = add.add_mutually_exclusive_group()
    speed.add_argument("--precision", choices=list(engine.PRECISIONS), default="fp32")
    speed.add_argument(
        "--fast", action="store_true", help="bf16, batch norm folded, compiled: not for the record"
    )

    add = parser.add_argument_group("what is told")
    add.add_argument("--compare", action="store_true", help="McNemar's test of each pair")
    add.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    add.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="also write a page (index.html), per_class.csv and predictions.csv.gz there",
    )
    add.add_argument(
        "--reference",
        type=Path,
        metavar="YAML",
        default=REFERENCE,
        help="published results to compare with (default: configs/reference.yaml)",
    )
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    return arguments


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a message where options do not go together."""
    if arguments.run is None and (arguments.all or arguments.average):
        parser.error("--all and --average are of a run: --run DIR")
    if arguments.run is None and arguments.which:
        parser.error("--which is of a run: --run DIR")
    arguments.which = arguments.which or "ema"
    if arguments.all and arguments.average:
        parser.error("--all and --average: one of them")
    is_several = arguments.all or (arguments.weights is not None and len(arguments.weights) > 1)
    if (arguments.ensemble or arguments.compare) and not is_several:
        parser.error("--ensemble and --compare want several networks: --weights A B, or --all")
    has_crop = arguments.crop is not None or arguments.interpolation is not None
    if has_crop and arguments.protocol not in ("timm", "flip"):
        parser.error(f"--crop and --interpolation are not of --protocol {arguments.protocol}")


def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()

    def body() -> int:
        with distributed.start(arguments.device) as world, workers.worker_errors():
            validate(arguments, world)
        return 0

    return exit_status(
        body,
        MISTAKES,
        of_one_rank=(sources.ImageError, sources.StorageError, workers.WorkerError),
    )


if __name__ == "__main__":
    sys.exit(main())
