#!/usr/bin/env python3
"""Make ImageNet (ILSVRC2012) ready from whatever form you have it in.

  python scripts/prepare_imagenet.py --from PATH --out datasets/imagenet
  python scripts/prepare_imagenet.py --from PATH --out datasets/imagenet --only val
  python scripts/prepare_imagenet.py --from PATH --out datasets/imagenet_shards --shards

PATH is one of these, and the program says which:

  a folder with the three original archives, ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar
    and ILSVRC2012_img_val.tar
  Kaggle's imagenet-object-localization-challenge.zip, the tar in it, or the tree that either
    unpacks to; labels of the validation images come from LOC_val_solution.csv in or beside it
  a folder of parquet files as Hugging Face's ILSVRC/imagenet-1k has them, or hf:ILSVRC/imagenet-1k,
    which is downloaded; names lose the synset that they carry, ILSVRC2012_val_00000001_n01751748
  a folder of tar shards as timm/imagenet-1k-wds has them, or hf:timm/imagenet-1k-wds: OUT/train and
    OUT/val get an index, and links to the shards that do not lie there; nothing is copied
  a folder of validation images, with --labels FILE and --only val

The images become OUT/train/<synset>/<name>.JPEG and OUT/val/<synset>/<name>.JPEG, byte for byte as
they are there, the same whatever the form. Archives are read in place: nothing is unpacked twice.
With --link, images that are files already are linked, not copied.

The same command continues after an interruption: classes that are whole are kept, those that were
being written are written again. OUT/train and OUT/val have these names once they are complete;
until then they are called train.partial and val.partial. On a complete OUT the command compares
every file's name and size with what PATH holds.

With --shards, OUT/train and OUT/val are tar shards with an index, as scripts/make_shards.py writes.

Exit status: 0 complete; 1 something must be fixed first; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import DataError, enumeration
from data.files import write_atomically
from data.ilsvrc import BLACKLIST, ILSVRC2012, Expected
from data.prepare import checksums, forms, hub, shard_writer
from data.prepare.folder_writer import (
    copy_image,
    link_image,
    partial_of,
    present_folder,
    write_folder,
    written,
)
from data.prepare.foreign_shards import index_shards
from data.prepare.forms import Asked, Form
from data.prepare.listed import FileSource, ListedSource, StreamSource
from data.shards.index import INDEX, PLAN
from data.workers import usable_cores
from irv2 import cli
from irv2.cli import positive

STATE = ".prepare_imagenet.json"  # archives whose md5 was right
OVERHEAD = 1.02  # of files' half-filled last blocks, or of shards' labels and descriptions
THREADS = 8  # that write class folders


@dataclass(frozen=True)
class ClassFolders:
    """A folder for each class, a file for each image."""

    workers: int  # threads
    is_linked: bool  # links in place of copies

    def check(self, folder: Path, classes: Sequence[str]) -> None:
        """Raise DataError if a folder holds anything else."""
        present_folder(folder, classes)

    def bytes_missing(self, folder: Path, size: int, classes: int, images: int) -> float:
        """Estimate how much of `size` bytes is still to be written."""
        if self.is_linked:
            return 0.0
        present = folder if folder.exists() else partial_of(folder)
        names = os.listdir(present) if present.is_dir() else []
        done = sum("." not in name for name in names) / classes
        return OVERHEAD * size * max(0.0, 1 - max(done, written(present) / images))

    def write(self, source: ListedSource, folder: Path) -> None:
        """Write what is missing. Raises DataError."""
        if self.is_linked and not isinstance(source, FileSource):
            raise DataError(f"{source.root}: holds no files to link to; leave out --link")
        write_folder(source, folder, self.workers, link_image if self.is_linked else copy_image)


@dataclass(frozen=True)
class Shards:
    """Tar shards with their index; the methods are those of ClassFolders."""

    workers: int  # processes
    images_per_shard: int
    shorter_side: int | None  # px that larger training images are scaled down to

    def check(self, folder: Path, classes: Sequence[str]) -> None:
        for place in (folder, partial_of(folder)):
            names = os.listdir(place) if place.exists() else []
            if PLAN not in names and any(name[0] != "." for name in names):
                raise DataError(f"{place}: holds other things than shards; name another --out")

    def bytes_missing(self, folder: Path, size: int, classes: int, images: int) -> float:
        if self.shorter_side is not None or (folder / INDEX).exists():
            return 0.0  # finished, or of a size that is unknown beforehand
        return OVERHEAD * size - sum(p.stat().st_size for p in folder.glob("*.tar"))

    def write(self, source: ListedSource, folder: Path) -> None:
        if isinstance(source, StreamSource):
            raise DataError(
                f"{source.root}: can only be read from beginning to end: make folders of it, "
                "without --shards, then shards of these with scripts/make_shards.py"
            )
        is_train = folder.name == "train"  # evaluation wants the originals
        options = shard_writer.Options(
            folder.name, self.images_per_shard, self.shorter_side if is_train else None
        )
        with tqdm(desc=folder.name, total=len(source), unit="image", disable=None) as bar:
            shard_writer.write_shards(
                source, folder, options, self.workers, lambda scan: bar.update(len(scan.samples))
            )


Layout = ClassFolders | Shards


def prepare(
    form: Form,
    out: Path,
    splits: Sequence[str],
    layout: Layout,
    expected: Expected,
    is_md5_checked: bool,
) -> None:
    """Check everything, then write what is missing. Raises DataError or OSError."""
    check_beforehand(form, out, splits, layout, expected)
    with checksums.remembered(out / STATE) as state:
        for split in splits:
            layout.check(out / split, expected.synsets())
        for path, archive in form.archives if is_md5_checked else ():
            checksums.check_md5(path, archive.md5, state)
        sources = {split: form.open(split) for split in splits}
        for line in dict.fromkeys(line for source in sources.values() for line in source.remarks):
            cli.remark(f"note: {line}")
        for split, source in sources.items():
            layout.write(source, out / split)
            cli.say(f"{out / split}: {len(source):,} images of {len(source.classes):,} classes")
        for name, content in form.notes().items():
            write_atomically(out / name, content)


def index_in_place(
    form: Form, out: Path, splits: Sequence[str], expected: Expected, workers: int
) -> None:
    """Index the shards of a form. Raises DataError or OSError."""
    for split in splits:
        tars = form.tars[split]
        with tqdm(desc=split, total=len(tars), unit="shard", disable=None) as bar:
            source = index_shards(
                tars, out / split, split, expected, workers, lambda _, bar=bar: bar.update()
            )
        cli.say(f"{out / split}: {len(source):,} images of {len(source.classes):,} classes")


# ---------------------------------------------------------------------------------- beforehand


def check_beforehand(
    form: Form, out: Path, splits: Sequence[str], layout: Layout, expected: Expected
) -> None:
    """Raise DataError with all faults that can be seen before anything is written."""
    faults = list(form.faults)
    if fault := content_fault(out) or space_fault(out, splits, layout, expected):
        faults.append(fault)
    if faults:
        raise DataError("cannot begin:", *(f"  {fault}" for fault in faults))


def content_fault(out: Path) -> str:
    """Describe other things that lie in the result's place; empty if there are none."""
    if not out.exists():
        return ""
    if not out.is_dir():
        return f"{out}: not a folder"
    folders = [out / "train", out / "val"]
    known = {BLACKLIST, *(path.name for path in [*folders, *map(partial_of, folders)])}
    strangers = sorted(name for name in set(os.listdir(out)) - known if name[0] != ".")
    if strangers:
        return f"{out}: holds other things ({enumeration(strangers)}); name a new or empty folder"
    return ""


