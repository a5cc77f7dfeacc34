"""Turn a config's data section into batches: sources, their order, the loader.

Used by train.py, validate.py and programs that check or time a run beforehand; build.py does the
same for the network.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction

import numpy as np
import torch

from data import class_lists, levels, loader, sources, stream, subset, transforms, user_cache
from data.augment import Augment, Mix
from data.base import Source
from data.errors import DataError, ImageError
from data.loader import Batch
from data.protocols import PROTOCOLS
from data.shards.remote import Storage
from data.stream import Stream
from data.to_input import ToInput
from data.workers import Workers
from irv2.config import Config
from irv2.data_section import Data
from irv2.network import regions
from irv2.sections import RunSection
from irv2.training.distributed import World


def open_sources(cfg: Config) -> tuple[Source, Source]:
    """Open training and validation images. Raises DataError if a run could not use them."""
    train, val = (
        open_source(spec, cfg.data, cfg.run.timeout_s) for spec in (cfg.data.train, cfg.data.val)
    )
    return train, check_sources(cfg, train, val)


def open_source(spec: str, data: Data, timeout_s: float = RunSection().timeout_s) -> Source:
    """Open images, of all classes or those of `data.classes`; those of an object store with the
    cache of `data`. Raises DataError.

    timeout_s: how long the loader will wait for an image.
    """
    # Fetching gives up before the loader does, which cannot name the object that it waits for.
    source = sources.open_source(spec, Storage(data.cache_dir, data.cache_gb, timeout_s / 2))
    if data.classes is None:
        return source
    return subset.of_classes(source, class_lists.read(data.classes), spec, data.classes)


def check_sources(cfg: Config, train: Source, val: Source) -> Source:
    """Return the validation images with the classes of training's, by name.

    Raises DataError unless a run could use these images together.
    """
    data = cfg.data
    levels.refuse_overlap(data.train, data.val)
    for key, where, source in (("data.train", data.train, train), ("data.val", data.val, val)):
        levels.refuse_wrong_level(source, where, key)
    matched = sources.with_classes(val, train.classes, data.val, data.train)
    if not data.allow_resized:
        sources.refuse_resized(val, data.val, "data.allow_resized=true")
    if data.shuffle_window is not None and train.storage_order is None:
        raise DataError(
            f"data.shuffle_window={data.shuffle_window} is for shards, and {data.train} holds "
            "none: leave it out, or make shards with scripts/make_shards.py"
        )
    return matched


def try_validation(cfg: Config, source: Source, world: World) -> None:
    """Read and decode one validation batch of each rank, of images from the whole set.

    Raises ImageError, or StorageError, before anything is written instead of after an epoch.
    """
    count = min(len(source), cfg.eval.batch * world.size)
    numbers = np.arange(count) * len(source) // count
    inline = Workers(0, cfg.run.timeout_s)
    batches = evaluation_batches(cfg.data, source, numbers, cfg.eval.batch, inline, world)
    next(batches, None)  # none for a rank beyond the images


def training_order(cfg: Config, source: Source) -> Stream:
    """Order of the training images."""
    if cfg.data.shuffle_window is None:
        return Stream(len(source), cfg.run.seed)
    return Stream(len(source), cfg.run.seed, source.storage_order, cfg.data.shuffle_window)


def storage_facts(cfg: Config, source: Source) -> dict[str, int]:
    """Facts about how training images are stored that affect a run: a reduced size, and with a
    shuffle window their order."""
    facts = {}
    if source.resized_to is not None:
        facts["shorter side, px"] = source.resized_to
    if cfg.data.shuffle_window is not None:
        facts["order, CRC-32"] = zlib.crc32(source.storage_order)
    return facts


def training_batches(
    cfg: Config, source: Source, order: Stream, start: int, micro_batch: int, world: World
) -> Iterator[Batch]:
    """Load this rank's micro-batches from stream position `start` on, without end."""
    batch = cfg.train.global_batch
    for size, end in sizes_until(cfg, len(source)):
        if end is None or start < end:
            share = stream.micro_batches(start, batch, micro_batch, world.rank, world.size, end)
            yield from _batches_of_size(cfg, source, order, share, size, world)
            start += math.ceil((end - start) / batch) * batch


