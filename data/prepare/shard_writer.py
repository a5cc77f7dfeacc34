"""Writer of tar shards in WebDataset's layout, with their index, from any source of images.

A sample is KEY.jpg (or another image), KEY.cls (the label) and KEY.json (where it came from); keys
sort as the source counts. Images are dealt to the shards at random, so that those who stream whole
shards get mixed classes, too. The bytes follow from source and options alone: not from the number
of processes, nor from how often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from data import strict_json
from data.base import Source
from data.errors import DataError, ImageError
from data.files import lock, open_own, remove_leftovers, write_atomically
from data.image_formats import open_image
from data.names import LONGEST, shown
from data.prepare.listed import ListedSource
from data.prepare.processes import run_all, take_in_hand
from data.prepare.shard_scan import Sample, Scan, build_index, image_kinds, scan
from data.shards import index as shard_index
from data.shards.index import BLOCK, INDEX, PLAN, Index, Shard
from data.shards.local import ShardSource
from data.transforms import DecodeError, decode

SEED = 0  # of the images' way into the shards
MAX_STEM = 60  # characters of a file's name in its key; tar's header has room for 100
MAX_PLAN = 1 << 20  # bytes of the plan
RECORD = 20 * BLOCK  # tar archives are filled up to a multiple of it


@dataclass(frozen=True)
class Options:
    """Options of the shards that are written."""

    name: str  # the shards' names begin with it
    images_per_shard: int = 1250  # of ImageNet some 150 MB
    shorter_side: int | None = None  # px that larger images are scaled down to; None: originals
    quality: int = 95  # of the JPEG files that scaled images become


def write_shards(
    source: Source, out: Path, options: Options, workers: int, done: Callable[[Scan], None]
) -> Index:
    """Write a source's images into shards in the folder `out`, and their index; returns it.

    `done` gets each shard. Shards that an interrupted call has finished are read, not written
    again. Raises DataError for a folder that holds something else and for images that cannot be
    read (scaled ones: decoded), and OSError for shards that cannot be written, with nothing of
    these shards in the folder.
    """
    plan = make_plan(source, options)
    shards = deal(source, options.images_per_shard)
    if len(shards) > shard_index.MAX_SHARDS:
        raise DataError(f"{out}: {len(shards):,} shards; put more images into each")
    if (out / INDEX).exists():
        check_plan(out, plan)
        ShardSource(out)  # refuses shards that are gone
        return shard_index.load(out)
    with claimed(out, plan):
        remove_leftovers(out)
        jobs = []
        for number, images in enumerate(shards):
            path = out / f"{options.name}-{number:05d}.tar"
            if path.exists():
                jobs.append(partial(read_shard, source, images, path))
            else:
                jobs.append(partial(write_shard, source, images, path, options))
        scans = run_all(jobs, workers, done)
        index = build_index(out, scans, source.classes, resized_to(source, options))
        shard_index.save(index, out)
        return index


def deal(source: Source, per_shard: int) -> list[np.ndarray]:
    """Deal images to shards, each shard's in the order in which they go into it.

    At random, but of a sequential source as they lie: elsewhere it could not be read in time.
    """
    order = np.random.default_rng(SEED).permutation(len(source))
    if isinstance(source, ListedSource) and source.is_sequential:
        order = np.argsort(source.offsets, kind="stable")
    return np.split(order, range(per_shard, len(source), per_shard))


def resized_to(source: Source, options: Options) -> int | None:
    """Return the largest shorter side that the images can have; None if they are originals."""
    sides = (options.shorter_side, source.resized_to)
    return min((side for side in sides if side is not None), default=None)


# ---------------------------------------------------------------------------------- the plan


def make_plan(source: Source, options: Options) -> dict[str, object]:
    """State what finished shards must have in common to belong together.

    An image changed under the same name goes unnoticed.
    """
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(os.fsencode(relative_name(source, index)) + b"\0")
    return {
        **asdict(options),
        "images": len(source),
        "names_sha256": names.hexdigest(),
        "classes_sha256": hashlib.sha256(json.dumps(source.classes).encode()).hexdigest(),
    }


def relative_name(source: Source, index: int) -> str:
    """Name an image within its source."""
    name = source.name(index)
    return name if source.root is None else name.removeprefix(os.path.join(source.root, ""))


def check_plan(out: Path, plan: dict[str, object]) -> None:
    """Raise DataError unless a folder's shards are made by the same plan."""
    path = out / PLAN
    try:
        planned = strict_json.load(path, MAX_PLAN)
    except FileNotFoundError:
        raise DataError(
            f"{out}: holds something else already; name a new or empty folder"
        ) from None
    except ValueError:
        planned = None
    if not isinstance(planned, dict):
        raise DataError(f"{path}: damaged; remove {out} and start anew")
    changes = [
        f"{key} is {shown(str(planned.get(key)), LONGEST)}, not {value}"
        for key, value in plan.items()
        if planned.get(key) != value
    ]
    if changes:
        raise DataError(
            f"{out}: holds shards of other images or options ({'; '.join(changes)}); name another "
            "folder, or remove this one"
        )


