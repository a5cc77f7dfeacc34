"""Getting training images in beside what others make for speed, on one core: OpenCV and DALI.

The view is the same for all: the training crop, resized bilinearly, flipped and normalised, without
colour. OpenCV does not smooth what it makes smaller, as the others do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data import sources, transforms
from data.errors import UserError
from data.optional import is_installed
from data.stream import VIEW
from irv2.report import markdown
from irv2.training.distributed import keep_freed_memory
from scripts.benchmarks.alternation import Way, alternate, rate, table_row
from scripts.benchmarks.loading import (
    BATCH,
    HEIGHT,
    HIGH_QUALITY,
    QUALITY,
    SIZE,
    WIDTH,
    one_core,
    one_thread,
    pipeline,
    timms,
    write_photographs,
)

SIZES = {"52 kB": QUALITY, "106 kB": HIGH_QUALITY}  # on average, of a file
VIEWED = transforms.TrainView(SIZE, 0, colour=False)
Draw = tuple[int, int, int, int, bool]  # left, top, width, height, mirrored


def measure(rounds: int) -> dict[str, Any]:
    """Return the table's rows by name. Raises UserError if no peer is installed."""
    present = {module: name for module, name in NAMES.items() if is_installed(module)}
    if not present:
        raise UserError("no peer is installed: pip install -r requirements-benchmark.txt")
    keep_freed_memory()
    rows: dict[str, Any] = {}
    with one_thread(), tempfile.TemporaryDirectory() as directory, one_core():
        for size, quality in tqdm(SIZES.items(), unit="size", disable=None):
            folder = Path(directory, size)
            write_photographs(folder, quality)
            source = sources.FolderSource(folder)
            paths = [source.name(index) for index in range(len(source))]
            ours = pipeline(source, VIEWED)
            rows[f"timm, {size}"] = alternate(ours, timms(paths, color_jitter=None), rounds)
            for module, name in present.items():
                rows[f"{name}, {size}"] = alternate(ours, PEERS[module](paths), rounds)
    return rows


def table(figures: dict[str, Any]) -> str:
    rows = [
        table_row(name, row, "≥ 2.2" if "106" in name else "≥ 2.0", digits=3)
        for name, row in figures.items()
    ]
    return markdown.table("beside | ours, images/s | the other | ratio (range) | goal", rows)


# ---------------------------------------------------------------------------------- peers


def with_opencv(paths: Sequence[str]) -> Way:
    import cv2

    cv2.setNumThreads(1)

    def load(path: str, draw: Draw) -> np.ndarray:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
        left, top, width, height, mirrored = draw
        resized = cv2.resize(pixels[top : top + height, left : left + width], (SIZE, SIZE))
        return cv2.flip(resized, 1) if mirrored else resized

    return in_batches(paths, lambda batch: np.stack([load(*each) for each in batch]))


def with_dali(paths: Sequence[str]) -> Way:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, seed=0)
    def graph() -> Any:
        encoded, _ = fn.readers.file(files=list(paths))
        pixels = fn.decoders.image_random_crop(
            encoded,
            output_type=types.RGB,
            random_area=list(VIEWED.area_range),
            random_aspect_ratio=list(VIEWED.aspect_range),
        )
        return fn.crop_mirror_normalize(
            fn.resize(pixels, size=[SIZE, SIZE]),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[127.5] * 3,
            std=[127.5] * 3,
            mirror=fn.random.coin_flip(),
        )

    running = graph()
    running.build()

    def work() -> None:
        for _ in range(0, len(paths), BATCH):
            running.run()

    return rate(len(paths), work)


NAMES = {"cv2": "OpenCV", "nvidia.dali": "DALI on the CPU"}
PEERS: dict[str, Callable[[Sequence[str]], Way]] = {
    "cv2": with_opencv,
    "nvidia.dali": with_dali,
}


def in_batches(
    paths: Sequence[str], load: Callable[[Sequence[tuple[str, Draw]]], np.ndarray]
) -> Way:
    """Batches as the network wants them, of what loads uint8 [B, SIZE, SIZE, 3]."""

    def work() -> None:
        drawn = list(draws(paths))
        for first in range(0, len(drawn), BATCH):
            images = torch.from_numpy(load(drawn[first : first + BATCH]))
            images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)

    return rate(len(paths), work)


def draws(paths: Sequence[str]) -> Iterator[tuple[str, Draw]]:
    """Yield each file with the crop that our view of it takes."""
    for index, path in enumerate(paths):
        rng = np.random.default_rng((0, 0, index, VIEW))
        box = transforms.draw_crop(rng, WIDTH, HEIGHT, VIEWED.area_range, VIEWED.aspect_range)
        yield path, (*box, bool(rng.random() < VIEWED.hflip))
