#!/usr/bin/env python3
"""Turn a folder of images into tar shards that train.py and validate.py read, index shards made by
others, or check shards against their index.

  python scripts/make_shards.py IMAGENET/train --out SHARDS/train
  python scripts/make_shards.py --index IMAGENET_WDS/train [--classes FILE]
  python scripts/make_shards.py --verify SHARDS/train

Shards are WebDataset's: KEY.jpg, KEY.cls (the label), KEY.json. The index, index.safetensors, lies
beside them; data.train=SHARDS/train then trains in the same order, on the same views, as the
folder. Writing that was interrupted is continued by the same command. Exit status: 0 done, 1
something must be fixed first, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import sources
from data.errors import DataError, enumeration
from data.prepare import shard_scan, shard_writer
from data.prepare.processes import run_all
from data.shards import index as shard_index
from data.workers import usable_cores
from irv2 import cli
from irv2.cli import positive


def write(arguments: argparse.Namespace) -> str:
    """Write shards; returns the summary."""
    source = sources.open_source(arguments.source)
    for line in source.remarks:
        cli.remark(f"note: {line}")
    base = os.path.basename(os.path.abspath(source.root or "images"))
    options = shard_writer.Options(
        re.sub(r"[^A-Za-z0-9_-]+", "_", base),
        arguments.images_per_shard,
        arguments.shorter_side,
        arguments.quality,
    )
    with progress(len(source), "image") as bar:
        index = shard_writer.write_shards(
            source,
            arguments.out,
            options,
            arguments.workers,
            lambda scan: bar.update(len(scan.samples)),
        )
    return summary(arguments.out, index)


def index_existing(arguments: argparse.Namespace) -> str:
    """Index existing shards; returns the summary."""
    given = None if arguments.classes is None else shard_scan.read_classes(arguments.classes)
    with progress(len(shard_scan.shards_in(arguments.index)), "shard") as bar:
        index = shard_scan.index_folder(
            arguments.index, given, arguments.workers, lambda _: bar.update()
        )
    return summary(arguments.index, index)


def verify(arguments: argparse.Namespace) -> str:
    """Compare every shard with its SHA-256; returns the summary. Raises DataError."""
    root = arguments.verify
    shards = shard_index.load(root).shards
    with progress(len(shards), "shard") as bar:
        sound = run_all(
            [partial(is_whole, root, shard) for shard in shards],
            arguments.workers,
            lambda _: bar.update(),
        )
    damaged = [shard.name for shard, is_sound in zip(shards, sound) if not is_sound]
    if damaged:
        raise DataError(
            f"{root}: {len(damaged)} of {len(shards)} shards are missing, unreadable or damaged: "
            f"{', '.join(damaged)}; copy or make them anew"
        )
    return f"{root}: {len(shards):,} shards, every byte as indexed"


def is_whole(root: Path, shard: shard_index.Shard) -> bool:
    """True if a shard can be read and is as it was indexed."""
    try:
        return shard_scan.sha256_of(root / shard.name) == shard.sha256
    except OSError:
        return False


def summary(root: Path, index: shard_index.Index) -> str:
    size = sum(shard.size for shard in index.shards)
    resized = f", shorter side at most {index.resized_to} px" if index.resized_to else ""
    return (
        f"{root}: {index.starts[-1]:,} images of {len(index.classes):,} classes "
        f"({enumeration(index.classes)}) in {len(index.shards):,} shards, {size / 1e6:,.1f} MB"
        f"{resized}"
    )


def progress(total: int, unit: str) -> tqdm:
    return tqdm(total=total, unit=unit, leave=False, disable=None)


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "source", type=cli.location, nargs="?", help="images as data.train takes them"
    )
    what.add_argument(
        "--index", type=cli.path, metavar="DIR", help="index the shards in this folder"
    )
    what.add_argument(
        "--verify", type=cli.path, metavar="DIR", help="compare shards with their index"
    )
    parser.add_argument("--out", type=cli.path, metavar="DIR", help="folder to write shards into")
    parser.add_argument(
        "--images-per-shard", type=positive, default=1250, metavar="N", help="default: 1250"
    )
    parser.add_argument(
        "--shorter-side",
        type=positive,
        metavar="PX",
        help="scale larger images down to this, for training only; default: copy them as they are",
    )
    parser.add_argument(
        "--quality",
        type=positive,
        default=95,
        metavar="Q",
        help="of the JPEG files that scaled images become, up to 100; default: 95",
    )
    parser.add_argument(
        "--classes",
        type=cli.path,
        metavar="FILE|DIR",
        help="with --index: class names in the order of the labels, one a line, or indexed shards "
        "to take them from; default: as the shards name them, else the numbers",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=usable_cores(),
        metavar="N",
        help="processes; default: all cores",
    )
    arguments = parser.parse_args()
    if (arguments.source is None) != (arguments.out is None):
        parser.error("SOURCE and --out go together")
    if arguments.quality > 100:
        parser.error("--quality goes up to 100")
    if arguments.classes is not None and arguments.index is None:
        parser.error("--classes goes with --index")
    return arguments


@cli.program
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    try:
        if arguments.verify is not None:
            outcome = verify(arguments)
        elif arguments.index is not None:
            outcome = index_existing(arguments)
        else:
            outcome = write(arguments)
    except KeyboardInterrupt:
        continues = "; the same command continues" if arguments.source is not None else ""
        cli.remark(f"make_shards.py: stopped{continues}")
        raise
    cli.say(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
