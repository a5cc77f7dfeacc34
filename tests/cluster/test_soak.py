r"""The long versions of test_faults.py, for docs/reliability.md:

python -m pytest -m "soak or not soak" tests/test_faults.py tests/cluster/test_soak.py \
    --report docs/reliability.md
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import image_zoo
import pytest
from programs import ROOT, children, finish, is_alive, log_lines, run, start, wait_for, write_images
from same_run import assert_same_batches, assert_same_end, checkpoint_of, differing, steps
from small_run import HARMED, STEPS, Inject, arguments, kill, lose_a_rank, rank_pids

from irv2.run import checkpoint, directory, jsonl, resume

pytestmark = pytest.mark.soak
SEED = 0
DURABLE_S = 30  # torchrun kills ranks that long after it has passed on a signal


# ---------------------------------------------------------------------------------- killed


@pytest.mark.parametrize(("wanted", "ranks", "workers"), [(35, 1, 0), (15, 2, 2)])
def test_killed_at_random_moments(config, tmp_path, inject: Inject, wanted, ranks, workers):
    """`wanted` times; each run is killed again and again until it has come to its end."""
    rng = random.Random(SEED + ranks)
    undisturbed = tmp_path / "undisturbed"
    options = f"data.workers={workers}"
    assert run("train.py", *arguments(config, undisturbed, options), ranks=ranks).returncode == 0
    directory, kills = tmp_path / "run0", 0
    while kills < wanted:
        is_moment = rng.random() < 0.6
        fault = f"kill-in-{rng.choice(['save', 'rename', 'prune'])}={rng.randint(1, 2)}"
        program = ("train.py",) if is_moment else (HARMED, fault)
        process = start(*program, *arguments(config, directory, options), ranks=ranks)
        if is_moment:
            wait_for(process, "run: ")
            time.sleep(rng.uniform(0, 5))
            kill(process)
            hit = process.returncode != 0
        else:
            hit = finish(process).returncode != 0
        for path in checkpoint.list_all(directory / "checkpoints"):
            assert checkpoint.is_whole(path)
        if hit:
            kills += 1
            inject(f"SIGKILL {'at a random moment' if is_moment else 'in save, rename or prune'}")
        else:
            assert_same_end(directory, undisturbed)
            shutil.rmtree(directory)
            directory = directory.with_name(f"run{kills}")
    assert run("train.py", *arguments(config, directory, options), ranks=ranks).returncode == 0
    assert_same_end(directory, undisturbed)


# ---------------------------------------------------------------------------------- moved


def test_one_two_four_and_one_ranks(config, tmp_path, inject: Inject):
    recipe = ("train.global_batch=8", "train.micro_batch=8", "train.epochs=4")
    assert run("train.py", *arguments(config, tmp_path / "one", *recipe)).returncode == 0
    for until, (ranks, workers) in {2: (1, 0), 4: (2, 2), 6: (4, 1), 7: (1, 0)}.items():
        inject("another number of ranks and workers")
        limits = (*recipe, f"data.workers={workers}", f"train.max_steps={until}")
        result = run("train.py", *arguments(config, tmp_path / "many", *limits), ranks=ranks)
        assert result.returncode == 0, result.stderr
    assert_same_batches(tmp_path / "many", tmp_path / "one")


# ---------------------------------------------------------------------------------- damaged


def harms(path: Path, rng: random.Random) -> Iterator[tuple[str, Path, bytes | None]]:
    """(kind, file, what to make of it) for a checkpoint's files in turn."""
    files = sorted(path.iterdir())
    for i in range(400):
        file = files[i % len(files)]
        content = bytearray(file.read_bytes())
        offset = rng.randrange(len(content))
        if i < 200:
            yield "newest checkpoint truncated", file, bytes(content[:offset])
        else:
            content[offset] ^= 1 << rng.randrange(8)
            yield "one bit of the newest checkpoint flipped", file, bytes(content)
    for file in files:
        yield "a file of the newest checkpoint emptied", file, b""
        yield "a file of the newest checkpoint missing", file, None


def test_damage_to_the_newest_checkpoint_is_always_detected(undisturbed, tmp_path, inject: Inject):
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = directory.checkpoints(tmp_path / "run")[-1]
    for kind, file, harmed in harms(newest, random.Random(SEED)):
        inject(kind)
        content = file.read_bytes()
        if harmed is None:
            file.unlink()
        else:
            file.write_bytes(harmed)
        said: list[str] = []
        assert resume.load_newest(tmp_path / "run", said.append).meta["step"] == STEPS - 2, file
        assert said[0].startswith(f"passed over: {newest}: "), said
        file.write_bytes(content)
    assert resume.load_newest(tmp_path / "run", print).meta["step"] == STEPS


