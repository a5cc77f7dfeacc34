#!/usr/bin/env python3
"""Evaluate runs or published weights: exact top-1 and top-5, every image counted once.

  python validate.py --run runs/quickstart [--report DIR]
  python validate.py --weights timm:inception_resnet_v2.tf_in1k --data IMAGENET/val
  torchrun --nproc-per-node=8 -- validate.py --run runs/irv2_rmsprop --json result.json
  python validate.py --weights A.safetensors B.safetensors --data DIR --compare --ensemble

Images are preprocessed as the run or the weights say, else as the published weights were: 299 px,
crop 0.8975, bicubic, mean = std = 0.5. Weights are read in the forms that docs/evaluation.md lists.
Exit status: 0 done, 1 something must be fixed first, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from data.protocols import PROTOCOLS
from data.workers import TIMEOUT_S, Workers, worker_errors
from irv2 import cli, evaluation, explain, result_files, results, scoring
from irv2.engines import choose
from irv2.evaluation import LabelFiles
from irv2.report import reference
from irv2.run import trained
from irv2.run.trained import Trained
from irv2.training import distributed
from irv2.training.distributed import World
from irv2.training.step import PRECISIONS

REFERENCE = Path(__file__).parent / "configs" / "reference.yaml"


def validate(options: argparse.Namespace, world: World) -> None:
    """Evaluate networks: weights -> images -> counts -> report."""
    # Check all that could be refused before reading the first image
    precision = "fast" if options.fast else options.precision
    choose.check(options.engine, precision, world.device)
    references = reference.read(options.reference)
    files = LabelFiles(*(getattr(options, name) for name in LabelFiles._fields))
    evaluations = [
        evaluation.prepare(network, stated(options), files, options.protocol, options.allow_resized)
        for network in open_networks(options, world)
    ]
    if options.ensemble or options.compare:
        evaluation.check_same_images(evaluations)
    if options.fast:
        scoring.check_compiler(world.device)
    if options.explain:
        explain.check_installed()
    result_files.check_writable(options.json, options.report)
    evaluation.say_remarks(evaluations, world.say)

    # Counts: every image once, on any number of ranks
    outcomes, ensemble = [], scoring.Ensemble()
    for each in evaluations:
        started = time.perf_counter()
        model = scoring.ready(each.network.model, world.device, options.fast)
        model = choose.runner(options.engine, model, precision, cli.remark)
        batches = each.batches(options.batch, Workers(options.workers, TIMEOUT_S), world)
        scored = scoring.scored(model, batches, each.options(precision, options.batch, world))
        if options.ensemble:
            scored = ensemble.adding(scored)
        with cli.progress(each.network.name, each.share(world), world) as shown:
            predictions = scoring.collect(scored, world, shown)
        scoring.check_finite(predictions, each.network.name, each.source.name)
        seconds, by = time.perf_counter() - started, choose.named(precision, model)
        outcomes.append(results.of_network(each, predictions, seconds, by, references))
    if options.ensemble:
        predictions = scoring.collect(ensemble.mean(), world)
        outcomes.append(results.of_ensemble(outcomes, predictions, references))

    # Report
    if world.is_main:
        if options.json is not None:
            result_files.write_json(options.json, outcomes, options.compare)
        print(results.in_words(outcomes, options.compare))
        if options.report is not None:
            result_files.write_pages(options.report, outcomes, options.explain)


def open_networks(options: argparse.Namespace, world: World) -> list[Trained]:
    """Load what the command line asks for. Raises CheckpointError or WeightsError."""
    if options.weights is not None:
        return [trained.load_weights(source, options.which) for source in options.weights]
    which = options.which or "ema"
    if options.average:
        newest = trained.load_checkpoints(options.run, which, world.say, options.average)
        return [trained.average(newest, options.average)]
    if options.all:
        return trained.load_checkpoints(options.run, which, world.say)
    return [trained.load_run(options.run, which, world.say)]


def stated(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluation settings stated on the command line, under their config names."""
    images = {} if options.data is None else {"val": options.data}
    return images | cli.stated_view(options)


