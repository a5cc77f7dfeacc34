"""Ranks find each other on a store that has seen others before, and one run directory."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from irv2 import distributed

LIMIT = timedelta(seconds=20)


def empty_store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(LIMIT)
    return store


def prefixes(store: dist.Store, size: int, before: str = "") -> list[str]:
    """What the ranks of one start agree on, a thread each.

    The ranks other than 0 come once the key `before` is there, if one is given.
    """
    found: dict[int, str] = {}

    def rank_main(rank: int) -> None:
        if rank and before:
            store.wait([before], LIMIT)
        found[rank] = distributed._fresh_prefix(store, rank, size, LIMIT)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


def test_every_start_has_a_prefix_of_its_own_which_its_ranks_share():
    store = empty_store()
    starts = [prefixes(store, size) for size in (3, 3, 2, 4)]
    assert [len(set(start)) for start in starts] == [1, 1, 1, 1]
    assert len({start[0] for start in starts}) == 4


def test_ranks_that_died_while_they_were_joining_mislead_nobody():
    store = empty_store()
    store.set("call/1", "dead")  # unanswered, as rank 0 died first
    store.set("call/2", "answered")
    store.set("answer/answered", "start-of-the-dead")
    start = set(prefixes(store, 3, before="answer/dead"))  # rank 0 answers the dead first
    assert start == {store.get("answer/dead").decode()}
    assert start != {"start-of-the-dead"}


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(dist.DistError, match=r"ranks \[1\] have not come within 0.1 s"):
        distributed._fresh_prefix(empty_store(), 0, 2, timedelta(seconds=0.1))


# ------------------------------------------------------------------------- two processes


def rank_main(rank: int, port: int, folder: str) -> None:
    """A rank on a host of its own, which has had another number of restarts."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(rank)}
    distributed.APPEARS_WITHIN_S = 0.5
    said = []
    with distributed.start("cpu", timeout_s=LIMIT.total_seconds()) as world:
        for name in ("shared", f"own-{rank}"):
            directory = Path(folder) / name
            directory.mkdir(exist_ok=True)
            try:
                distributed.check_shared(directory, world)
                said.append("")
            except distributed.WorldError as error:
                said.append(str(error))
    Path(folder, f"said-{rank}").write_text("\n".join(said))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left, whose store is the agent's and stays, as torchrun's does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (store.port, str(folder)), nprocs=2)
    return folder


def test_hosts_that_count_their_restarts_apart_find_each_other(folder):
    assert {path.name for path in folder.glob("said-*")} == {"said-0", "said-1"}


def test_different_run_directories_are_noticed_on_every_rank(folder):
    for rank in range(2):
        shared, own = (folder / f"said-{rank}").read_text().split("\n")
        assert shared == ""
        assert own.startswith(f"{folder / f'own-{rank}'}: rank 1 (host ")
        assert "sees another directory there than rank 0, or none" in own
    assert not list(folder.glob("*/.mark*"))