def test_a_newest_checkpoint_of_another_network_is_passed_over(
    config, undisturbed, tmp_path, inject: Inject
):
    inject("newest checkpoint of another architecture")
    other = arguments(config, tmp_path / "other", "model.blocks=[1, 2, 1]")
    assert run("train.py", *other).returncode == 0
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = directory.checkpoints(tmp_path / "run")[-1]
    shutil.rmtree(newest)
    shutil.copytree(directory.checkpoints(tmp_path / "other")[-1], newest)
    result = run("train.py", *arguments(config, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "passed over: " in result.stdout and "continuing after step 4" in result.stdout
    assert_same_end(tmp_path / "run", undisturbed)


# ---------------------------------------------------------------------------------- full disk


def test_a_file_system_that_is_full(config, undisturbed, tmp_path, inject: Inject):
    """2 checkpoints of 16 MB and best.safetensors fit, the third checkpoint does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=42m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        inject("file system full")
        result = run("train.py", *arguments(config, disk / "run"))
        assert result.returncode == 1
        assert "NOT SAVED, training goes on" in result.stdout
        assert "No space left on device" in result.stdout
        assert "Traceback" not in result.stderr
        assert steps(disk / "run") == [2, 4]
        subprocess.run(["mount", "-o", "remount,size=2g", str(disk)], check=True)
        result = run("train.py", *arguments(config, disk / "run"))
        assert result.returncode == 0, result.stderr
        assert_same_end(disk / "run", undisturbed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---------------------------------------------------------------------------------- stopped


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepared = run("scripts/prepare_dataset.py", "digits", "--out", folder / "digits")
    assert prepared.returncode == 0, prepared.stderr
    return folder / "digits"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("moment", ["step 4/", "evaluation begins", "save begins"])
def test_the_quickstart_is_durable_in_time(digits, tmp_path, inject: Inject, number, moment):
    inject(f"{number.name} to the quickstart at '{moment}', durable within {DURABLE_S} s")
    overrides = [
        f"data.train={digits / 'train'}",
        f"data.val={digits / 'val'}",
        f"run.dir={tmp_path / 'run'}",
        "eval.every_epochs=0.13",  # 6 steps
        "log.every_steps=1",
        "checkpoint.every_steps=5",
    ]
    harm = "slow-evaluation=0.1" if moment.startswith("eval") else "slow-save=0.1"
    quickstart = ROOT / "configs" / "quickstart.yaml"
    process = start(HARMED, harm, "--config", quickstart, *overrides)
    wait_for(process, moment)
    process.send_signal(number)
    asked = time.monotonic()
    stopped = finish(process)
    assert time.monotonic() - asked < DURABLE_S
    assert stopped.returncode == (130 if number == signal.SIGINT else 75), stopped.stderr
    last = log_lines(tmp_path / "run", "train")[-1]["step"]
    assert resume.load_newest(tmp_path / "run", print).meta["step"] == last


def test_torchrun_passes_on_the_warning_of_slurm(config, undisturbed, tmp_path, inject: Inject):
    inject("SIGUSR1 to torchrun")
    place = arguments(config, tmp_path / "run")
    torchrun = ("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--max-restarts=3")
    process = start("train.py", *place, torchrun=torchrun)
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGUSR1)
    stopped = finish(process)
    assert "stopped after step" in stopped.stdout and stopped.returncode != 0
    assert run("train.py", *place).returncode == 0
    assert_same_end(tmp_path / "run", undisturbed)


# ---------------------------------------------------------------------------------- not finite


def weights_of(parts: checkpoint.Parts) -> checkpoint.Parts:
    """Without the optimizer, which has no state before its first update."""
    return {part: parts[part] for part in ("model", "ema")}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("bad", ["1-2", "3", "5"])
def test_a_bad_number_on_one_rank(config, tmp_path, inject: Inject, rank, bad):
    inject("NaN on one rank")
    place = arguments(config, tmp_path / "run", "checkpoint.every_steps=1", "checkpoint.keep=9")
    result = run(HARMED, f"nan={rank}:{bad}", *place, ranks=2)
    assert result.returncode == 0, result.stderr
    first, _, last = bad.partition("-")
    expected = list(range(int(first), int(last or first) + 1))
    assert [line["step"] for line in log_lines(tmp_path / "run", "bad_step")] == expected
    states = {step: checkpoint_of(tmp_path / "run", step).parts for step in steps(tmp_path / "run")}
    for step in range(2, STEPS + 1):
        is_same = not differing(*(weights_of(states[n]) for n in (step, step - 1)))
        assert is_same == (step in expected), step


# ---------------------------------------------------------------------------------- bad images


@pytest.mark.parametrize("percent", [1, 50])
def test_the_zoo_among_the_training_images(config, tmp_path, inject: Inject, percent):
    """One epoch of 200 images, of which so many are specimens that no decoder takes."""
    write_images(tmp_path / "train", ["a", "b"], 100)
    bad = [s for s in image_zoo.zoo().values() if s.expected == "replaced"]
    good = {n: s for n, s in image_zoo.zoo().items() if s.expected == "decodes"}
    for name, specimen in good.items():
        (tmp_path / "train" / "a" / name).write_bytes(specimen.encoded)
    spoiled = []
    for name in ("a", "b"):
        for i, path in enumerate(sorted((tmp_path / "train" / name).glob("*.png"))[:percent]):
            if path.name not in good:
                inject(f"zoo among the training images, {percent} %")
                path.write_bytes(bad[i % len(bad)].encoded)
                spoiled.append(str(path))
    recipe = (
        "train.epochs=1",
        "train.global_batch=20",
        "train.micro_batch=20",
        "log.every_steps=9",
    )
    fraction = f"data.max_bad_fraction={0.02 if percent == 1 else 0.001}"
    place = arguments(
        config, tmp_path / "run", f"data.train={tmp_path / 'train'}", fraction, *recipe
    )
    result = run("train.py", *place)
    listed = {line["name"] for line in jsonl.read(tmp_path / "run" / "bad_images.jsonl")}
    assert listed <= set(spoiled)
    if percent == 1:
        assert result.returncode == 0, result.stderr
        assert listed == set(spoiled)
    else:
        assert result.returncode == 1 and "could not be used" in result.stderr


@pytest.mark.parametrize(
    "name", sorted(n for n, s in image_zoo.zoo().items() if s.expected == "replaced")
)
def test_evaluation_refuses_what_it_cannot_decode(config, undisturbed, tmp_path, inject, name):
    inject("undecodable validation image")
    shutil.copytree(config.parent / "val", tmp_path / "val")
    specimen = image_zoo.zoo()[name]
    (tmp_path / "val" / "b" / name).write_bytes(specimen.encoded)
    out = tmp_path / "result.json"
    result = run("validate.py", "--run", undisturbed, "--data", tmp_path / "val", "--json", out)
    assert result.returncode == 1
    assert f"{tmp_path / 'val' / 'b' / name}: cannot be decoded" in result.stderr
    assert "Traceback" not in result.stderr and not out.exists()


# ---------------------------------------------------------------------------------- dead or hung


def test_torchrun_brings_a_run_back_whose_rank_hangs(config, tmp_path, inject: Inject):
    lose_a_rank(config, tmp_path, inject, signal.SIGSTOP)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_loader_worker_that_dies_or_hangs_ends_the_run(config, tmp_path, inject, number):
    inject(f"{number.name} of a loader worker")
    place = arguments(config, tmp_path / "run", "data.workers=2", "run.timeout_s=10")
    process = start("train.py", *place)
    wait_for(process, "step 1/")
    workers = children(process.pid)
    for worker in workers:
        os.kill(worker, number)
    result = finish(process)
    assert result.returncode == 1
    assert "train.py: DataLoader" in result.stderr and "Traceback" not in result.stderr
    assert not any(map(is_alive, workers))
    assert run("train.py", *place).returncode == 0


def test_no_process_outlives_a_killed_run(config, tmp_path, inject: Inject):
    inject("SIGKILL of train.py alone")
    place = arguments(config, tmp_path / "run", "data.workers=2")
    process = start("train.py", *place)
    wait_for(process, "step 1/")
    workers = children(process.pid)
    process.kill()
    process.communicate()
    time.sleep(1)
    assert not any(map(is_alive, workers))


def test_a_rank_killed_without_restarts_ends_all(config, tmp_path, inject: Inject):
    inject("SIGKILL of a rank, no restarts")
    process = start("train.py", *arguments(config, tmp_path / "run"), ranks=2)
    wait_for(process, "step 2/")
    ranks = rank_pids(process)
    os.kill(ranks[1], signal.SIGKILL)
    assert finish(process).returncode != 0
    assert not any(map(is_alive, ranks))
