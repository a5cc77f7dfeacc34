"""A run under faults, in processes of its own: it ends as if nothing had happened.

The long versions of these tests are in cluster/test_soak.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from calling import call
from programs import children, finish, log_lines, run, start, wait_for
from same_run import assert_same_batches, assert_same_end, checkpoint_of, differing, ledger, steps
from small_run import HARMED, STEPS, Inject, arguments, kill, lose_a_rank, rank_pids

import train
from irv2.run import checkpoint, jsonl

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------- killed


def test_a_run_killed_in_its_saves_ends_as_if_it_had_not_been(
    config, undisturbed, tmp_path, inject: Inject
):
    """In a file of the first checkpoint, before the second has its name, while the third removes
    the first."""
    left = {"kill-in-save=2": [], "kill-in-rename=2": [2], "kill-in-prune=1": [4, 6]}
    for fault, expected in left.items():
        inject(f"SIGKILL in {fault.removeprefix('kill-in-').partition('=')[0]}")
        result = run(HARMED, fault, *arguments(config, tmp_path / "run"))
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert steps(tmp_path / "run") == expected
        assert all(map(checkpoint.is_whole, checkpoint.list_all(tmp_path / "run" / "checkpoints")))
    result = run("train.py", *arguments(config, tmp_path / "run"), as_user=True)
    assert result.returncode == 0, result.stderr
    assert f"continuing after step {STEPS} " in result.stdout
    assert_same_end(tmp_path / "run", undisturbed)


# ---------------------------------------------------------------------------------- damaged


def test_a_damaged_newest_checkpoint_costs_its_steps_only(
    config, undisturbed, tmp_path, inject: Inject
):
    inject("newest checkpoint damaged")
    shutil.copytree(undisturbed, tmp_path / "run")
    part = tmp_path / "run" / "checkpoints" / "step-000000006" / "optimizer.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    result = run("train.py", *arguments(config, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "passed over: " in result.stdout and "does not match its SHA-256" in result.stdout
    assert "continuing after step 4" in result.stdout
    assert_same_end(tmp_path / "run", undisturbed)
    assert (tmp_path / "run" / "checkpoints" / "step-000000006.unusable").is_dir()


def test_only_damaged_checkpoints_are_an_error(config, undisturbed, tmp_path, inject: Inject):
    inject("all checkpoints damaged")
    shutil.copytree(undisturbed, tmp_path / "run")
    for path in checkpoint.list_all(tmp_path / "run" / "checkpoints"):
        (path / "meta.json").unlink()
    status, _, error = call(train, *arguments(config, tmp_path / "run"))
    assert status == 1
    assert "none of its 2 checkpoints can be read" in error
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


# ---------------------------------------------------------------------------------- full disk


def test_a_full_disk_stops_no_training_and_the_next_save_tries_again(
    config, undisturbed, tmp_path, inject: Inject
):
    inject("no space for a checkpoint, later space again")
    result = run(HARMED, "full-disk=2", *arguments(config, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("NOT SAVED, training goes on: ") == 1
    assert "No space left on device" in result.stdout
    assert "log.jsonl: cannot be written" in result.stdout
    assert_same_end(tmp_path / "run", undisturbed)
    assert steps(tmp_path / "run") == [2, 6]


def test_a_disk_that_stays_full_is_an_error_and_costs_no_older_checkpoint(
    config, undisturbed, tmp_path, inject: Inject
):
    inject("no space for a checkpoint to the end")
    result = run(HARMED, "full-disk=2-99", *arguments(config, tmp_path / "run"))
    assert result.returncode == 1
    assert "step 6 could not be saved" in result.stderr
    assert "Traceback" not in result.stderr
    assert steps(tmp_path / "run") == [2]
    result = run("train.py", *arguments(config, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "run", undisturbed)


# ---------------------------------------------------------------------------------- stopped


def test_a_stopped_run_loses_no_finished_step(config, undisturbed, tmp_path, inject: Inject):
    """Ctrl-C between two saves, SIGTERM in a save, SIGUSR1 in an evaluation, each continued."""
    for fault, moment, number, status, workers in (
        ("slow-save=0", "step 3/", signal.SIGINT, 130, 2),
        ("slow-save=2", "save begins", signal.SIGTERM, 75, 0),
        ("slow-evaluation=1", "evaluation begins", signal.SIGUSR1, 75, 2),
    ):
        inject(f"{number.name} at '{moment}'")
        place = arguments(config, tmp_path / "run", f"data.workers={workers}")
        process = start(HARMED, fault, *place)
        wait_for(process, moment)
        process.send_signal(number)
        stopped = finish(process)
        assert stopped.returncode == status, stopped.stderr
        last = log_lines(tmp_path / "run", "train")[-1]["step"]
        assert f"stopped after step {last}; the same command continues" in stopped.stdout
        assert steps(tmp_path / "run")[-1] == last
    result = run("train.py", *arguments(config, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_second_signal_leaves_at_once(config, tmp_path, inject: Inject):
    inject("second SIGTERM")
    process = start(HARMED, "slow-save=30", *arguments(config, tmp_path / "run"))
    wait_for(process, "save begins")
    process.send_signal(signal.SIGTERM)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    process.communicate()


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(config, tmp_path, inject: Inject):
    inject("SIGTERM on one rank")
    process = start("train.py", *arguments(config, tmp_path / "run"), ranks=2, torchrun=())
    wait_for(process, "step 1/")
    os.kill(rank_pids(process)[1], signal.SIGTERM)
    stopped = finish(process)
    assert stopped.returncode != 0
    assert "stopped after step" in stopped.stdout
    assert steps(tmp_path / "run")[-1] == log_lines(tmp_path / "run", "train")[-1]["step"]
    assert "exitcode: 75" in stopped.stderr.replace(" ", "").replace("exitcode:", "exitcode: ")


# ---------------------------------------------------------------------------------- not finite


def test_a_bad_number_on_one_rank_makes_all_ranks_leave_the_step_out(
    config, tmp_path, inject: Inject
):
    inject("NaN on one rank")
    limits = ("train.max_steps=4", "checkpoint.every_steps=1")
    place = arguments(config, tmp_path / "run", *limits)
    result = run(HARMED, "nan=1:3-4", *place, ranks=2)
    assert result.returncode == 0, result.stderr
    three, four = (checkpoint_of(tmp_path / "run", step) for step in (3, 4))
    assert differing(three.parts, four.parts) == []
    assert (four.meta["bad_steps"], four.meta["bad_steps_in_a_row"]) == (2, 2)
    noted = log_lines(tmp_path / "run", "bad_step")
    batches = ledger(tmp_path / "run")
    assert [line["step"] for line in noted] == [3, 4]
    assert noted[0]["images"] == [index for index, _ in batches[3]]
    assert all(torch.isfinite(tensor).all() for tensor in four.parts["model"].values())
    assert not all((m == 0).all() for n, m in four.parts["optimizer"].items() if "momentum" in n)


def test_too_many_bad_steps_end_the_run_and_it_goes_on_with_a_lower_rate(
    config, tmp_path, inject: Inject
):
    inject("NaN for ever")
    limit = arguments(config, tmp_path / "run", "train.max_bad_steps=1")
    result = run(HARMED, "nan=0:3-99", *limit)
    assert result.returncode == 1
    assert "step 4: the loss or the gradient was not finite 2 times in a row" in result.stderr
    assert "Traceback" not in result.stderr
    assert steps(tmp_path / "run") == [2]
    advice = ["--resume", str(tmp_path / "run"), "optim.lr=0.0225"]
    assert " ".join(advice[:2]) in result.stderr and advice[2] in result.stderr
    result = run("train.py", *arguments(config, tmp_path / "lower"), *advice)
    assert result.returncode == 0, result.stderr
    assert "optim.lr: 0.045 -> 0.0225" in result.stdout
    assert log_lines(tmp_path / "lower", "train")[0]["lr"] == 0.0225


# ---------------------------------------------------------------------------------- bad images


def spoil(folder: Path, count: int) -> list[str]:
    """Make unusable the first `count` images of each class; returns their paths."""
    paths = sorted(path for name in "ab" for path in sorted((folder / name).iterdir())[:count])
    for path in paths:
        path.write_bytes(b"no image")
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def spoiled(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of training images, and the paths of those that are none."""
    folder = tmp_path_factory.mktemp("spoiled") / "train"
    shutil.copytree(config.parent / "train", folder)
    return folder, spoil(folder, 2)