@contextmanager
def claimed(out: Path, plan: dict[str, object]) -> Iterator[None]:
    """Keep a folder with its plan for this process.

    Raises DataError for one that another process is at work in, or that holds something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open_own(out / ".lock", "rb+") as file:
        if reason := lock(file, "another process is writing to it"):
            raise DataError(f"{out}: {reason}")
        if any(not entry.name.startswith(".") for entry in os.scandir(out)):
            check_plan(out, plan)
        else:
            write_atomically(out / PLAN, json.dumps(plan, indent=1) + "\n")
        yield


# ---------------------------------------------------------------------------------- one shard


def read_shard(source: Source, images: np.ndarray, path: Path) -> Scan:
    """Read a shard that was finished earlier. Raises DataError if it is not as planned."""
    scanned = scan(path)
    if {sample.key for sample in scanned.samples} != {key(source, i) for i in images.tolist()}:
        raise DataError(f"{path}: not the shard that was planned; remove it and start again")
    return scanned


def write_shard(source: Source, images: np.ndarray, path: Path, options: Options) -> Scan:
    """Write a shard, whole or not at all. Raises DataError for an image that cannot be read."""
    samples = []
    digest = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        for index in images.tolist():
            take_in_hand(source.where(index))
            name = key(source, index)
            members, label = sample_of(source, index, options)
            image = members[0][1]
            block = file.tell() // BLOCK + 1  # after the header
            samples.append(Sample(name, label, block, len(image), zlib.crc32(image)))
            for extension, content in members:
                member = _member(f"{name}.{extension}", content)
                digest.update(member)
                file.write(member)
        end = bytes(2 * BLOCK)
        end += bytes(-(file.tell() + len(end)) % RECORD)
        digest.update(end)
        file.write(end)

    write_atomically(path, write)
    return Scan(Shard(path.name, path.stat().st_size, digest.hexdigest()), samples)


def _member(name: str, content: bytes) -> bytes:
    """Make a file in a tar archive, the same whoever writes it and when."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


# ---------------------------------------------------------------------------------- one sample


def key(source: Source, index: int) -> str:
    """Name a sample by its number in the source and what is readable of its file's name."""
    stem = os.path.splitext(os.path.basename(source.name(index)))[0]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:MAX_STEM]
    return f"{index:0{len(str(len(source) - 1))}d}-{readable}"


def sample_of(source: Source, index: int, options: Options) -> tuple[list[tuple[str, bytes]], int]:
    """Make a sample's members, (extension, content) with the image first, and its label."""
    encoded, label = source.read(index)
    name = source.name(index)
    is_scaled = False
    if options.shorter_side is not None:
        encoded, is_scaled = scale_down(encoded, name, options.shorter_side, options.quality)
    kind, size = kind_and_size(encoded)
    ending = os.path.splitext(name)[1].lower()
    extension = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png"}.get(ending)
    if extension is None or is_scaled:
        extension = kind or ending.removeprefix(".")
    if extension not in image_kinds():
        raise ImageError(f"{name}: not a known kind of image ({', '.join(sorted(image_kinds()))})")
    about = {
        "name": relative_name(source, index),
        "class": source.classes[label],
        "label": label,
        **size,
    }
    texts = [("cls", str(label).encode()), ("json", json.dumps(about).encode())]
    return [(extension, encoded), *texts], label


def scale_down(encoded: bytes, name: str, shorter_side: int, quality: int) -> tuple[bytes, bool]:
    """Limit an image's shorter side to that many px; returns also whether that changed it.

    Raises ImageError for one that cannot be decoded.
    """
    try:
        image = Image.fromarray(decode(encoded))
    except DecodeError as error:
        raise ImageError(f"{name}: {error}") from None
    factor = shorter_side / min(image.size)
    if factor >= 1:
        return encoded, False
    size = [max(shorter_side, round(side * factor)) for side in image.size]
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), True


def kind_and_size(encoded: bytes) -> tuple[str | None, dict[str, int]]:
    """Read an image's kind, and its width and height in px, as far as its header says them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(encoded)
    except MemoryError:
        raise
    except Exception:  # decoders raise what they like; training will report it
        return None, {}
    kind = image.format.lower()
    return {"jpeg": "jpg"}.get(kind, kind), {"width": image.width, "height": image.height}
