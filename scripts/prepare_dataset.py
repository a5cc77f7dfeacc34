#!/usr/bin/env python3
"""Write a small public data set, or a split of your own, in ImageFolder layout:
OUT/train/<class>/<image>, OUT/val/<class>/<image>.

  python scripts/prepare_dataset.py digits --out datasets/digits
  python scripts/prepare_dataset.py fashion-mnist --out datasets/fashion_mnist [--from DIR]
  python scripts/prepare_dataset.py cifar10 --out datasets/cifar10 [--from ARCHIVE]
  python scripts/prepare_dataset.py imagenette --out datasets/imagenette [--size 320] [--from …]
  python scripts/prepare_dataset.py folder SRC --out datasets/mine [--val-fraction 0.1] [--seed 0]

digits         scikit-learn's 1,797 handwritten digits of 8x8 px; 360 held out, stratified
fashion-mnist  60,000 / 10,000 images of 28x28 px; looks into /usr/share/datasets/fashion-mnist
               first, where Debian's package dataset-fashion-mnist puts its archives
cifar10        50,000 / 10,000 images of 32x32 px, from cifar-10-binary.tar.gz
imagenette     9,469 / 3,925 photographs of ten ImageNet classes, from imagenette2-320.tgz
folder         images that lie in SRC/<class>/: the given share of each class for validation, the
               same for the same seed; hard links where SRC and OUT share a file system, else copies

What --from does not name is downloaded. OUT appears when it is complete; one that is there is left
as it is. Exit status: 0 OUT is there, 1 something must be fixed first, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import DataError
from data.prepare import public_sets
from data.prepare.public_sets import Entry
from irv2 import cli

IMAGES = {"digits": 1797, "fashion-mnist": 70_000, "cifar10": 60_000, "imagenette": 13_394}


def write(entries: Iterable[Entry], out: Path, total: int) -> Counter[str]:
    """Write all files beside `out`, then rename: the folder is there whole or not at all.

    `total`: of the files, for the progress bar. Returns the number of images of each split.
    """
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts: Counter[str] = Counter()
    progress = tqdm(entries, total=total, unit="image", disable=None)
    try:
        for name, content in progress:
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                link_or_copy(content, path)
            else:
                with open(path, "xb") as file:
                    file.write(content)
            counts[name.partition("/")[0]] += 1
        os.sync()  # else a power cut after the rename could leave empty files under `out`
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def link_or_copy(file: Path, to: Path) -> None:
    """Hard-link what `file` leads to, or copy it where the file system refuses links."""
    try:
        os.link(os.path.realpath(file), to)
    except OSError:
        shutil.copyfile(file, to)


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    kinds = parser.add_subparsers(dest="dataset", required=True, metavar="SET")
    for name in (*IMAGES, "folder"):
        kind = kinds.add_parser(name)
        kind.add_argument("--out", type=cli.path, required=True, help="folder to make")
        if name == "folder":
            kind.add_argument(
                "source",
                type=cli.path,
                metavar="SRC",
                help="folder of class folders; images are hard-linked, or copied to another disk",
            )
            kind.add_argument(
                "--val-fraction", type=float, default=0.1, help="share of each class (default: 0.1)"
            )
            kind.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
        elif name != "digits":
            kind.add_argument(
                "--from", dest="archive", type=cli.path, help="the original archive, or its folder"
            )
        if name in ("cifar10", "imagenette"):
            kind.add_argument(
                "--skip-md5", action="store_true", help="take an archive with another checksum"
            )
        if name == "imagenette":
            kind.add_argument(
                "--size",
                choices=list(public_sets.IMAGENETTE),
                default="320",
                help="shorter side of the images, px (default: 320)",
            )
    arguments = parser.parse_args()
    if arguments.dataset == "folder" and not 0 < arguments.val_fraction < 1:
        parser.error(f"--val-fraction {arguments.val_fraction}: must lie between 0 and 1")
    return arguments


def entries_of(arguments: argparse.Namespace) -> Iterable[Entry]:
    """Return the files of the set that the command line names."""
    if arguments.dataset == "digits":
        return public_sets.digits()
    if arguments.dataset == "fashion-mnist":
        return public_sets.fashion_mnist(arguments.archive)
    if arguments.dataset == "cifar10":
        return public_sets.cifar10(arguments.archive, not arguments.skip_md5)
    if arguments.dataset == "imagenette":
        return public_sets.imagenette(arguments.size, arguments.archive, not arguments.skip_md5)
    source, out = arguments.source.resolve(), arguments.out.resolve()
    if out.is_relative_to(source):
        raise ValueError(f"{arguments.out}: lies in {arguments.source}; choose a place outside")
    fraction, seed = arguments.val_fraction, arguments.seed
    return public_sets.split_folder(arguments.source, fraction, seed, cli.remark)


@cli.program
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    out = arguments.out
    if out.exists():
        cli.say(f"{out}: already there, left as it is")
        return 0
    try:
        entries = entries_of(arguments)
        total = len(entries) if isinstance(entries, list) else IMAGES[arguments.dataset]
        counts = write(entries, out, total)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{arguments.dataset}: {error}") from None
    images = f"{counts['train']:,} training and {counts['val']:,} validation images"
    cli.say(f"{out}: {images}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