@pytest.fixture(scope="module")
def moved(config: Path, spoiled: tuple[Path, list[str]]) -> tuple[Path, Path]:
    """Two runs over the spoiled images: one in one go, one that changes its ranks and workers."""
    data, place = f"data.train={spoiled[0]}", spoiled[0].parent
    one, two = (arguments(config, place / name, data) for name in ("one", "two"))
    for command, ranks in (
        ([*one, "data.workers=1"], 1),
        ([*two, "data.workers=0", "train.max_steps=2"], 1),
        ([*two, "data.workers=2", "train.max_steps=4"], 2),
        ([*two, "data.workers=1"], 1),
    ):
        result = run("train.py", *command, ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert "passed over" not in result.stdout  # else steps would only be taken again
    return place / "one", place / "two"


def test_ranks_and_workers_may_change_in_the_middle_of_an_epoch(moved, inject: Inject):
    inject("another number of ranks and workers")
    one, two = moved
    assert_same_batches(two, one)
    assert [line["step"] for line in log_lines(two, "train")] == list(range(1, STEPS + 1))


def test_unusable_training_images_are_replaced_listed_and_counted(
    moved, spoiled, undisturbed, inject: Inject
):
    """Stopped and continued with other ranks and workers, the list is that of one run."""
    for _ in spoiled[1]:
        inject("unusable training image")
    one, two = moved
    listed = [jsonl.read(run / "bad_images.jsonl") for run in moved]
    assert listed[0] == listed[1]
    first_epoch = [line for line in listed[0] if line["epoch"] == 0]
    assert sorted(line["name"] for line in first_epoch) == spoiled[1]
    assert all("not a known kind of image" in line["reason"] for line in listed[0])
    sound = ledger(undisturbed)
    for step, batch in ledger(one).items():
        here = {line["index"] for line in listed[0] if line["step"] == step}
        assert here <= {index for index, _ in batch}
        assert [pair for pair in batch if pair[0] not in here] == [
            pair for pair in sound[step] if pair[0] not in here
        ]
    assert checkpoint_of(two, STEPS).meta["bad_images"] == len(listed[0])


def test_too_many_unusable_images_end_the_run(config, tmp_path, inject: Inject):
    shutil.copytree(config.parent / "train", tmp_path / "train")
    for _ in spoil(tmp_path / "train", 4):
        inject("half of the training images unusable")
    limits = (f"data.train={tmp_path / 'train'}", "data.max_bad_fraction=0.1")
    result = run("train.py", *arguments(config, tmp_path / "run", *limits))
    assert result.returncode == 1
    listed = jsonl.read(tmp_path / "run" / "bad_images.jsonl")
    assert 2 <= len(listed) <= 5  # more than 0.1 of 14; the step that passed it is the last
    said = f"{len(listed)} of {4 * listed[-1]['step']} images seen could not be used"
    assert said in result.stderr and "bad_images.jsonl: mend or remove them" in result.stderr


# ---------------------------------------------------------------------------------- dead or hung


def test_a_killed_loader_worker_is_told_in_one_line(config, tmp_path, inject: Inject):
    inject("loader worker killed")
    process = start("train.py", *arguments(config, tmp_path / "run", "data.workers=2"))
    wait_for(process, "step 1/")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    result = finish(process)
    assert result.returncode == 1
    assert "train.py: DataLoader worker" in result.stderr and "Traceback" not in result.stderr


def test_torchrun_brings_a_run_back_whose_rank_died(config, tmp_path, inject: Inject):
    lose_a_rank(config, tmp_path, inject, signal.SIGKILL)


# ---------------------------------------------------------------------------------- apart


def test_ranks_that_do_not_share_the_run_directory_do_not_start(config, tmp_path, inject: Inject):
    inject("run directory not shared")
    result = run(HARMED, "apart=-of-rank-", *arguments(config, tmp_path / "run"), ranks=2)
    assert result.returncode == 1
    assert "rank 1 (host " in result.stderr
    assert "put it on a file system that all hosts share" in result.stderr
    assert not list(tmp_path.glob("run*/log.jsonl")) and not list(tmp_path.glob("run*/.mark*"))


# ---------------------------------------------------------------------------------- twice


def test_a_second_run_in_one_directory_is_refused_but_not_after_the_first_is_dead(
    config, undisturbed, tmp_path, inject: Inject
):
    inject("two runs in one directory")
    place = arguments(config, tmp_path / "run", "data.workers=2")
    process = start(HARMED, "slow-save=60", *place)  # it cannot end meanwhile
    wait_for(process, "save begins")
    second = run("train.py", *place)
    assert second.returncode == 1
    assert "another train.py is at work in it" in second.stderr
    inject("lock of a dead run")
    kill(process)
    result = run("train.py", *place)
    assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "run", undisturbed)