def sizes_until(cfg: Config, images_per_epoch: int) -> list[tuple[int, int | None]]:
    """Return (side of the images in px, stream position from which it is the next one); the last
    has none.

    Shares are of all epochs, also of a run that `train.max_steps` ends before.
    """
    shares, sizes = zip(*cfg.data.sizes)
    images = Fraction(str(cfg.train.epochs)) * images_per_epoch
    return [
        *zip(sizes, [math.ceil(Fraction(str(share)) * images) for share in shares[1:]]),
        (sizes[-1], None),
    ]


def _batches_of_size(
    cfg: Config,
    source: Source,
    order: Stream,
    positions: Iterable[slice],
    size: int,
    world: World,
) -> Iterator[Batch]:
    """Load batches of these stream positions, of images of one size."""
    data = cfg.data
    augment = None
    if data.rand_augment is not None or data.random_erasing > 0:
        grey = [round(255 * mean) for mean in data.mean]
        augment = Augment(data.rand_augment, data.random_erasing, grey)
    view = transforms.TrainView(
        size=size,
        seed=cfg.run.seed,
        area_range=data.crop_area,
        aspect_range=data.crop_aspect,
        hflip=data.hflip,
        colour=data.colour,
        augment=augment,
    )
    if data.shuffle_window is not None:
        positions = stream.read_ahead(positions, order, source.will_read)
    batches = loader.load(
        source,
        view,
        (order[batch] for batch in positions),
        _to_input(data, bool(cfg.train.compile), world),
        Workers(data.workers, cfg.run.timeout_s),
        replace_bad=True,
        checksums=cfg.log.ledger,
    )
    if data.mixes_pairs:
        mix = Mix(data.mixup, data.cutmix, len(source.classes), cfg.run.seed)
        return mix.batches(batches)
    return batches


def evaluation_batches(
    data: Data,
    source: Source,
    numbers: Sequence[int],
    views_at_once: int,
    workers: Workers,
    world: World,
    protocol: str = "timm",
    compiled: bool = False,
) -> Iterator[Batch]:
    """Load this rank's share of the images with these numbers, each once, as a protocol sees them.

    The V views of an image follow one another: images [B * V, 3, H, W]. A batch has at most
    `views_at_once` views, but at least those of one image.
    """
    view = evaluation_view(data, protocol)
    views = view.shape[0] if len(view.shape) == 4 else 1
    size = max(1, views_at_once // views)
    places = stream.evaluation_batches(len(numbers), size, world.rank, world.size)
    keys = [[(0, int(numbers[place])) for _, place in batch] for batch in places]
    return loader.load(source, view, keys, _to_input(data, compiled, world), workers)


def _to_input(data: Data, compiled: bool, world: World) -> ToInput:
    if compiled:
        user_cache.give_inductor_its_own(torch.__version__)
    return ToInput(data.mean, data.std, world.device, regions.compiled if compiled else None)


def evaluation_view(data: Data, protocol: str = "timm") -> loader.View:
    """View, or views, of an image in an evaluation."""
    make = PROTOCOLS[protocol].view
    return make(data.image_size, data.eval_crop, data.eval_interpolation)


def pictures(data: Data, source: Source, indices: Iterable[int]) -> dict[int, np.ndarray]:
    """Images as an evaluation sees them, uint8 [size, size, 3], by number.

    Images that cannot be read are left out.
    """
    view = evaluation_view(data)
    seen = {}
    for index in indices:
        with suppress(ImageError):
            pixels, _ = loader.read_image(source, index)
            seen[index] = transforms.as_evaluated(pixels, view)
    return seen