def space_fault(out: Path, splits: Sequence[str], layout: Layout, expected: Expected) -> str:
    """Describe a disk without room for what is not written yet; empty if it has enough."""
    needed = 0.0
    for split in splits:  # the images are those of the archives, whatever the form
        size, images = getattr(expected, split).size or 0, expected.images(split)
        needed += layout.bytes_missing(out / split, size, expected.classes, images)
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free >= needed:
        return ""
    return f"{place}: {free / 1e9:,.1f} GB are free, {needed / 1e9:,.1f} GB are needed"


# ---------------------------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("--from", dest="path", type=cli.location, required=True, metavar="PATH", help="see above")
    add("--out", type=cli.path, required=True, help="folder to make or to complete")
    add("--only", choices=["train", "val"], help="this split; the other need not be there")
    add(
        "--labels",
        type=cli.path,
        metavar="FILE",
        help="classes of the validation images, as validate.py takes them",
    )
    add("--skip-md5", action="store_true", help="use the archives without reading them through")
    add("--link", action="store_true", help="link to files in place of copying them")
    add("--shards", action="store_true", help="write tar shards in place of class folders")
    add(
        "--images-per-shard",
        type=positive,
        metavar="N",
        help=f"with --shards; default: {shard_writer.Options.images_per_shard}",
    )
    add(
        "--shorter-side",
        type=positive,
        metavar="PX",
        help="with --shards: scale larger training images down to this; default: copy all",
    )
    add(
        "--workers",
        type=positive,
        metavar="N",
        help=f"threads, default {THREADS} (1 suits a single hard disk); with --shards processes, "
        "default: all cores",
    )
    given = parser.parse_args(arguments)
    if not given.shards and (given.images_per_shard or given.shorter_side):
        parser.error("--images-per-shard and --shorter-side go with --shards")
    if given.shards and given.link:
        parser.error("--link is for folders, not for --shards")
    return given


@cli.program
def main(arguments: Sequence[str] | None = None, expected: Expected = ILSVRC2012) -> int:
    """Command line -> exit status."""
    given = parse_arguments(arguments)
    if given.shards:
        layout = Shards(
            given.workers or usable_cores(),
            given.images_per_shard or shard_writer.Options.images_per_shard,
            given.shorter_side,
        )
    else:
        layout = ClassFolders(given.workers or THREADS, given.link)
    splits = (given.only,) if given.only else ("train", "val")
    try:
        path = Path(given.path)
        if given.path.startswith(hub.PREFIX):
            names = [f"*{split}*.{ending}" for split in splits for ending in ("parquet", "tar")]
            path = hub.download(given.path, names)
        form = forms.recognise(Asked(path, splits, given.labels, expected, layout.workers))
        cli.say(f"{path}: {form.words}")
        if form.tars:
            if given.link or given.images_per_shard or given.shorter_side:
                raise DataError(f"{path}: its shards stay as they are; make_shards.py changes them")
            workers = given.workers or usable_cores()
            index_in_place(form, given.out, splits, expected, workers)
        else:
            prepare(form, given.out, splits, layout, expected, not given.skip_md5)
    except KeyboardInterrupt:
        cli.remark("prepare_imagenet.py: stopped; the same command goes on from here")
        raise
    except OSError as error:  # no permission, no space
        raise DataError(f"{error}; once that is fixed, run it again") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
