"""Training from real servers of objects, nginx and S3, whose answers are slow, refused, cut off or
of another object: the same batches and weights, or an end that names the object.

`pytest -m cluster tests/cluster/test_storage_servers.py`
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from faulty_proxy import CUT, ERROR, PASS, SLOW, FaultyProxy, faulty
from programs import run, start, wait_for
from same_run import assert_same_batches, assert_same_end, checkpoint_of, differing, steps
from small_run import STEPS, Inject, arguments, kill
from storage_servers import ServerMissingError, nginx, s3

pytestmark = pytest.mark.cluster
S3_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "not-to-be-told",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class Place:
    """Shards on a server."""

    kind: str  # "nginx" or "s3"
    upstream: str
    root: Path  # where the same files lie

    @contextmanager
    def behind(self, monkeypatch: pytest.MonkeyPatch, fault) -> Iterator[tuple[str, FaultyProxy]]:
        """Value of data.train that reads them through a proxy with faults."""
        with faulty(self.upstream, fault) as (at, proxy):
            if self.kind == "s3":
                monkeypatch.setenv("AWS_ENDPOINT_URL", at)
            yield "s3://shards/train/" if self.kind == "s3" else at, proxy


@pytest.fixture(scope="module", params=["nginx", "s3"])
def place(request, shards, tmp_path_factory) -> Iterator[Place]:
    """The shards on a server of either kind."""
    pytest.importorskip("s3fs", reason="remote shards are NOT tested: requirements-remote.txt")
    folder = tmp_path_factory.mktemp(request.param)
    root = shutil.copytree(shards, folder / "shards")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in S3_KEYS.items():
            patch.setenv(name, value)
        try:
            with {"nginx": nginx, "s3": s3}[request.param](root, folder) as url:
                yield Place(request.param, url, root)
        except ServerMissingError as error:
            pytest.skip(f"{request.param} is NOT tested: {error}")


def of_tars(kind: str):
    """A burst, then every third request for a shard; of HEADs every third from the first on."""
    heads = count()

    def fault(path: str, number: int) -> str:
        if ".tar" not in path:
            return PASS
        if number < 0:
            return kind if next(heads) % 3 == 0 else PASS
        return kind if 8 <= number < 16 or number % 3 == 2 else PASS

    return fault


@pytest.mark.parametrize("kind", [SLOW, ERROR, CUT])
def test_a_run_amid_faults_ends_as_one_on_a_local_disk(
    config, undisturbed, place, tmp_path, monkeypatch, inject: Inject, kind
):
    inject(f"{place.kind}: answers {kind}")
    with place.behind(monkeypatch, of_tars(kind)) as (train, proxy):
        cache = f"data.cache_dir={tmp_path / 'cache'}"
        place_of_run = arguments(config, tmp_path / "run", f"data.train={train}", cache)
        result = run("train.py", *place_of_run, "data.workers=2")
        assert result.returncode == 0, result.stderr
        assert proxy.injected.count(kind) > 8
    assert_same_batches(tmp_path / "run", undisturbed)
    assert_same_end(tmp_path / "run", undisturbed)
    assert S3_KEYS["AWS_SECRET_ACCESS_KEY"] not in result.stdout + result.stderr


def test_a_run_that_is_killed_continues_from_servers_and_ends_bit_identical(
    config, undisturbed, place, tmp_path, monkeypatch, inject: Inject
):
    inject(f"{place.kind}: SIGKILL of a run with a cache")
    with place.behind(monkeypatch, lambda path, number: PASS) as (train, _):
        options = (f"data.train={train}", f"data.cache_dir={tmp_path / 'cache'}", "data.workers=2")
        process = start("train.py", *arguments(config, tmp_path / "run", *options))
        wait_for(process, "step 3/")
        while not steps(tmp_path / "run"):  # the save of step 2 goes on in the background
            assert process.poll() is None
            time.sleep(0.01)
        kill(process)
        result = run("train.py", *arguments(config, tmp_path / "run", *options))
        assert result.returncode == 0, result.stderr
        assert "continuing after step" in result.stdout
    assert_same_batches(tmp_path / "run", undisturbed)
    assert_same_end(tmp_path / "run", undisturbed)


def test_an_outage_ends_the_run_with_the_objects_name_and_the_same_command_goes_on(
    config, undisturbed, place, tmp_path, monkeypatch, inject: Inject
):
    inject(f"{place.kind}: no answers any more")
    is_out = [True]

    def fault(path: str, number: int) -> str:
        return ERROR if is_out[0] and ".tar" in path and number > 9 else PASS

    with place.behind(monkeypatch, fault) as (train, _):
        options = (f"data.train={train}", "run.timeout_s=6", "data.workers=1")
        result = run("train.py", *arguments(config, tmp_path / "run", *options))
        assert result.returncode == 1
        last = result.stderr.splitlines()[-1]
        assert re.fullmatch(
            rf"train.py: {re.escape(train)}train-0000\d.tar: .*, tried again for 3 s; the same "
            "command continues once the storage answers",
            last,
        )
        assert "Traceback" not in result.stderr
        is_out[0] = False
        result = run("train.py", *arguments(config, tmp_path / "run", *options))
        assert result.returncode == 0, result.stderr
    assert_same_batches(tmp_path / "run", undisturbed)
    ours, theirs = (checkpoint_of(d, STEPS).parts for d in (tmp_path / "run", undisturbed))
    assert differing(ours, theirs) == []


def test_a_truncated_object_ends_the_run_with_its_name(
    config, place, tmp_path, monkeypatch, inject: Inject
):
    inject(f"{place.kind}: a truncated object")
    shard = sorted(place.root.glob("*.tar"))[1]
    sound = shard.read_bytes()
    is_opened = []

    def fault(path: str, number: int) -> str:
        if ".tar" in path and number >= 0 and not is_opened:  # the first range: sizes are known
            is_opened.append(True)
            replace(place, shard, sound[:1024])
        return PASS

    try:
        with place.behind(monkeypatch, fault) as (train, _):
            options = (f"data.train={train}", "data.workers=1")
            result = run("train.py", *arguments(config, tmp_path / "run", *options))
            assert result.returncode == 1
            assert re.search(
                rf"{re.escape(train)}{shard.name}: has 1,024 bytes, not {len(sound):,}",
                result.stderr,
            )
            assert "Traceback" not in result.stderr
            result = run("train.py", *arguments(config, tmp_path / "run", *options))
            assert result.returncode == 1
            assert f"{shard.name} (1,024 bytes, not {len(sound):,})" in result.stderr
    finally:
        replace(place, shard, sound)


def replace(place: Place, shard: Path, content: bytes) -> None:
    """Put another object in the place of a shard."""
    if place.kind == "nginx":
        temporary = shard.with_suffix(".new")
        temporary.write_bytes(content)
        os.replace(temporary, shard)
        return
    import boto3

    client = boto3.client("s3", endpoint_url=place.upstream)
    client.put_object(Bucket="shards", Key=f"train/{shard.name}", Body=content)