def parse_arguments() -> argparse.Namespace:
    described = "\n".join(f"  {name:<13} {each.description}" for name, each in PROTOCOLS.items())
    parser = cli.Parser(
        description=__doc__,
        epilog=f"protocols, over whose views the softmax is averaged:\n{described}",
    )
    add = parser.add_argument_group("networks")
    cli.add_network(add, several=True)
    add.add_argument("--all", action="store_true", help="with --run: each of its checkpoints")
    add.add_argument(
        "--average",
        type=cli.whole(2),
        metavar="N",
        help="with --run: the mean of the weights of its newest N checkpoints",
    )
    add.add_argument(
        "--ensemble", action="store_true", help="also the mean of all networks' probabilities"
    )

    add = parser.add_argument_group("images and labels")
    add.add_argument(
        "--data", type=cli.location, metavar="DIR", help="images; default: the run's data.val"
    )
    add.add_argument("--labels", type=cli.path, metavar="FILE", help="classes, if DIR has none")
    add.add_argument(
        "--allow-resized", action="store_true", help="evaluate shards of scaled-down images, too"
    )
    add.add_argument("--subset", type=cli.path, metavar="FILE", help="only the images it lists")
    add.add_argument(
        "--exclude",
        type=cli.path,
        metavar="FILE",
        help="all but those it lists, by file name or number, as the ImageNet devkit's blacklist",
    )
    labels = add.add_mutually_exclusive_group()
    labels.add_argument(
        "--real", type=cli.path, metavar="JSON", help="ReaL labels of ImageNet's validation images"
    )
    labels.add_argument(
        "--class-index",
        type=cli.path,
        metavar="FILE",
        help="which class folder is which output, if only some outputs compete (ImageNet-A, -R): "
        'folder names one a line, or JSON, {"0": ["n01440764", "tench"]} or {"n01440764": 0}',
    )
    labels.add_argument(
        "--class-order",
        choices=["alphabetical", "natural"],
        help="order of class folders, if the network names no classes; natural: class2, class10",
    )

    add = parser.add_argument_group("evaluation")
    add.add_argument("--protocol", choices=list(PROTOCOLS), default="timm", help="see below")
    cli.add_view(add)
    add.add_argument("--batch", type=cli.whole(1), default=64, help="views at once (default: 64)")
    add.add_argument("--workers", type=cli.whole(0), help="loader processes of each rank")
    add.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    cli.add_engine(add)
    speed = add.add_mutually_exclusive_group()
    speed.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    speed.add_argument(
        "--fast", action="store_true", help="bf16, batch norm folded, compiled: not for the record"
    )

    add = parser.add_argument_group("output")
    add.add_argument("--compare", action="store_true", help="McNemar's test of each pair")
    add.add_argument("--json", type=cli.path, metavar="OUT", help="also write the result here")
    cli.add_report(add)
    add.add_argument(
        "--reference",
        type=cli.path,
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
    if arguments.all and arguments.average:
        parser.error("--all and --average: one of them")
    is_several = arguments.all or (arguments.weights is not None and len(arguments.weights) > 1)
    if (arguments.ensemble or arguments.compare) and not is_several:
        parser.error("--ensemble and --compare want several networks: --weights A B, or --all")
    if arguments.explain and arguments.report is None:
        parser.error("--explain is of a page: --report DIR")
    has_crop = arguments.crop is not None or arguments.interpolation is not None
    if has_crop and arguments.protocol not in ("timm", "flip"):
        parser.error(f"--crop and --interpolation do not go with --protocol {arguments.protocol}")


@cli.program
def main() -> int:
    """Command line -> exit status."""
    options = parse_arguments()
    with distributed.start(options.device) as world, worker_errors():
        validate(options, world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
