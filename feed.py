"""From what a config says of images to batches of them: sources, their order, the loader.

What train.py and the programs that look at a run beforehand (scripts/doctor.py) or time it
(scripts/benchmark.py) have in common.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from data import augment, loader, shards, sources, stream, transforms, workers
from data.to_input import ToInput
from irv2 import distributed
from irv2.config import Config, ConfigError
from irv2.distributed import World


def open_sources(cfg: Config) -> tuple[sources.Source, sources.Source]:
    """Training and validation images. Raises DataError if a run could not use them."""
    train, val = open_source(cfg, cfg.data.train), open_source(cfg, cfg.data.val)
    check_sources(cfg, train, val)
    return train, val


def open_source(cfg: Config, spec: str) -> sources.Source:
    """Images of a run. Raises DataError."""
    # Faults end before the loader's patience does: it cannot tell which object is waited for.
    storage = sources.Storage(cfg.data.cache_dir, cfg.data.cache_gb, cfg.run.timeout_s / 2)
    return sources.open_source(spec, storage)


def check_sources(cfg: Config, train: sources.Source, val: sources.Source) -> None:
    """Raise DataError unless a run could use these images together."""
    data = cfg.data
    sources.check_same_classes(val.classes, train.classes, data.val, data.train)
    if not data.allow_resized:
        shards.refuse_resized(val, data.val, "data.allow_resized=true")
    if data.shuffle_window is not None and not hasattr(train, "storage_order"):
        raise sources.DataError(
            f"data.shuffle_window={data.shuffle_window} is for shards, and {data.train} holds "
            "none: leave it out, or make shards with scripts/make_shards.py"
        )


def check_pairs(cfg: Config, micro_batch: int) -> None:
    """Raise ConfigError if images are to be mixed in pairs and cannot be paired."""
    if micro_batch % 2 and (cfg.data.mixup > 0 or cfg.data.cutmix > 0):
        raise ConfigError(
            f"data.mixup and data.cutmix mix pairs, and micro-batches of {micro_batch} images "
            "cannot be paired: choose another train.micro_batch"
        )


def check_division(cfg: Config, ranks: int) -> None:
    """Raise WorldError or ConfigError where a global batch cannot be divided as the config says."""
    if cfg.train.micro_batch == "auto":  # found later, when the device is known
        distributed.divide_batch(cfg.train.global_batch, cfg.train.global_batch, ranks)
        return
    division = distributed.divide_batch(cfg.train.global_batch, cfg.train.micro_batch, ranks)
    check_pairs(cfg, division.micro_batch)


def training_order(cfg: Config, source: sources.Source) -> stream.Stream:
    """The order of the training images."""
    if cfg.data.shuffle_window is None:
        return stream.Stream(len(source), cfg.run.seed)
    return stream.Stream(len(source), cfg.run.seed, source.storage_order, cfg.data.shuffle_window)


def how_stored(cfg: Config, source: sources.Source) -> dict[str, int]:
    """What of the way in which training images are stored shows in a run: a smaller size, and with
    a window, their order."""
    stored = {}
    if (side := getattr(source, "resized_to", None)) is not None:
        stored["shorter side, px"] = side
    if cfg.data.shuffle_window is not None:
        stored["order, CRC-32"] = zlib.crc32(source.storage_order)
    return stored


def training_batches(
    cfg: Config, source: sources.Source, order: stream.Stream, start: int, micro: int, world: World
) -> Iterator[loader.Batch]:
    """This rank's micro-batches from stream position `start` on, without end."""
    data = cfg.data
    change = None
    if data.rand_augment is not None or data.random_erasing > 0:
        grey = [round(255 * mean) for mean in data.mean]
        change = augment.Augment(data.rand_augment, data.random_erasing, grey)
    view = transforms.TrainView(
        size=data.image_size,
        seed=cfg.run.seed,
        area_range=data.crop_area,
        aspect_range=data.crop_aspect,
        hflip=data.hflip,
        colour=data.colour,
        augment=change,
    )
    positions = stream.micro_batches(start, cfg.train.global_batch, micro, world.rank, world.size)
    if data.shuffle_window is not None and hasattr(source, "will_read"):
        positions = stream.read_ahead(positions, order, source.will_read)
    keys = (order[batch] for batch in positions)
    batches = loader.load(
        source,
        view,
        keys,
        ToInput(data.mean, data.std, world.device, cfg.train.compile),
        workers.Workers(data.workers, cfg.run.timeout_s),
        replace_bad=True,
        checksums=cfg.log.ledger,
    )
    if data.mixup > 0 or data.cutmix > 0:
        mix = augment.Mix(data.mixup, data.cutmix, len(source.classes), cfg.run.seed)
        return mix.batches(batches)
    return batches


@dataclass
class Taken:
    """What a step has taken from the stream, on this rank."""

    keys: list[stream.Key] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    replaced: list[loader.Replaced] = field(default_factory=list)


def evaluation_batches(cfg: Config, source: sources.Source, world: World) -> Iterator[loader.Batch]:
    """This rank's share of all images of a source, each once."""
    data = cfg.data
    return loader.load(
        source,
        transforms.EvalView(data.image_size, data.eval_crop, data.eval_interpolation),
        stream.evaluation_batches(len(source), cfg.eval.batch, world.rank, world.size),
        ToInput(data.mean, data.std, world.device, cfg.train.compile),
        workers.Workers(data.workers, cfg.run.timeout_s),
    )


def pictures(cfg: Config, source: sources.Source, indices: Iterable[int]) -> dict[int, np.ndarray]:
    """Images as an evaluation sees them, uint8 [size, size, 3], by number; one that cannot be read
    is left out."""
    data = cfg.data
    view = transforms.EvalView(data.image_size, data.eval_crop, data.eval_interpolation)
    seen = {}
    for index in indices:
        with suppress(sources.ImageError):
            pixels, _ = loader.read_image(source, index)
            seen[index] = transforms.shown(pixels, view)
    return seen
