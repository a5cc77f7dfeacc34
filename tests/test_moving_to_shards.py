"""A run moves from class folders to shards: the same images, pixels and weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from calling import call
from programs import run
from same_run import assert_same_batches, checkpoint_of, differing, ledger
from small_run import IMAGES, STEPS, arguments

import train
import validate
from data import loader
from irv2 import input_pipeline
from irv2.config_file import load
from irv2.training.distributed import World
from scripts import make_shards
from scripts.benchmarks.range_server import serving

pytestmark = pytest.mark.slow


def test_a_run_may_move_to_shards_in_the_middle_of_an_epoch(config, undisturbed, shards, tmp_path):
    """And on to an object store, where that can be tested."""
    place = arguments(config, tmp_path / "run")
    moves = [["train.max_steps=2"], ["train.max_steps=4", f"data.train={shards}"]]
    with serving(shards) as url:
        away = (f"data.train={url}", f"data.cache_dir={tmp_path / 'cache'}", "data.workers=2")
        here = (f"data.train={shards}",)
        for more in (*moves, away if find_spec("aiohttp") else here):
            result = run("train.py", *place, *more)
            assert result.returncode == 0, result.stderr
    assert_same_batches(tmp_path / "run", undisturbed)
    ours, theirs = (checkpoint_of(d, STEPS).parts for d in (tmp_path / "run", undisturbed))
    assert differing(ours, theirs) == []
    if not find_spec("aiohttp"):
        pytest.skip("remote shards are NOT tested: requirements-remote.txt")


def test_a_window_shows_every_image_once_an_epoch_in_another_order(
    config, undisturbed, shards, tmp_path
):
    window = (f"data.train={shards}", "data.shuffle_window=4")
    result = run("train.py", *arguments(config, tmp_path / "run", *window))
    assert result.returncode == 0, result.stderr
    batches = ledger(tmp_path / "run")
    indices = [index for step in sorted(batches) for index, _ in batches[step]]
    assert sorted(indices[:IMAGES]) == list(range(IMAGES))
    assert batches != ledger(undisturbed)


def test_a_window_over_folders_is_refused(config, tmp_path):
    status, _, error = call(train, *arguments(config, tmp_path / "run", "data.shuffle_window=4"))
    assert status == 1
    assert "data.shuffle_window=4 is for shards" in error
    assert "scripts/make_shards.py" in error
    assert not (tmp_path / "run").exists()


def second_batch(config: Path, rank: int, ranks: int, recipe: tuple[str, ...]) -> loader.Batch:
    """Return a rank's part of the second batch, as the network gets it."""
    cfg = load(config, ["train.micro_batch=4", *recipe])
    world = World(rank, ranks, torch.device("cpu"))
    source, _ = input_pipeline.open_sources(cfg)
    order = input_pipeline.training_order(cfg, source)
    batches = input_pipeline.training_batches(cfg, source, order, 4, 4 // ranks, world)
    batch = next(batches)
    batches.close()
    return batch


def test_mixing_and_augmenting_give_the_same_images_on_two_ranks(config):
    """Stronger recipes, too, follow from (seed, epoch, index)."""
    strong = ("data.mixup=0.2", "data.cutmix=1", "data.rand_augment=9", "data.random_erasing=0.3")
    whole, plain = (second_batch(config, 0, 1, recipe) for recipe in (strong, ()))
    halves = [second_batch(config, rank, 2, strong) for rank in range(2)]
    assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
    assert torch.equal(whole.labels, torch.cat([half.labels for half in halves]))
    assert whole.keys == [key for half in halves for key in half.keys]
    assert not any(map(torch.equal, whole.images, plain.images))


def test_pairs_need_micro_batches_of_an_even_size(config, tmp_path):
    odd = ("data.mixup=0.2", "train.micro_batch=1")
    status, _, error = call(train, *arguments(config, tmp_path / "run", *odd))
    assert status == 1
    assert "micro-batches of 1 images cannot be paired" in error


def test_shards_of_scaled_images_are_refused_for_evaluation_unless_allowed(config, tmp_path):
    out = tmp_path / "val"
    assert call(make_shards, config.parent / "val", "--out", out, "--shorter-side", 30).status == 0
    place = arguments(config, tmp_path / "run", f"data.val={out}", "train.max_steps=1")
    refused = call(train, *place)
    assert refused.status == 1
    assert "data.allow_resized=true" in refused.err
    result = run("train.py", *place, "data.allow_resized=true")
    assert result.returncode == 0, result.stderr
    assert call(validate, "--run", tmp_path / "run").status == 0  # the run has allowed it
    best = ("--weights", tmp_path / "run" / "best.safetensors", "--data", out)
    refused = call(validate, *best)
    assert refused.status == 1
    assert "allow these: --allow-resized" in refused.err
    allowed = call(validate, *best, "--allow-resized")
    assert allowed.status == 0, allowed.err
    assert f"{out}, scaled down to a shorter side of 30 px" in allowed.out
