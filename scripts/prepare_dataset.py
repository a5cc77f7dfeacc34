#!/usr/bin/env python3
"""Write a small public data set, or a split of your own, in ImageFolder layout:
OUT/train/<class>/<image>, OUT/val/<class>/<image>.

  python scripts/prepare_dataset.py digits --out datasets/digits
  python scripts/prepare_dataset.py fashion-mnist --out datasets/fashion_mnist [--from DIR]
  python scripts/prepare_dataset.py cifar10 --out datasets/cifar10 [--from ARCHIVE]
  python scripts/prepare_dataset.py imagenette --out datasets/imagenette [--size 320] [--from …]
  python scripts/prepare_dataset.py folder SRC --out datasets/mine [--val-fraction 0.1] [--seed 0]
  python scripts/prepare_dataset.py csv TABLE --out datasets/mine [--label-column label] …
  python scripts/prepare_dataset.py parquet PATH|hf:OWNER/NAME --out datasets/mine

digits         scikit-learn's 1,797 handwritten digits of 8x8 px; 360 held out, stratified
fashion-mnist  60,000 / 10,000 images of 28x28 px; looks into /usr/share/datasets/fashion-mnist
               first, where Debian's package dataset-fashion-mnist puts its archives
cifar10        50,000 / 10,000 images of 32x32 px, from cifar-10-binary.tar.gz
imagenette     9,469 / 3,925 photographs of ten ImageNet classes, from imagenette2-320.tgz
folder         images that lie in SRC/<class>/: the given share of each class for validation, the
               same for the same seed; hard links where SRC and OUT share a file system, else copies
csv            images that a table lists, paths in one column and classes in another, split likewise
parquet        any image data set as Hugging Face has them, classes by the names in its schema; its
               validation images, else its test images, else a split as of a folder

What --from does not name is downloaded. OUT appears when it is complete; one that is there is left
as it is. (Of parquet OUT/train and OUT/val do, and the same command goes on.) Exit status: 0 OUT is
there, 1 something must be fixed first, 130 Ctrl-C.
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

from data.errors import DataError, enumeration
from data.prepare import hub, parquet, public_sets, splits
from data.prepare.folder_writer import write_folder
from data.prepare.public_sets import Entry
from irv2 import cli

IMAGES = {"digits": 1797, "fashion-mnist": 70_000, "cifar10": 60_000, "imagenette": 13_394}
OWN = {
    "folder": "folder of class folders; images are hard-linked, or copied to another disk",
    "csv": "table that lists images; they are linked or copied likewise",
    "parquet": "folder of parquet files whose names say the split, or hf:OWNER/NAME",
}
WRITERS = 8  # threads


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
    for name in (*IMAGES, *OWN):
        kind = kinds.add_parser(name)
        kind.add_argument("--out", type=cli.path, required=True, help="folder to make")
        if name in OWN:
            kind.add_argument("source", type=cli.location, help=OWN[name])
            kind.add_argument(
                "--val-fraction", type=float, default=0.1, help="share of each class (default: 0.1)"
            )
            kind.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
        if name == "csv":
            kind.add_argument("--path-column", default="path", metavar="NAME", help="default: path")
            kind.add_argument(
                "--label-column", default="label", metavar="NAME", help="default: label"
            )
            kind.add_argument(
                "--root", type=cli.path, help="folder that paths begin at (default: the table's)"
            )
        if name == "parquet":
            for column, what in (("image", "images"), ("label", "labels")):
                kind.add_argument(
                    f"--{column}-column",
                    metavar="NAME",
                    help=f"of {what} (default: as the schema says)",
                )
        if name in ("fashion-mnist", "cifar10", "imagenette"):
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
    if arguments.dataset in OWN and not 0 < arguments.val_fraction < 1:
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
    source, out = Path(arguments.source), arguments.out
    fraction, seed = arguments.val_fraction, arguments.seed
    if arguments.dataset == "csv":
        columns = (arguments.path_column, arguments.label_column)
        return splits.split_table(source, arguments.root or source.parent, columns, fraction, seed)
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
        raise ValueError(f"{out}: lies in {source}; choose a place outside")
    return splits.split_folder(source, fraction, seed, cli.remark)


def write_parquet(arguments: argparse.Namespace) -> None:
    """Write a data set that lies in parquet files, or what is missing of it. Raises DataError."""
    out, path = arguments.out, Path(arguments.source)
    if arguments.source.startswith(hub.PREFIX):
        path = hub.download(arguments.source, ["*.parquet"])
    columns = (arguments.image_column, arguments.label_column)
    sources = parquet.open_data_set(path, *columns, arguments.val_fraction, arguments.seed)
    if lacking := sorted(set(sources["train"].classes) ^ set(sources["val"].classes)):
        raise DataError(f"{path}: only one of train and val has images of {enumeration(lacking)}")
    for split, source in sources.items():
        write_folder(source, out / split, WRITERS)
        cli.say(f"{out / split}: {len(source):,} images of {len(source.classes):,} classes")


@cli.program
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    out = arguments.out
    if arguments.dataset == "parquet":
        write_parquet(arguments)
        return 0
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
