"""Shards in an object store: the same images, whatever the network does, or the object's name."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faulty_proxy import CUT, ERROR, PASS, SLOW, WHOLE, FaultyProxy, faulty
from shard_makers import IMAGES, everything, flip, write_folder, write_set

from data import loader, stream
from data.base import Source
from data.errors import DataError, ImageError, StorageError
from data.prepare import checkup
from data.shards import object_store
from data.shards.local import ShardSource
from data.shards.remote import Storage
from data.sources import open_source
from data.to_input import ToInput
from data.transforms import TrainView
from data.workers import Workers
from irv2 import config_file, evaluation, input_pipeline
from irv2.data_section import Data
from irv2.run.trained import Trained
from irv2.training.distributed import World
from scripts.benchmarks.range_server import serving
from scripts.checks import images
from scripts.checks.case import OK, Case, CheckOptions

pytest.importorskip("aiohttp", reason="remote shards are NOT tested: requirements-remote.txt")

BATCH = 4
INPUT = ToInput([0.5] * 3, [0.5] * 3, torch.device("cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Shards; not to be changed."""
    root = tmp_path_factory.mktemp("remote")
    return write_set(write_folder(root / "train"), root / "shards")


@pytest.fixture(scope="module")
def url(made) -> Iterator[str]:
    with serving(made) as at:
        yield at


@pytest.fixture
def copied(made, tmp_path) -> Iterator[tuple[str, Path]]:
    """Shards to damage: their URL, and where they lie."""
    folder = shutil.copytree(made, tmp_path / "shards")
    with serving(folder) as at:
        yield at, folder


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Attempts and pauses are short, and tests with slow answers with them."""
    monkeypatch.setattr(object_store, "ATTEMPT_S", 0.2)
    monkeypatch.setattr(object_store, "FIRST_PAUSE_S", 0.01)


def storage(tmp_path: Path | None = None, **options) -> Storage:
    return Storage(None if tmp_path is None else str(tmp_path / "cache"), **options)


def batches(source: Source, start: int, number: int, workers: int = 0) -> list[loader.Batch]:
    """A training's batches from a position on, of several epochs."""
    order = stream.Stream(len(source), 3)
    keys = (order[part] for part in stream.micro_batches(start, BATCH, BATCH, 0, 1))
    loaded = loader.load(source, TrainView(24, 1), keys, INPUT, Workers(workers, 30), True, True)
    taken = list(islice(loaded, number))
    loaded.close()
    return taken


