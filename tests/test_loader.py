"""The loader: the same batches in the same order, with any number of workers."""

import os
import re
import struct
import zlib
from collections.abc import Iterable
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from image_zoo import write_zoo
from numbered import IDENTITY, VIEW, Numbered
from PIL import Image
from programs import write_images
from torchvision.datasets import ImageFolder

from data.base import Source
from data.errors import ImageError
from data.loader import MAX_REPLACEMENTS, Batch, load, replacements
from data.sources import FolderSource, SyntheticSource
from data.stream import Key, Stream, evaluation_batches, micro_batches
from data.to_input import Colour, ToInput
from data.transforms import EvalView, TrainView, decode
from data.workers import Workers

MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
NORMALISED = ToInput(MEAN, STD, torch.device("cpu"))
NONE = Workers(0)
IMAGES = 12  # in all, of three classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of different sizes and file types in three classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (30 + i, 50 - i, 3), dtype=np.uint8)
        path = root / f"class{i % 3}" / f"{i}.{('png', 'jpg')[i % 2]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def loaded_keys(source: Source, batches: list, workers: int = 0, seed: int = 1) -> list[Batch]:
    """Batches of given keys as a training gets them, with checksums."""
    view = TrainView(24, seed)
    loaded = load(source, view, batches, NORMALISED, Workers(workers), True, True)
    return list(loaded)


def joined(batches: Iterable[Batch]) -> Batch:
    """One batch of all."""
    images, labels, sizes, *lists = zip(*batches)
    lists = [list(chain.from_iterable(parts)) for parts in lists]
    return Batch(torch.cat(images), torch.cat(labels), np.concatenate(sizes), *lists)


def same(one: Batch, other: Batch) -> bool:
    arrays = all(np.array_equal(a, b) for a, b in zip(one[:3], other[:3]))
    return arrays and one[3:] == other[3:]


def training(source: FolderSource, micro_batch: int, workers: int, images: int) -> Batch:
    """The first `images` of a run, over the end of the first epoch."""
    order = Stream(len(source), 1)
    batches = (order[part] for part in micro_batches(0, 8, micro_batch, 0, 1))
    loaded = load(source, TrainView(24, seed=1), batches, NORMALISED, Workers(workers))
    return joined(islice(loaded, images // micro_batch))


def shown(source: Source, view: TrainView, key: Key, index: int) -> torch.Tensor:
    """The image `index` as `view` shows that of a key, made by itself."""
    image, flip, colour = seen(source, view, key, index)
    return NORMALISED(image[None], torch.tensor([flip]), torch.tensor([colour]))[0]


def seen(
    source: Source, view: TrainView, key: Key, index: int
) -> tuple[torch.Tensor, bool, Colour | None]:
    out = np.empty(view.shape, np.uint8)
    flip, colour = view(decode(source.read(index)[0]), *key, out)
    return torch.from_numpy(out), flip, colour


# ---------------------------------------------------------------------------------- content


def test_batches_come_in_the_order_asked_for():
    batches = [[(0, 7), (3, 200)], [(0, 0)], [(1, 255), (1, 7), (0, 31)]]
    loaded = list(load(Numbered(), VIEW, batches, IDENTITY, NONE))
    assert [labels.tolist() for _, labels, *_ in loaded] == [[107, 300], [100], [355, 107, 131]]
    for (images, *_), keys in zip(loaded, batches, strict=True):
        levels = torch.tensor([index for _, index in keys]).view(-1, 1, 1, 1) / 255
        assert torch.equal(images, levels.expand(-1, 3, 8, 8))


def test_evaluation_equals_imagefolder_with_timms_transform(folder):
    how = {"interpolation": "bicubic", "crop_pct": 0.875, "mean": MEAN, "std": STD}
    transform = timm.data.create_transform((3, 24, 24), **how)
    expected = list(ImageFolder(folder, transform))
    view, batches = EvalView(24, 0.875, "bicubic"), evaluation_batches(IMAGES, 5, 0, 1)
    loaded = load(FolderSource(folder), view, batches, NORMALISED, NONE)
    images, labels, *_ = joined(loaded)
    assert torch.equal(images, torch.stack([image for image, _ in expected]))
    assert labels.tolist() == [label for _, label in expected]


def test_training_equals_its_parts_one_image_at_a_time(folder):
    source, view = FolderSource(folder), TrainView(24, seed=1)
    keys = Stream(IMAGES, 1)[0:16]
    images, labels, *_ = training(source, 4, 0, 16)
    assert torch.equal(images, torch.stack([shown(source, view, key, key[1]) for key in keys]))
    assert labels.tolist() == [source.read(index)[1] for _, index in keys]


def test_workers_and_batch_size_change_no_bit(folder):
    source = FolderSource(folder)
    expected = training(source, 8, 0, 32)
    assert same(training(source, 8, 2, 32), expected)
    assert same(training(source, 2, 0, 32), expected)


@pytest.mark.parametrize("view", [EvalView(24, 1.0, "bilinear"), TrainView(24, seed=0)])
def test_batches_are_float32_in_channels_last_memory_with_int64_labels(view):
    batch = [(0, index) for index in range(3)]
    images, labels, *_ = next(load(Numbered(), view, [batch], NORMALISED, NONE))
    assert images.shape == (3, 3, 24, 24)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (3,)
    assert labels.dtype == torch.int64


def test_an_endless_stream_is_read_only_as_far_as_needed():
    asked = []
    batches = (asked.append(i) or [(0, i)] for i in count())
    loaded = load(Numbered(), VIEW, batches, IDENTITY, NONE)
    assert [int(labels) for _, labels, *_ in islice(loaded, 3)] == [100, 101, 102]
    assert len(asked) == 3


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_reader_there_with_its_name(workers):
    batches = [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4), (0, 5)]]
    source, seen = Numbered(broken=(3, 4)), []
    with pytest.raises(ImageError) as error:
        for batch in load(source, VIEW, batches, IDENTITY, Workers(workers)):
            seen.append(batch.labels.tolist())
    assert seen == [[100, 101]]
    assert str(error.value).startswith("numbered/3.png: cannot be decoded")
    assert "\n" not in str(error.value), "no traceback from the worker"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_went_missing_is_named(folder, workers):
    source = FolderSource(folder)
    source.root = f"{folder}-moved"
    batches = evaluation_batches(IMAGES, 4, 0, 1)
    with pytest.raises(ImageError) as error:
        list(load(source, VIEW, batches, IDENTITY, Workers(workers)))
    assert str(error.value) == f"{source.name(0)}: cannot be read (No such file or directory)"


