"""The loader: the same batches in the same order, with any number of workers."""

import io
from itertools import count, islice

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from data.loader import Normalisation, Workers, load
from data.sources import FolderSource, ImageError
from data.stream import Stream, evaluation_batches, micro_batches
from data.transforms import EvalView, TrainView, decode, to_input

CPU = torch.device("cpu")
NORMALISATION = Normalisation([0.5, 0.4, 0.3], [0.5, 0.25, 0.2])
IDENTITY = Normalisation([0.0] * 3, [1.0] * 3)
NONE = Workers(0)
IMAGES = 12  # in all, of three classes


class Numbered:
    """Image i is all of grey level i, its label 100 + i; those of `broken` hold no image."""

    classes = ("unused",)

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 256

    def read(self, index: int) -> tuple[bytes, int]:
        buffer = io.BytesIO(b"no image")
        if index not in self.broken:
            Image.new("L", (10, 10), index).save(buffer, "PNG")
        return buffer.getvalue(), 100 + index

    def name(self, index: int) -> str:
        return f"numbered/{index}.png"


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


def training(source: FolderSource, micro_batch: int, workers: int, images: int) -> list:
    """The first `images` of a run, over the end of the first epoch, one by one."""
    batches = micro_batches(Stream(len(source), 1), 0, 8, micro_batch, 0, 1)
    loaded = load(source, TrainView(24, seed=1), batches, NORMALISATION, Workers(workers), CPU)
    return [
        (image, int(label))
        for batch, labels, *_ in islice(loaded, images // micro_batch)
        for image, label in zip(batch, labels)
    ]


def identical(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(image, image_2) and label == label_2
        for (image, label), (image_2, label_2) in zip(one, other)
    )


# ---------------------------------------------------------------------------------- content


def test_batches_come_in_the_order_asked_for():
    batches = [[(0, 7), (3, 200)], [(0, 0)], [(1, 255), (1, 7), (0, 31)]]
    loaded = list(load(Numbered(), EvalView(8, 1.0, "bilinear"), batches, IDENTITY, NONE, CPU))
    assert [labels.tolist() for _, labels, *_ in loaded] == [[107, 300], [100], [355, 107, 131]]
    for (images, *_), keys in zip(loaded, batches, strict=True):
        levels = torch.tensor([index for _, index in keys]).view(-1, 1, 1, 1) / 255
        assert torch.equal(images, levels.expand(-1, 3, 8, 8))


def test_evaluation_equals_imagefolder_with_timms_transform(folder):
    transform = timm.data.create_transform(
        (3, 24, 24),
        interpolation="bicubic",
        crop_pct=0.875,
        mean=NORMALISATION.mean,
        std=NORMALISATION.std,
    )
    expected = list(ImageFolder(folder, transform))
    view, batches = EvalView(24, 0.875, "bicubic"), evaluation_batches(IMAGES, 5, 0, 1)
    loaded = list(load(FolderSource(folder), view, batches, NORMALISATION, NONE, CPU))
    images, labels = (torch.cat(parts) for parts in list(zip(*loaded))[:2])
    assert torch.equal(images, torch.stack([image for image, _ in expected]))
    assert labels.tolist() == [label for _, label in expected]


def test_training_equals_its_parts_one_image_at_a_time(folder):
    source, view = FolderSource(folder), TrainView(24, seed=1)
    mean, std = torch.tensor(NORMALISATION.mean), torch.tensor(NORMALISATION.std)
    expected = []
    for epoch, index in Stream(IMAGES, 1)[0:16]:
        encoded, label = source.read(index)
        pixels, colour = view(decode(encoded, ""), epoch, index)
        batch = torch.from_numpy(pixels.copy())[None]
        expected.append((to_input(batch, torch.tensor([colour]), mean, std)[0], label))
    assert identical(training(source, 4, 0, 16), expected)


def test_workers_and_batch_size_change_no_bit(folder):
    source = FolderSource(folder)
    expected = training(source, 8, 0, 32)
    assert identical(training(source, 8, 2, 32), expected)
    assert identical(training(source, 2, 0, 32), expected)


@pytest.mark.parametrize("view", [EvalView(24, 1.0, "bilinear"), TrainView(24, seed=0)])
def test_batches_are_float32_in_channels_last_memory_with_int64_labels(view):
    batch = [(0, index) for index in range(3)]
    images, labels, *_ = next(load(Numbered(), view, [batch], NORMALISATION, NONE, CPU))
    assert images.shape == (3, 3, 24, 24)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (3,)
    assert labels.dtype == torch.int64


def test_an_endless_stream_is_read_only_as_far_as_needed():
    asked = []
    batches = (asked.append(i) or [(0, i)] for i in count())
    loaded = load(Numbered(), EvalView(8, 1.0, "bilinear"), batches, IDENTITY, NONE, CPU)
    assert [int(labels) for _, labels, *_ in islice(loaded, 3)] == [100, 101, 102]
    assert len(asked) == 3


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_reader_there_with_its_name(workers):
    batches = [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4), (0, 5)]]
    source, view, seen = Numbered(broken=(3, 4)), EvalView(8, 1.0, "bilinear"), []
    with pytest.raises(ImageError) as error:
        for batch in load(source, view, batches, IDENTITY, Workers(workers), CPU):
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
        list(load(source, EvalView(8, 1.0, "bilinear"), batches, IDENTITY, Workers(workers), CPU))
    assert str(error.value) == f"{source.name(0)}: cannot be read (No such file or directory)"