def identical(ours: list[loader.Batch], theirs: list[loader.Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and (a.keys, a.checksums) == (b.keys, b.checksums)
        and [image.replacement for image in a.replaced] == [i.replacement for i in b.replaced]
        for a, b in zip(ours, theirs)
    )


# ---------------------------------------------------------------------------------- the same


def test_images_labels_classes_and_order_are_those_of_the_folder(made, url):
    expected, source = ShardSource(made), open_source(url)
    assert len(source) == len(expected) == IMAGES
    assert source.classes == expected.classes
    assert source.class_counts() == expected.class_counts()
    assert source.storage_order.tolist() == expected.storage_order.tolist()
    assert everything(source) == everything(expected)
    names = [expected.name(i).replace(f"{made}/", url) for i in range(IMAGES)]
    assert [source.name(i) for i in range(IMAGES)] == names


def test_the_url_may_end_with_or_without_a_slash(url):
    assert open_source(url.rstrip("/")).read(0) == open_source(url).read(0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_cached", [False, True])
def test_batches_are_bit_identical_also_from_the_middle_of_an_epoch(
    made, url, tmp_path, workers, is_cached
):
    expected = batches(ShardSource(made), 0, 8)
    source = open_source(url, storage(tmp_path if is_cached else None))
    assert identical(batches(source, 0, 8, workers), expected)
    assert identical(batches(source, 5 * BATCH, 3, workers), expected[5:])
    again = open_source(url, storage(tmp_path if is_cached else None))
    assert identical(batches(again, 2 * BATCH, 6, workers), expected[2:])


def test_a_window_keeps_to_the_same_order(made, url):
    taken = []
    for train in (str(made), url):
        data = {"train": train, "val": train, "image_size": 75, "workers": 0, "shuffle_window": 5}
        small = {"global_batch": BATCH, "micro_batch": BATCH}
        cfg = config_file.from_tree({"data": data, "train": small, "log": {"ledger": True}})
        source = input_pipeline.open_source(train, cfg.data, cfg.run.timeout_s)
        order, world = input_pipeline.training_order(cfg, source), World(0, 1, torch.device("cpu"))
        made_batches = input_pipeline.training_batches(cfg, source, order, 0, BATCH, world)
        taken.append(list(islice(made_batches, 8)))
    assert identical(*taken)


def test_a_forked_process_its_parent_and_an_unpickled_copy_read_side_by_side(made, url):
    source, expected = open_source(url), everything(ShardSource(made))
    source.fetch(range(IMAGES))  # on their way when the process is forked
    if (child := os.fork()) == 0:
        signal.alarm(60)  # waiting for what the parent fetches would never end
        try:
            source.fetch(range(IMAGES))
            os._exit(everything(source) != expected)
        finally:
            os._exit(2)
    assert everything(source) == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [everything(source) for _ in range(2)] == [expected] * 2
    assert everything(pickle.loads(pickle.dumps(source))) == expected


# ---------------------------------------------------------------------------------- ahead, cache


def test_images_to_come_are_fetched_at_the_same_time(made, url):
    """Nothing is answered before as many requests have come as there are images."""
    arrived = threading.Barrier(IMAGES + 1)
    is_open = threading.Event()

    def wait_for_all(path: str, number: int) -> str:
        if is_open.is_set() and path.endswith(".tar"):
            proxy.lock.release()  # it is held around this
            try:
                arrived.wait(20)
            finally:
                proxy.lock.acquire()
        return PASS

    with faulty(url, wait_for_all) as (at, proxy):
        source = open_source(at)
        is_open.set()
        source.fetch(range(IMAGES))
        arrived.wait(20)
        assert everything(source) == everything(ShardSource(made))
    assert proxy.most_in_flight == IMAGES


def test_a_loader_fetches_each_image_once_and_later_epochs_from_the_cache(url, tmp_path):
    with faulty(url) as (at, proxy):
        source = open_source(at, storage(tmp_path))
        proxy.requests.clear()
        batches(source, 0, 8, 2)
        # Read-ahead of both workers may overlap between epochs of so few images, no more.
        assert IMAGES <= len(proxy.requests) <= 2 * IMAGES
        proxy.requests.clear()
        batches(source, 0, 8)
        batches(open_source(at, storage(tmp_path)), 0, 8, 2)
        assert [path for path in proxy.requests if path.endswith(".tar")] == ["/train-00000.tar"]


def test_a_damaged_file_of_the_cache_is_fetched_anew(made, url, tmp_path):
    expected = everything(ShardSource(made))
    with faulty(url) as (at, proxy):
        everything(open_source(at, storage(tmp_path)))
        files = sorted((tmp_path / "cache").glob("*/[0-9a-f]*-*"))
        assert len(files) == IMAGES
        for number, file in enumerate(files):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes([content, content[:-1], b""][number % 3])
        source = open_source(at, storage(tmp_path))
        proxy.requests.clear()
        assert everything(source) == expected
        assert len(proxy.requests) == IMAGES
        assert everything(source) == expected
        assert len(proxy.requests) == IMAGES


def test_a_disk_that_refuses_is_told_and_the_run_goes_on(made, url, tmp_path, monkeypatch, capsys):
    source = open_source(url, storage(tmp_path))

    def refuse(number: int, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(source._cache, "put", refuse)
    assert everything(source) == everything(ShardSource(made))
    told = capsys.readouterr().err
    assert told.count("No space left on device") == 1
    assert str(tmp_path / "cache") in told


def data_section(**keys) -> Data:
    """Section "data" of a config."""
    return Data(train="unused", image_size=75, **keys)


def evaluated(data: Data) -> list[list[int]]:
    """The images that validate.py shows a run's network, for which nothing is computed here."""
    model = SimpleNamespace(num_classes=3)
    network = Trained(model, "a run", "ema", 1, None, data, data.val)
    asked = evaluation.prepare(network, {}, evaluation.LabelFiles())
    world = World(0, 1, torch.device("cpu"))
    batches = asked.batches(BATCH, Workers(0), world)
    return [[index for _, index in batch.keys] for batch, _ in batches]


def test_a_second_evaluation_of_a_run_reads_its_cache_and_asks_for_no_image(url, tmp_path):
    with faulty(url) as (at, proxy):
        data = data_section(val=at, cache_dir=str(tmp_path / "cache"))
        first = evaluated(data)
        assert sum(map(len, first)) == IMAGES
        proxy.requests.clear()
        assert evaluated(data) == first
        # Whether the server knows of ranges is asked of a header.
        assert [path for path in proxy.requests if path.endswith(".tar")] == ["/train-00000.tar"]


def test_an_evaluation_goes_on_where_a_runs_cache_cannot_be(url, tmp_path, capsys):
    (tmp_path / "file").touch()
    data = data_section(val=url, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="images cannot be kept here"):
        input_pipeline.open_source(url, data)
    assert sum(map(len, evaluated(data))) == IMAGES
    assert "images cannot be kept here" in capsys.readouterr().err


def test_a_doctors_look_fills_the_cache_of_the_run(url, made, tmp_path):
    data = {"train": str(made), "val": url, "cache_dir": str(tmp_path / "cache")}
    case = Case(CheckOptions("small.yaml", []), cfg=config_file.from_tree({"data": data}))
    assert [finding.level for finding in images.check_sources(case)] == [OK]
    everything(case.val)
    assert len(list((tmp_path / "cache").glob("*/[0-9a-f]*-*"))) == IMAGES


def test_a_doctors_look_fetches_many_images_at_a_time(url):
    with faulty(url, lambda path, number: SLOW if number > 6 else PASS) as (at, proxy):
        source = open_source(at)
        proxy.most_in_flight = 0
        assert checkup.bad_images(source, range(IMAGES), processes=1) == []
    assert proxy.most_in_flight > IMAGES / 2


# ---------------------------------------------------------------------------------- faults


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [ERROR, CUT, SLOW])
def test_faults_that_pass_change_no_bit(made, url, impatient, kind, workers, capfd):
    """A burst at first, then every third request."""

    def fault(path: str, number: int) -> str:
        is_struck = 3 <= number < 12 or number % 3 == 2
        return kind if path.endswith(".tar") and is_struck else PASS

    with faulty(url, fault) as (at, proxy):
        source = open_source(at)
        assert identical(batches(source, 0, 8, workers), batches(ShardSource(made), 0, 8))
        assert proxy.injected.count(kind) >= 9
    assert f"{at}train-0" in capfd.readouterr().err


def test_a_run_may_begin_amid_faults(made, url, impatient):
    """The index is refused twice; so are the sizes of shards, by HEAD and then by GET."""
    heads = count()

    def fault(path: str, number: int) -> str:
        is_struck = next(heads) < 6 if number < 0 else number < 2 or 3 <= number < 7
        return ERROR if is_struck else PASS

    with faulty(url, fault) as (at, proxy):
        assert everything(open_source(at)) == everything(ShardSource(made))
        assert len(proxy.injected) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_faults_that_do_not_pass_are_told_with_the_objects_name(url, workers):
    with faulty(url, lambda path, number: ERROR if number > 6 else PASS) as (at, _):
        source = open_source(at)
        source.store.timeout_s = 2
        with pytest.raises(StorageError) as caught:
            batches(source, 0, 8, workers)
    words = rf"{at}train-0000\d.tar: 503 Service Unavailable, tried again"
    assert re.match(words, str(caught.value))
    assert not isinstance(caught.value, ImageError)  # nothing may stand in for it


def test_a_server_that_is_gone_is_told_by_its_url(made, impatient):
    with serving(made) as at:
        source = open_source(at)
    source.store.timeout_s = 0.5
    for attempt in (lambda: source.read(3), lambda: open_source(at, storage(timeout_s=0.5))):
        with pytest.raises(DataError, match=f"{at}.*: .*; the same command continues once"):
            attempt()


def test_a_truncated_object_is_named_and_no_image_of_it_is_given(copied, impatient):
    at, folder = copied
    source, sound = open_source(at), ShardSource(folder)
    order = sound.storage_order.tolist()
    name, last = sound.place(order[-1])[0], order[-1]
    size = (folder / name).stat().st_size
    for left in (sound.place(last)[1] + 10, 1024):
        os.truncate(folder / name, left)
        with pytest.raises(StorageError, match=f"{at}{name}: has {left:,} bytes, not {size:,}"):
            source.read(last)
    with pytest.raises(StorageError, match=f"{at}{name}: has 1,024 bytes"):
        batches(source, 0, 8, 1)
    with pytest.raises(DataError, match=rf"{at}: 1 of 4 shards.*{name} \(1,024 bytes, not"):
        open_source(at)


def test_an_object_of_other_content_is_named_and_its_images_are_replaced_as_in_a_folder(copied):
    at, folder = copied
    source, sound = open_source(at), ShardSource(folder)
    name = sound.place(0)[0]
    damaged = [i for i in range(IMAGES) if sound.place(i)[0] == name]
    places = [sound.place(index)[1:] for index in damaged]
    flip(folder / name, *(begin + size // 2 for begin, size in places))
    for index in damaged:
        with pytest.raises(ImageError, match=f"{at}{name}: .*does not match its checksum"):
            source.read(index)
    ours, theirs = (batches(one, 0, 8) for one in (source, ShardSource(folder)))
    assert identical(ours, theirs)
    assert {image.index for batch in ours for image in batch.replaced} == set(damaged)


def test_a_missing_object_is_named(copied):
    at, folder = copied
    source = open_source(at)
    name = source.place(5)[0]
    (folder / name).unlink()
    for attempt in (lambda: source.read(5), lambda: open_source(at)):
        with pytest.raises(StorageError, match=f"{at}{name}: no such object"):
            attempt()


def test_a_server_without_ranges_is_refused_when_the_run_begins(url):
    def fault(path: str, number: int) -> str:
        return WHOLE if path.endswith(".tar") else PASS

    with (
        faulty(url, fault) as (at, _),
        pytest.raises(StorageError, match=f"{at}train-00000.tar: .*range requests"),
    ):
        open_source(at, storage(timeout_s=5))


def test_a_damaged_index_is_told_by_its_url(copied):
    at, folder = copied
    path = folder / "index.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{at}index.safetensors: a damaged index"):
        open_source(at)
    path.unlink()
    with pytest.raises(DataError, match=f"{at}index.safetensors: no such object.*make_shards.py"):
        open_source(at)


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "spec",
    [
        "https://me:secret@host.example/shards/",
        "https://secret@host.example/shards/",
        "https://host.example/shards/?X-Amz-Signature=secret",
        "https://host.example/shards/#secret",
        "s3://AKIA:secret@bucket/shards",
        "s3://AKIA:sec/secret@bucket/shards",
    ],
)
def test_a_url_with_a_secret_is_refused_without_telling_it(spec):
    with pytest.raises(DataError, match="credentials are taken from") as caught:
        open_source(spec)
    assert "secret" not in str(caught.value)


def test_other_kinds_of_urls_are_refused():
    for spec in ("gs://bucket/x", "file:///etc", "ftp://host/x", "http:///x"):
        with pytest.raises(DataError):
            open_source(spec)


def test_what_libraries_say_of_a_fault_loses_urls():
    for said in ("at https://h/x?sig=secret now", "GET /x?sig=secret", "to u:secret@https://h"):
        assert "secret" not in object_store._words(OSError(said), 1)


@pytest.mark.parametrize("missing", ["fsspec", "aiohttp"])
def test_a_missing_library_is_told_with_the_command_that_installs_it(url, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DataError, match=r"pip install -r requirements-remote\.txt"):
        open_source(url)


def test_s3_without_credentials_says_so_at_once(monkeypatch, tmp_path):
    pytest.importorskip("s3fs", reason="S3 is NOT tested: requirements-remote.txt")
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match=r"s3://bucket/x/index.*: .*credentials"):
        open_source("s3://bucket/x")


def test_the_proxy_injects_what_it_says(url):
    """Else a test could pass for want of faults."""
    with faulty(url, lambda path, number: CUT) as (_, proxy):
        assert isinstance(proxy, FaultyProxy)
        assert proxy.told("/x") == CUT
        assert proxy.injected == [CUT]
