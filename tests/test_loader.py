"""The loader: the same batches in the same order, with any number of workers."""

import io
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from image_zoo import write_zoo
from PIL import Image
from programs import ROOT, environment, is_alive, write_images
from torchvision.datasets import ImageFolder

from data.loader import (
    MAX_REPLACEMENTS,
    Batch,
    Normalisation,
    WorkerError,
    Workers,
    load,
    next_batch,
    replacements,
    worker_errors,
)
from data.sources import DataError, FolderSource, ImageError, Source
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


def loaded_keys(source: Source, batches: list, workers: int = 0, seed: int = 1) -> list[Batch]:
    """Batches of given keys as a training gets them, with checksums."""
    view = TrainView(24, seed)
    loaded = load(source, view, batches, NORMALISATION, Workers(workers), CPU, True, True)
    return list(loaded)


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
    assert batch.indices == indices
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
    mean, std = torch.tensor(NORMALISATION.mean), torch.tensor(NORMALISATION.std)
    for index, image in zip(indices, batch.images, strict=True):
        encoded, _ = source.read(stand_ins.get(index, index))
        pixels, colour = view(decode(encoded, ""), epoch, index)
        shown = torch.from_numpy(pixels.copy())[None]
        assert torch.equal(image, to_input(shown, torch.tensor([colour]), mean, std)[0])


def test_replacements_depend_on_neither_workers_nor_batches(zoo):
    source = FolderSource(zoo[0])
    keys = Stream(len(source), 1)[0 : 2 * len(source)]

    def result(size: int, workers: int) -> tuple:
        batches = [keys[first : first + size] for first in range(0, len(keys), size)]
        loaded = loaded_keys(source, batches, workers)
        images = torch.cat([batch.images for batch in loaded])
        rest = [[x for batch in loaded for x in batch[field]] for field in (2, 3, 4)]
        return images, rest, torch.cat([batch.labels for batch in loaded])

    images, rest, labels = result(len(keys), 0)
    assert len(rest[1]) > 10
    for size, workers in ((7, 2), (3, 0), (1, 1)):
        images_2, rest_2, labels_2 = result(size, workers)
        assert torch.equal(images, images_2)
        assert rest == rest_2
        assert torch.equal(labels, labels_2)


def test_a_replacement_is_a_function_of_seed_epoch_and_index():
    members = range(40, 70)

    def first(seed: int, epoch: int) -> list[int]:
        return [replacements(members, (seed, epoch, index))[0] for index in members]

    chosen = first(1, 0)
    assert first(1, 0) == chosen
    assert len(set(chosen)) > 10, "images do not share one stand-in"
    for other in (first(1, 1), first(2, 0)):
        assert sum(a == b for a, b in zip(chosen, other)) < 8, "another draw"


@pytest.mark.parametrize("members", [range(3, 5), range(1, 40, 13), range(100, 1400), range(12)])
def test_replacements_are_distinct_others_of_the_class_and_few(members):
    for index in list(members)[:20]:
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
        f"{tried} other images of its class that were tried can stand in for it: see to {root}/b"
    )


def test_an_evaluation_names_every_bad_image_and_sees_the_others(zoo):
    source, view = FolderSource(zoo[0]), EvalView(8, 1.0, "bilinear")
    for name, index in by_name(source).items():
        loaded = load(source, view, [[(0, index)]], IDENTITY, NONE, CPU)
        if zoo[1][name] == "decodes":
            assert next(loaded).replaced == []
            continue
        with pytest.raises(
            ImageError, match=f"^{re.escape(source.name(index))}: cannot be decoded"
        ):
            next(loaded)


def test_an_evaluation_has_no_seed_to_replace_with():
    view = EvalView(8, 1.0, "bilinear")
    with pytest.raises(AttributeError, match="seed"):
        next(load(Numbered(), view, [[(0, 1)]], IDENTITY, NONE, CPU, replace_bad=True))


# ---------------------------------------------------------------------------------- checksums


def test_checksums_are_of_the_pixels_and_the_colour_change(folder):
    source, view = FolderSource(folder), TrainView(24, seed=1)
    keys = Stream(IMAGES, 1)[5:17]
    (batch,) = loaded_keys(source, [keys])
    for (epoch, index), checksum in zip(keys, batch.checksums, strict=True):
        pixels, colour = view(decode(source.read(index)[0], ""), epoch, index)
        assert checksum == zlib.crc32(pixels.tobytes() + struct.pack("<3f", *colour))


def test_checksums_without_colour_are_of_the_pixels():
    view = EvalView(8, 1.0, "bilinear")
    (batch,) = load(Numbered(), view, [[(0, 9), (0, 4)]], IDENTITY, NONE, CPU, checksums=True)
    assert batch.checksums == [zlib.crc32(bytes([level]) * 192) for level in (9, 4)]


def test_checksums_are_made_only_if_asked_for():
    (batch,) = load(Numbered(), EvalView(8, 1.0, "bilinear"), [[(0, 9)]], IDENTITY, NONE, CPU)
    assert batch.checksums == []


# ---------------------------------------------------------------------------------- workers


