"""Several hosts, of network namespaces on this machine, started as docs/reliability.md tells:

python -m pytest -m cluster tests/cluster/test_hosts.py --report docs/reliability.md
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import Host, finished, hosts, wait_for
from programs import run
from same_run import assert_same_batches, assert_same_end
from small_run import HARMED, STEPS, arguments

from irv2.report.markdown import replace_section

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("network_namespaces")]
Note = Callable[[str, str], None]
# Ends after step 6, as STEPS says.
OF_SIX = ("train.global_batch=6", "train.micro_batch=6", "train.epochs=2.5")
OF_EIGHT = ("train.global_batch=8", "train.micro_batch=8", "train.epochs=3.2")


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines of the report's table, of tests that have passed."""
    rows: list[str] = []
    yield rows
    if (page := request.config.getoption("--report")) is not None and rows:
        replace_section(page, "hosts", "\n".join(["| what | shown |", "|---|---|", *rows]))


@pytest.fixture
def note(findings: list[str]) -> Note:
    return lambda what, shown: findings.append(f"| {what} | {shown} |")


def run_on(count: int, tmp_path: Path, *command: object, ranks: int = 1) -> None:
    """Run a program on all of `count` hosts to its end, with so many ranks on each."""
    with hosts(count) as made:
        logs = [tmp_path / f"host{host.number}.log" for host in made]
        options = (f"--nproc-per-node={ranks}",)
        started = [
            host.start(log, *command, nnodes=str(count), torchrun=options)
            for host, log in zip(made, logs)
        ]
        for process, log in zip(started, logs):
            assert finished(process, log) == 0, log.read_text()


# ---------------------------------------------------------------------------------- the same


@pytest.mark.parametrize(("count", "ranks", "recipe"), [(3, 1, OF_SIX), (2, 2, OF_EIGHT)])
def test_hosts_train_as_one_host_with_as_many_ranks(
    config, tmp_path, note: Note, count, ranks, recipe
):
    alone, together = (arguments(config, tmp_path / name, *recipe) for name in ("one", "many"))
    result = run("train.py", *alone, ranks=count * ranks)
    assert result.returncode == 0, result.stderr
    run_on(count, tmp_path, "train.py", *together, ranks=ranks)
    assert_same_end(tmp_path / "many", tmp_path / "one")
    assert_same_batches(tmp_path / "many", tmp_path / "one")
    note(
        f"{count} hosts of {ranks} rank{'s' * (ranks > 1)}, {STEPS} steps",
        f"bit-identical to one host of {count * ranks} ranks",
    )


# ---------------------------------------------------------------------------------- vanished


def test_a_host_that_vanishes_is_done_without_and_taken_in_again(config, tmp_path, note: Note):
    """One of three; the first, which keeps the rendezvous, stays. Saves are slowed down, so that
    the run is not over before the third is back."""
    recipe = ("train.global_batch=6", "train.micro_batch=6", "train.epochs=12")
    assert run("train.py", *arguments(config, tmp_path / "one", *recipe)).returncode == 0
    place = arguments(config, tmp_path / "many", *recipe, "run.timeout_s=30")
    logs = [tmp_path / f"host{number}.log" for number in (1, 2, 3)]

    def start(host: Host) -> subprocess.Popen[bytes]:
        command = (HARMED, "slow-save=5", *place)
        log = logs[host.number - 1]
        return host.start(log, *command, nnodes="1:3", torchrun=("--max-restarts=9",))

    with hosts(3) as made:
        started = [start(host) for host in made]
        wait_for(logs[0], "step 3/", started[0])
        made[2].vanish()
        gone = time.monotonic()
        wait_for(logs[0], "continuing after step", started[0])
        went_on_s = time.monotonic() - gone
        made[2].plug("up")
        started[2] = start(made[2])
        back = time.monotonic()
        wait_for(logs[0], "on 3 ranks", started[0], times=2)
        taken_in_s = time.monotonic() - back
        for process, log in zip(started, logs):
            assert finished(process, log) == 0, log.read_text()
    said = logs[0].read_text()
    assert re.findall(r"on (\d) ranks", said) == ["3", "2", "3"], said
    assert f"in {tmp_path / 'many'}" in said.rpartition("finished: step 28 of 28")[2]
    assert_same_batches(tmp_path / "many", tmp_path / "one")
    lost = re.search(r"continuing after step (\d+)", said)[1]
    note(
        "one of three hosts killed, its link down, after step 3",
        f"two went on from step {lost}, {went_on_s:.0f} s later (run.timeout_s=30)",
    )
    note(
        "it came back",
        f"three trained again {taken_in_s:.0f} s after its start; over all 28 steps every image "
        "once an epoch, global batches those of one rank",
    )


# ---------------------------------------------------------------------------------- not shared


def test_a_host_with_a_run_directory_of_its_own_is_told(config, tmp_path, note: Note):
    """On the second host an empty file system is mounted where the runs are."""
    runs = tmp_path / "runs"
    runs.mkdir()
    mounted = ("sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', runs)
    logs = [tmp_path / f"host{number}.log" for number in (1, 2)]
    with hosts(2) as made:
        started = [
            host.start(log, "train.py", *arguments(config, runs / "run"), nnodes="2", before=before)
            for host, log, before in zip(made, logs, ((), mounted))
        ]
        assert [finished(process, log) for process, log in zip(started, logs)] == [1, 1]
    for log in logs:
        assert "rank 1 (host host2) sees another directory there than rank 0" in log.read_text()
    note("the run directory of one of two hosts is another", "both end with status 1 and say so")
