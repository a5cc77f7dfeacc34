"""Cost of loading images, beside timm's transforms on the same files and cores."""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.cbook
import numpy as np
import simplejpeg
import timm.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm import tqdm

from data import loader, sources, stream, transforms
from data.base import Source
from data.prepare import shard_writer
from data.shards import index as shard_index
from data.shards.prefetch import Request
from data.to_input import ToInput
from data.workers import Workers
from irv2.report import markdown
from irv2.training.distributed import keep_freed_memory
from scripts.benchmarks.alternation import Way, alternate, rate, table_row

CPU = torch.device("cpu")
SIZE, BATCH = 299, 32
WIDTH, HEIGHT = 500, 375  # of the JPEG files: ImageNet's most frequent size
QUALITY, HIGH_QUALITY = 90, 98  # 52 and 106 kB on average; ImageNet's files have 110
FILES, CLASSES = 192, 4
IMAGENET, SHARDS = 1_281_167, 1024  # images, and shards of them
MEAN = STD = [0.5] * 3
EVAL_CROP = 0.8975


def measure(rounds: int) -> dict[str, Any]:
    """Return the table's rows by name: each compares two ways in turn, `rounds` times."""
    keep_freed_memory()
    rows: dict[str, Any] = {}
    with (
        one_thread(),
        tempfile.TemporaryDirectory() as directory,
        tqdm(total=15, unit="row", disable=None) as bar,
    ):
        folder, heavy, shards, large = (
            Path(directory, name) for name in ("folder", "heavy", "shards", "large")
        )
        write_photographs(folder, QUALITY)
        write_photographs(heavy, HIGH_QUALITY)
        source = sources.FolderSource(folder)
        shard_writer.write_shards(
            source, shards, shard_writer.Options("photo", images_per_shard=8), 1, lambda _: None
        )
        shard_source = sources.open_source(str(shards))
        with one_core():
            ways = {
                **transform_rows(source, ""),
                **transform_rows(sources.FolderSource(heavy), ", 106 kB"),
                "shards": (training(shard_source), training(source)),
            }
            for name, (ours, peer) in ways.items():
                rows[name] = alternate(ours, peer, rounds)
                bar.update()
        for name, (view, to_input) in {
            "workers": (transforms.TrainView(SIZE, 0), Unchanged(CPU)),
            "workers, input": (transforms.TrainView(SIZE, 0), ToInput(MEAN, STD, CPU)),
            "workers, decode": (DecodeOnly(), Unchanged(CPU)),
        }.items():
            two, one = (reader(source, view, to_input, workers) for workers in (2, 1))
            rows[name] = alternate(two, one, rounds)
            bar.update()
        write_large_index(shards, large)
        rows["resume"] = alternate(first_batch(large, IMAGENET // 2), first_batch(large, 0), rounds)
        bar.update()
        rows["start_s"] = statistics.median(1 / first_batch(large, 0)() for _ in range(rounds))
        memory = {path: in_new_process(worker_memory, path) for path in (shards, large)}
        rows["index_mib"] = (memory[large] - memory[shards]) / 2**20
        bar.update(2)
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's operations on a single thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on its first core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


# ---------------------------------------------------------------------------------- images


def write_photographs(folder: Path, quality: int) -> None:
    """Write JPEG files of ImageNet's size in class folders, cut from photographs in packages.

    Sources: scikit-learn's china.jpg and flower.jpg, Matplotlib's grace_hopper.jpg.
    """
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photographs.append(Image.open(io.BytesIO(file.read())).convert("RGB"))
    rng = np.random.default_rng(0)
    for number in range(FILES):
        photograph = photographs[number % len(photographs)]
        side = rng.uniform(0.8, 1.0) * min(photograph.width / WIDTH, photograph.height / HEIGHT)
        width, height = int(side * WIDTH), int(side * HEIGHT)
        x, y = (int(rng.integers(n + 1)) for n in np.subtract(photograph.size, (width, height)))
        picture = photograph.crop((x, y, x + width, y + height)).resize((WIDTH, HEIGHT))
        path = folder / f"class{number % CLASSES}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=quality)


# ---------------------------------------------------------------------------------- one core


def transform_rows(source: Source, suffix: str) -> dict[str, tuple[Way, Way]]:
    """Return name -> (our way, the peer's) from files to batches; names end in `suffix`."""
    paths = [source.name(index) for index in range(FILES)]
    evaluated = transforms.EvalView(SIZE, EVAL_CROP, "bicubic")
    check_same_pixels(source, evaluated, paths)
    plain = transforms.TrainView(SIZE, 0, colour=False)
    return {
        f"train{suffix}": (training(source), timms(paths, color_jitter=0.4)),
        f"train, no colour{suffix}": (pipeline(source, plain), timms(paths, color_jitter=None)),
        f"evaluate{suffix}": (pipeline(source, evaluated), timms(paths, crop_pct=EVAL_CROP)),
        f"decode{suffix}": (training(source), rate(FILES, lambda: decode_all(source))),
    }


def training(source: Source) -> Way:
    """The paper's view of training images."""
    return pipeline(source, transforms.TrainView(SIZE, 0))


def pipeline(source: Source, view: loader.View) -> Way:
    """Return a way that does here what a loader process and the device do to images."""
    images, to_input = loader.Images(source, view, None, False), ToInput(MEAN, STD, CPU)

    def work() -> None:
        for keys in stream.evaluation_batches(FILES, BATCH, 0, 1):
            batch = images.__getitems__(Request(keys, []))
            colours = None if batch.colours is None else torch.from_numpy(batch.colours)
            to_input(batch.images, torch.from_numpy(batch.flips), colours)

    return rate(FILES, work)


def timms(paths: list[str], **options: Any) -> Way:
    """timm's own transform of the same files, in batches of the same size."""
    transform = timm_transform(**options)

    def load(path: str) -> Tensor:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    def work() -> None:
        for first in range(0, len(paths), BATCH):
            torch.stack([load(path) for path in paths[first : first + BATCH]])

    return rate(len(paths), work)


def timm_transform(**options: Any) -> Callable[[Image.Image], torch.Tensor]:
    """timm's training transform, or with `crop_pct` its evaluation transform."""
    is_training = "crop_pct" not in options
    options["interpolation"] = "bilinear" if is_training else "bicubic"
    return timm.data.create_transform(
        (3, SIZE, SIZE), is_training=is_training, mean=MEAN, std=STD, **options
    )


def check_same_pixels(source: Source, view: loader.View, paths: list[str]) -> None:
    """Raise RuntimeError unless evaluation gives timm's numbers for every file."""
    batches = stream.evaluation_batches(FILES, BATCH, 0, 1)
    ours = loader.load(source, view, batches, ToInput(MEAN, STD, CPU), Workers(0))
    transform = timm_transform(crop_pct=EVAL_CROP)
    theirs = (transform(Image.open(path).convert("RGB")) for path in paths)
    if not all(torch.equal(image, next(theirs)) for batch in ours for image in batch.images):
        raise RuntimeError("evaluation pixels differ from timm's")


def decode_all(source: Source) -> None:
    for index in range(FILES):
        simplejpeg.decode_jpeg(source.read(index)[0], "RGB")


# ---------------------------------------------------------------------------------- processes


class Unchanged:
    """Replacement for `ToInput` that leaves batches as loader processes make them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images: Tensor, flips: Tensor, colours: Tensor | None) -> Tensor:
        return images


class DecodeOnly:
    """A view that shows nothing: what is left is reading and decoding."""

    shape = (1, 1, 3)

    def __call__(self, pixels: np.ndarray, epoch: int, index: int, out: np.ndarray) -> tuple:
        return False, None


def reader(source: Source, view: loader.View, to_input: Callable, workers: int) -> Way:
    """Batches by way of loader processes, in a steady state."""
    passes = stream.evaluation_batches(FILES, BATCH, 0, 1)
    batches = loader.load(source, view, cycle(passes), to_input, Workers(workers))

    def way() -> float:
        take(batches, 2 * workers + 1)  # those still waiting from before
        return rate(4 * FILES, lambda: take(batches, 4 * len(passes)))()

    return way


def take(batches: Iterator[loader.Batch], count: int) -> None:
    for _ in range(count):
        next(batches)


def write_large_index(shards: Path, large: Path) -> None:
    """Write as many shards and images as ImageNet's, as links to the same few."""
    small = shard_index.load(shards)
    columns = {name: np.resize(column, IMAGENET) for name, column in small.columns.items()}
    copies = SHARDS // len(small.shards)
    columns["shard"] += (len(small.shards) * (np.arange(IMAGENET) % copies)).astype(np.uint16)
    starts = np.linspace(0, IMAGENET, 1001).astype(int).tolist()
    classes = [f"class{number:04d}" for number in range(1000)]
    large.mkdir()
    named = []
    for copy in range(copies):
        for shard in small.shards:
            named.append(shard._replace(name=f"{copy:04d}-{shard.name}"))
            os.link(shards / shard.name, large / named[-1].name)
    shard_index.save(shard_index.Index(named, classes, starts, columns, None), large)


def first_batch(path: Path, position: int) -> Way:
    """Return a way from opening a source to its first batch at a position of the stream."""

    def work() -> None:
        with closing(first_batches(path, position)) as batches:
            next(batches)

    return rate(1, work)


def first_batches(path: Path, position: int) -> Iterator[loader.Batch]:
    source = sources.open_source(str(path))
    order = stream.Stream(len(source), 0)
    keys = (order[part] for part in stream.micro_batches(position, BATCH, BATCH, 0, 1))
    view = transforms.TrainView(SIZE, 0)
    return loader.load(source, view, keys, ToInput(MEAN, STD, CPU), Workers(1))


def in_new_process(function: Callable[[Path], int], path: Path) -> int:
    """Call a function in a new process, whose memory holds nothing from before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, path).result()


def worker_memory(path: Path) -> int:
    """Resident bytes of a loader process after some batches."""
    with closing(first_batches(path, 0)) as batches:
        for _ in range(10):
            next(batches)
        (worker,) = multiprocessing.active_children()
        status = Path(f"/proc/{worker.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


# ---------------------------------------------------------------------------------- table


COMPARED = (
    ("train", "training, against timm's transform with colour jitter", "≥ 3.0"),
    ("train, no colour", "the same without colour on either side", "≥ 2.0"),
    ("evaluate", "evaluation, against timm's transform, the same pixels", "≥ 1.3"),
    ("decode", "training, against reading and decoding alone (simplejpeg)", "≥ 0.5"),
    ("train, 106 kB", "files of 106 kB: training", "≥ 3.0"),
    ("train, no colour, 106 kB", "files of 106 kB: the same without colour", "≥ 2.0"),
    ("evaluate, 106 kB", "files of 106 kB: evaluation", "≥ 1.3"),
    ("decode, 106 kB", "files of 106 kB: training, against reading and decoding alone", "≥ 0.5"),
    ("shards", "training from shards, against the folder", "≥ 1.0"),
    ("workers", "two workers against one, batches as they make them", "≥ 1.8"),
    ("workers, input", "the same, with the input made on the CPU beside them", "≥ 1.8"),
    (
        "workers, decode",
        "two workers against one that only read and decode: the machine's limit",
        "-",
    ),
    ("resume", "first batch in the middle of an epoch of 1.28 M, against its start", "≥ 1.0"),
)


def table(figures: dict[str, Any]) -> str:
    rows = [table_row(words, figures[name], goal, digits=3) for name, words, goal in COMPARED]
    memory, start = f"{figures['index_mib']:.0f} MiB", f"{figures['start_s']:.1f} s"
    rows += [
        f"a worker's memory for an index of 1.28 M images | {memory} | | | < 60 MiB",
        f"from opening such shards to the first batch | {start} | | | < 3 s",
    ]
    return markdown.table("measured | ours, a second | the other | ratio (range) | goal", rows)
