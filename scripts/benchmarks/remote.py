"""Shards in an object store: from the cache beside local shards, and cold beside what the link
gives."""

from __future__ import annotations

import http.client
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from data import sources, stream, transforms
from data.base import Source
from data.prepare import shard_writer
from data.shards import index as shard_index
from data.shards import prefetch
from data.shards.remote import Storage
from irv2.report import markdown
from irv2.training.distributed import keep_freed_memory
from scripts.benchmarks import loading
from scripts.benchmarks.alternation import Way, alternate, rate, table_row
from scripts.benchmarks.loading import CPU, HIGH_QUALITY, SIZE, Unchanged, reader
from scripts.benchmarks.range_server import serving

DELAY_S = 0.02  # added to each request
LINK = 40e6  # bytes a second
PASSES = 3  # over all images in a window of cold reads
BATCH = 32  # images a loader process makes at once


def measure(rounds: int) -> dict[str, Any]:
    """Return the table's rows by name: each compares two ways in turn, `rounds` times."""
    keep_freed_memory()
    rows: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        tqdm(total=len(COMPARED), unit="row", disable=None) as bar,
    ):
        folder, shards, cache = (Path(directory, name) for name in ("folder", "shards", "cache"))
        loading.write_photographs(folder, HIGH_QUALITY)
        shard_writer.write_shards(
            sources.FolderSource(folder),
            shards,
            shard_writer.Options("photo", images_per_shard=32),
            1,
            lambda _: None,
        )
        local = sources.open_source(str(shards))
        with serving(shards) as url:
            cached = sources.open_source(url, Storage(str(cache)))
            read_all(cached, 1)
        # The server has gone: reading an image that is not in the cache would fail.
        for name, way in {"cached": trained, "cached, read": read}.items():
            rows[name] = alternate(way(cached), way(local), rounds)
            bar.update()
        with serving(shards, DELAY_S, LINK) as url:
            cold, images = sources.open_source(url), PASSES * len(local)
            ours = rate(images, lambda: read_all(cold, PASSES))
            whole = rate(images, lambda: download(url, shards, PASSES))
            rows["cold"] = alternate(ours, whole, rounds)
            bar.update()
            one_by_one = rate(BATCH, lambda: [cold.read(index) for index in range(BATCH)])
            rows["round trips"] = alternate(ours, one_by_one, rounds)
            bar.update()
    return rows


def trained(source: Source) -> Way:
    """Return training images as one loader process makes them: read, decoded and cropped."""
    return reader(source, transforms.TrainView(SIZE, 0), Unchanged(CPU), 1)


def read(source: Source) -> Way:
    """Read images in this process, one after another."""
    return rate(len(source), lambda: [source.read(index) for index in range(len(source))])


def read_all(source: Source, passes: int) -> None:
    """Read all images in batches, as a loader process does, without decoding them."""
    batches = passes * stream.evaluation_batches(len(source), BATCH, 0, 1)
    for request in prefetch.requests(batches, source.fetches_ahead, 1):
        source.fetch(request.soon)
        for _, index in request.keys:
            source.read(index)


def download(url: str, folder: Path, passes: int) -> None:
    """Download all shards over one connection, a request each: the link is never idle for long."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    for _ in range(passes):
        for shard in shard_index.load(folder).shards:
            connection.request("GET", f"/{shard.name}")
            if len(connection.getresponse().read()) != shard.size:
                raise RuntimeError(f"{url}{shard.name}: not received whole")
    connection.close()


COMPARED: tuple[tuple[str, str, str], ...] = (
    ("cached", "training from the cache, against local shards", "≥ 0.95"),
    ("cached, read", "reading alone from the cache, against local shards", "-"),
    (
        "cold",
        f"cold reads, {DELAY_S * 1000:g} ms added to each and {LINK / 1e6:g} MB/s for all, against "
        "whole shards over the same link",
        "≥ 0.9",
    ),
    ("round trips", "the same, against one read after another", "-"),
)


def table(figures: dict[str, Any]) -> str:
    rows = (table_row(words, figures[name], goal, digits=3) for name, words, goal in COMPARED)
    return markdown.table("measured | ours, images/s | the other | ratio (range) | goal", rows)