class Hanging(Numbered):
    """Images from the twentieth on never arrive."""

    def read(self, index: int) -> tuple[bytes, int]:
        if index >= 20:
            time.sleep(600)
        return super().read(index)


class Slow(Numbered):
    """An image takes its time, so that a batch is taken as soon as it is there."""

    def read(self, index: int) -> tuple[bytes, int]:
        time.sleep(0.2)
        return super().read(index)


class Faulty(Numbered):
    """Has a mistake in its own program."""

    def read(self, index: int) -> tuple[bytes, int]:
        raise RuntimeError("a mistake")


def endless(source: Source, workers: Workers):
    batches = ([(0, i % 256)] for i in count())
    return load(source, EvalView(8, 1.0, "bilinear"), batches, IDENTITY, workers, CPU)


def drain(batches, then: Callable[[int], None] = lambda pid: None) -> None:
    """Take two batches, do something to the second worker, take what comes."""
    next(batches), next(batches)
    then(multiprocessing.active_children()[-1].pid)
    for _ in batches:
        pass


def assert_told(error: DataError, *words: str) -> None:
    assert isinstance(error, DataError)
    assert "\n" not in str(error)
    assert error.__cause__ is None and error.__suppress_context__, "no traceback of torch's"
    for word in words:
        assert word in str(error)


def test_a_killed_worker_is_told_in_one_line():
    started = time.monotonic()
    with pytest.raises(WorkerError) as error, worker_errors():
        drain(endless(Numbered(), Workers(2)), lambda pid: os.kill(pid, signal.SIGKILL))
    assert time.monotonic() - started < 10
    assert_told(error.value, "DataLoader worker (pid", "memory", "data.workers")
    assert multiprocessing.active_children() == []


def test_a_worker_killed_while_the_program_does_something_else_is_told_too():
    batches = endless(Numbered(), Workers(2))
    next(batches)
    with closing(batches), pytest.raises(WorkerError) as error, worker_errors():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in range(500):  # a training step, say
            time.sleep(0.01)
    assert_told(error.value, "is killed by signal: Killed", "memory", "data.workers")


class Unreachable:
    """An iterator of batches that lie with a process which no longer gives them out."""

    def __next__(self) -> None:
        raise ConnectionResetError("reset by peer")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, r"worker \(pid \d+\) exited"), (3, "reset by")]
)
def test_a_lost_connection_is_a_workers_death_only_if_it_dies(seconds, said):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,))
    child.start()
    try:
        with pytest.raises((RuntimeError, ConnectionResetError), match=said):
            next_batch(Unreachable(), [child], 0)
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize(
    ("source", "act"),
    [(Hanging(), lambda pid: None), (Slow(), lambda pid: os.kill(pid, signal.SIGSTOP))],
    ids=["storage hangs", "worker stopped"],
)
def test_a_hanging_worker_is_told_after_the_time_allowed_and_ended(source, act):
    started = time.monotonic()
    with pytest.raises(WorkerError) as error:
        drain(endless(source, Workers(2, timeout_s=1.5)), act)
    assert 1.5 <= time.monotonic() - started < 5
    assert_told(error.value, "timed out after 1.5 seconds", "storage", "run.timeout_s")
    assert multiprocessing.active_children() == []


def test_workers_stopped_with_batches_not_yet_fetched_are_told_too():
    """Fetching one waits for its worker inside torch, beyond the reach of torch's time-out."""

    def stop_all(_pid: int) -> None:
        time.sleep(1)  # both have batches ready
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGSTOP)

    with pytest.raises(WorkerError) as error:
        drain(endless(Numbered(), Workers(2, timeout_s=1.0)), stop_all)
    assert_told(error.value, "timed out after 1 seconds", "run.timeout_s")
    assert multiprocessing.active_children() == []


def test_a_time_limit_is_no_matter_without_workers():
    assert next(endless(Numbered(), Workers(0, timeout_s=1.0))).labels.tolist() == [100]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_program_keeps_its_traceback(workers):
    with pytest.raises(RuntimeError, match="a mistake") as error:
        next(endless(Faulty(), Workers(workers)))
    assert not isinstance(error.value, WorkerError)


ORPHANS = """
import multiprocessing, sys, time
from test_loader import Hanging, Workers, endless
batches = endless(Hanging(), Workers(2))
for _ in range(20):  # a worker hangs by now, in a read that will not end
    next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


MISTAKE = """
from test_loader import Numbered, Workers, endless
batches = endless(Numbered(), Workers(2))
next(batches)
raise ValueError("a mistake")
"""


def start_script(text: str) -> subprocess.Popen[str]:
    """A Python program of its own that can import this module."""
    return subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_workers_keep_no_program_from_ending():
    program = start_script(MISTAKE)
    _, error = program.communicate(timeout=30)
    assert program.returncode == 1
    assert error.endswith("ValueError: a mistake\n")


def test_a_reader_that_has_had_enough_leaves_no_worker():
    batches = endless(Numbered(), Workers(2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_workers_end_with_a_main_process_that_is_killed():
    program = start_script(ORPHANS)
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    try:
        for pid in workers:  # what workers leave to the main process
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        assert all(map(is_alive, workers))
        program.kill()
        program.wait()
        deadline = time.monotonic() + 2
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(is_alive, workers))
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)