# ---------------------------------------------------------------------------------- bad images


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Images of every kind as class "zoo" between two ordinary classes, and what they become."""
    root = tmp_path_factory.mktemp("zoo")
    write_images(root, ["antelope", "zucchini"], 4)
    return root, write_zoo(root / "zoo")


def by_name(source: FolderSource) -> dict[str, int]:
    return {Path(source.name(i)).name: i for i in source.members(5)}


def test_in_training_exactly_the_bad_images_are_replaced_by_good_ones_of_their_class(zoo):
    root, expected = zoo
    source = FolderSource(root)
    indices, epoch = list(range(len(source))), 3
    (batch,) = loaded_keys(source, [[(epoch, index) for index in indices]])
    places = by_name(source)
    assert set(places) == set(expected)
    bad = [index for name, index in places.items() if expected[name] == "replaced"]
    assert [report.index for report in batch.replaced] == sorted(bad)
    assert batch.keys == [(epoch, index) for index in indices]
    assert batch.labels.tolist() == [source.read(index)[1] for index in indices]
    good = [index for index in source.members(bad[0]) if index not in bad]
    for report in batch.replaced:
        assert report.epoch == epoch
        assert report.name == source.name(report.index)
        assert report.reason.startswith("cannot be decoded (")
        tried = replacements(source.members(report.index), (1, epoch, report.index))
        assert report.replacement == next(index for index in tried if index in good)


def test_an_image_and_what_stands_in_for_it_are_seen_as_the_image_asked_for(zoo):
    source = FolderSource(zoo[0])
    indices, epoch, view = range(len(source)), 3, TrainView(24, seed=1)
    (batch,) = loaded_keys(source, [[(epoch, index) for index in indices]])
    stand_ins = {report.index: report.replacement for report in batch.replaced}
    for index, image in zip(indices, batch.images, strict=True):
        stand_in = stand_ins.get(index, index)
        assert torch.equal(image, shown(source, view, (epoch, index), stand_in))


def test_replacements_depend_on_neither_workers_nor_batches(zoo):
    source = FolderSource(zoo[0])
    keys = Stream(len(source), 1)[0 : 2 * len(source)]

    def result(size: int, workers: int) -> Batch:
        batches = [keys[first : first + size] for first in range(0, len(keys), size)]
        return joined(loaded_keys(source, batches, workers))

    expected = result(len(keys), 0)
    assert len(expected.replaced) > 10
    for size, workers in ((7, 2), (3, 0), (1, 1)):
        assert same(result(size, workers), expected)


def test_a_replacement_is_a_function_of_seed_epoch_and_index():
    members = range(40, 70)

    def first(seed: int, epoch: int) -> list[int]:
        return [replacements(members, (seed, epoch, index))[0] for index in members]

    chosen = first(1, 0)
    assert first(1, 0) == chosen
    assert len(set(chosen)) > 10, "images do not share one stand-in"
    for other in (first(1, 1), first(2, 0)):
        assert sum(a == b for a, b in zip(chosen, other)) < 8, "another draw"


def test_replacements_are_distinct_others_of_the_class_and_few():
    for members in (range(3, 5), range(1, 40, 13), range(100, 1400), range(12)):
        for index in members[:20]:
            tried = replacements(members, (0, 0, index))
            assert len(tried) == len(set(tried)) == min(MAX_REPLACEMENTS, len(members) - 1)
            assert set(tried) <= set(members) - {index}


def test_an_image_alone_in_its_class_cannot_be_replaced():
    assert replacements(range(7, 8), (0, 0, 7)) == []


def test_a_replacement_that_is_bad_itself_is_passed_over(tmp_path):
    root = write_images(tmp_path, ["a"], 6)
    for name in "01245":
        (root / "a" / f"{name}.png").write_bytes(b"no image")
    batches = [[(epoch, 0) for epoch in range(8)]]
    (batch,) = loaded_keys(FolderSource(root), batches)
    assert [report.replacement for report in batch.replaced] == [3] * 8


def test_an_image_that_went_missing_is_replaced_too(tmp_path):
    source = FolderSource(write_images(tmp_path, ["a"], 3))
    os.remove(source.name(1))
    (batch,) = loaded_keys(source, [[(0, 1)]])
    (report,) = batch.replaced
    assert report.reason == "cannot be read (No such file or directory)"
    assert report.replacement in (0, 2)


@pytest.mark.parametrize(("images", "tried"), [(1, 0), (3, 2), (14, 10)])
@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_stand_in_the_image_and_its_class_are_named(
    tmp_path, images, tried, workers
):
    root = write_images(tmp_path, ["a", "b"], images)
    for i in range(images):
        (root / "b" / f"{i}.png").write_bytes(b"no image")
    source = FolderSource(root)
    with pytest.raises(ImageError) as error:
        loaded_keys(source, [[(0, 0), (0, images)]], workers)
    assert str(error.value) == (
        f"{source.name(images)}: cannot be decoded (not a known kind of image), and none of the "
        f"{tried} other images of its class that were tried can stand in for it: check {root}/b"
    )


def test_an_evaluation_names_every_bad_image_and_sees_the_others(zoo):
    source = FolderSource(zoo[0])
    for name, index in by_name(source).items():
        loaded = load(source, VIEW, [[(0, index)]], IDENTITY, NONE)
        words = f"^{re.escape(source.name(index))}: cannot be decoded"
        if zoo[1][name] == "decodes":
            assert next(loaded).replaced == []
        else:
            with pytest.raises(ImageError, match=words):
                next(loaded)


def test_an_evaluation_has_no_seed_to_replace_with():
    with pytest.raises(AttributeError, match="seed"):
        next(load(Numbered(), VIEW, [[(0, 1)]], IDENTITY, NONE, replace_bad=True))


# ---------------------------------------------------------------------------------- checksums


def test_checksums_are_of_the_pixels_the_flip_and_the_colour_change(folder):
    source, view = FolderSource(folder), TrainView(24, seed=1)
    keys = Stream(IMAGES, 1)[5:17]
    (batch,) = loaded_keys(source, [keys])
    for key, checksum in zip(keys, batch.checksums, strict=True):
        pixels, flip, colour = seen(source, view, key, key[1])
        changes = struct.pack("<4f", flip, *colour)
        assert checksum == zlib.crc32(pixels.numpy().tobytes() + changes)


def test_checksums_without_colour_are_of_the_pixels():
    (batch,) = load(Numbered(), VIEW, [[(0, 9), (0, 4)]], IDENTITY, NONE, checksums=True)
    assert batch.checksums == [zlib.crc32(bytes([level]) * 192 + bytes(4)) for level in (9, 4)]


def test_checksums_are_made_only_if_asked_for():
    (batch,) = load(Numbered(), VIEW, [[(0, 9)]], IDENTITY, NONE)
    assert batch.checksums == []


class Fetching(SyntheticSource):
    """Images that a process can read once it has been told to fetch them."""

    fetches_ahead = 6

    def __init__(self, images: int) -> None:
        super().__init__(images, classes=3)
        self.coming: list[int] = []

    def fetch(self, indices: list[int]) -> None:
        self.coming += indices

    def read(self, index: int) -> tuple[bytes, int]:
        self.coming.remove(index)
        return super().read(index)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_process_fetches_what_it_will_read(workers):
    batches = [[(0, index) for index in range(first, first + 2)] for first in range(0, 24, 2)]
    loaded = load(Fetching(24), EvalView(24, 1.0, "bilinear"), batches, IDENTITY, Workers(workers))
    assert [batch.keys for batch in loaded] == batches
