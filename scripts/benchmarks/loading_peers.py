"""Getting training images in beside what others make for speed, on one core: OpenCV, DALI, SPDL.

The view is the same for all, with its colour and without: the training crop, resized bilinearly,
flipped, brightness and saturation changed, normalised. Only ours has Pillow's pixels and
TensorFlow's colours; OpenCV does not smooth what it makes smaller, and FFmpeg, by which SPDL
decodes, changes colours before they are RGB.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import sources, transforms
from data.errors import UserError
from data.optional import is_installed
from data.resample import Box
from data.stream import VIEW
from data.to_input import Colour
from data.transforms import TrainView
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
VIEWS = {"": True, ", no colour": False}


class Draw(NamedTuple):
    """An image's view, drawn as ours is."""

    box: Box
    is_mirrored: bool
    colour: Colour | None


def measure(rounds: int) -> dict[str, Any]:
    """Return the table's rows by name. Raises UserError if no peer is installed."""
    present = {module: name for module, name in NAMES.items() if is_installed(module)}
    if not present:
        raise UserError("no peer is installed: pip install -r requirements-benchmark.txt")
    keep_freed_memory()
    rows: dict[str, Any] = {}
    with one_thread(), tempfile.TemporaryDirectory() as directory, one_core():
        settings = list(itertools.product(SIZES.items(), VIEWS.items()))
        for (size, quality), (what, colour) in tqdm(settings, unit="view", disable=None):
            folder = Path(directory, size)
            write_photographs(folder, quality)
            source = sources.FolderSource(folder)
            paths = [source.name(index) for index in range(len(source))]
            view = transforms.TrainView(SIZE, 0, colour=colour)
            ours = pipeline(source, view)
            jitter = (0.4, 0.0, 0.4) if colour else None  # no contrast, as ours
            ways = {"timm": timms(paths, color_jitter=jitter)}
            ways |= {name: PEERS[module](paths, view) for module, name in present.items()}
            for name, way in ways.items():
                rows[f"{name}, {size}{what}"] = alternate(ours, way, rounds)
    return rows


def table(figures: dict[str, Any]) -> str:
    rows = [
        table_row(name, row, "≥ 2.2" if "106" in name else "≥ 2.0", digits=3)
        for name, row in figures.items()
    ]
    return markdown.table("beside | ours, images/s | the other | ratio (range) | goal", rows)


# ---------------------------------------------------------------------------------- peers


def with_opencv(paths: Sequence[str], view: TrainView) -> Way:
    import cv2

    cv2.setNumThreads(1)
    levels = np.arange(256)

    def load(path: str, draw: Draw) -> np.ndarray:
        (x, y, width, height), is_mirrored, colour = draw
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
        pixels = cv2.resize(pixels[y : y + height, x : x + width], (SIZE, SIZE))
        if is_mirrored:
            pixels = cv2.flip(pixels, 1)
        if colour is not None:
            pixels = cv2.add(pixels, (255 * colour.brightness,) * 3 + (0,))
            hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
            factors = np.minimum(levels * colour.saturation, 255).astype(np.uint8)
            hsv[..., 1] = cv2.LUT(hsv[..., 1], factors)
            pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
        return pixels

    return in_batches(paths, view, load)


def with_spdl(paths: Sequence[str], view: TrainView) -> Way:
    from spdl import io

    def load(path: str, draw: Draw) -> np.ndarray:
        (x, y, width, height), is_mirrored, colour = draw
        steps = [f"crop={width}:{height}:{x}:{y}", f"scale={SIZE}:{SIZE}:flags=bilinear"]
        if is_mirrored:
            steps.append("hflip")
        if colour is not None:
            steps.append(f"hue=s={colour.saturation}:b={10 * colour.brightness}")
        steps.append("format=rgb24")
        return io.to_numpy(io.load_image(path, filter_desc=",".join(steps)))

    try:
        load(paths[0], next(draws(paths, view))[1])
    except RuntimeError:
        raise UserError(
            "SPDL finds no libraries of FFmpeg: install the system's package ffmpeg, or leave SPDL "
            "out: pip uninstall spdl-io"
        ) from None
    return in_batches(paths, view, load)


def with_dali(paths: Sequence[str], view: TrainView) -> Way:
    from nvidia.dali import fn, pipeline_def, types

    # Not asynchronously: it would make batches ahead while ours is timed.
    alone = {"exec_async": False, "exec_pipelined": False, "prefetch_queue_depth": 1}

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, seed=0, **alone)
    def graph() -> Any:
        encoded, _ = fn.readers.file(files=list(paths))
        pixels = fn.decoders.image_random_crop(
            encoded,
            output_type=types.RGB,
            random_area=list(view.area_range),
            random_aspect_ratio=list(view.aspect_range),
        )
        pixels = fn.resize(pixels, size=[SIZE, SIZE])
        if view.colour:
            most = 2 * transforms.MAX_BRIGHTNESS_DELTA  # of a factor, at medium grey
            pixels = fn.color_twist(
                pixels,
                brightness=fn.random.uniform(range=[1 - most, 1 + most]),
                saturation=fn.random.uniform(range=list(transforms.SATURATION_RANGE)),
            )
        return fn.crop_mirror_normalize(
            pixels,
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


NAMES = {"cv2": "OpenCV", "nvidia.dali": "DALI on the CPU", "spdl.io": "SPDL"}
PEERS: dict[str, Callable[[Sequence[str], TrainView], Way]] = {
    "cv2": with_opencv,
    "nvidia.dali": with_dali,
    "spdl.io": with_spdl,
}


def in_batches(
    paths: Sequence[str], view: TrainView, load: Callable[[str, Draw], np.ndarray]
) -> Way:
    """Batches as the network wants them, of what loads uint8 [SIZE, SIZE, 3]."""

    def work() -> None:
        drawn = list(draws(paths, view))
        for first in range(0, len(drawn), BATCH):
            loaded = np.stack([load(path, draw) for path, draw in drawn[first : first + BATCH]])
            torch.from_numpy(loaded).permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)

    return rate(len(paths), work)


def draws(paths: Sequence[str], view: TrainView) -> Iterator[tuple[str, Draw]]:
    """Yield each file with the view that ours takes of it."""
    for index, path in enumerate(paths):
        rng = np.random.default_rng((0, 0, index, VIEW))
        box = transforms.draw_crop(rng, WIDTH, HEIGHT, view.area_range, view.aspect_range)
        is_mirrored = bool(rng.random() < view.hflip)
        yield path, Draw(box, is_mirrored, transforms.draw_colour(rng) if view.colour else None)
