"""A run moves from class folders to shards: the same images, pixels and weights."""

from __future__ import annotations

import pytest
from programs import log_lines, run
from small_run import (
    IMAGES,
    STEPS,
    arguments,
    assert_same_batches,
    checkpoint_of,
    differing,
    ledger,
)

from scripts.benchmarks.range_server import serving


def test_a_run_may_move_to_shards_in_the_middle_of_an_epoch(config, undisturbed, shards, tmp_path):
    for moves in (["train.max_steps=2"], [f"train.max_steps={STEPS}", f"data.train={shards}"]):
        result = run("train.py", *arguments(config, tmp_path / "run", *moves))
        assert result.returncode == 0, result.stderr
    assert_same_batches(tmp_path / "run", undisturbed)
    ours, theirs = (checkpoint_of(d, STEPS).parts for d in (tmp_path / "run", undisturbed))
    assert differing(ours, theirs) == []


def test_a_run_may_move_on_to_an_object_store(config, undisturbed, shards, tmp_path):
    pytest.importorskip("aiohttp", reason="remote shards are NOT tested: requirements-remote.txt")
    with serving(shards) as url:
        away = (f"data.train={url}", f"data.cache_dir={tmp_path / 'cache'}", "data.workers=2")
        for moves in (["train.max_steps=2"], [f"train.max_steps={STEPS}", *away]):
            result = run("train.py", *arguments(config, tmp_path / "run", *moves))
            assert result.returncode == 0, result.stderr
    assert_same_batches(tmp_path / "run", undisturbed)
    ours, theirs = (checkpoint_of(d, STEPS).parts for d in (tmp_path / "run", undisturbed))
    assert differing(ours, theirs) == []


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
    result = run("train.py", *arguments(config, tmp_path / "run", "data.shuffle_window=4"))
    assert result.returncode == 1
    assert "data.shuffle_window=4 is for shards" in result.stderr
    assert "scripts/make_shards.py" in result.stderr
    assert not (tmp_path / "run").exists()


def test_mixing_and_augmenting_give_the_same_images_on_two_ranks(config, tmp_path):
    """Stronger recipes, too, follow from (seed, epoch, index). Losses tell of what the network saw:
    with frozen statistics and no dropout they are those of the images alone."""
    plain = ("train.max_steps=1", "model.drop_rate=0", "model.freeze_bn=true")
    strong = ("data.mixup=0.2", "data.cutmix=1", "data.rand_augment=9", "data.random_erasing=0.3")
    losses = []
    for number, (ranks, recipe) in enumerate([(1, strong), (2, strong), (1, ())]):
        directory = tmp_path / str(number)
        result = run("train.py", *arguments(config, directory, *plain, *recipe), ranks=ranks)
        assert result.returncode == 0, result.stderr
        losses.append(log_lines(directory, "train")[0]["loss"])
    assert ledger(tmp_path / "0") == ledger(tmp_path / "1")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_pairs_need_micro_batches_of_an_even_size(config, tmp_path):
    odd = ("data.mixup=0.2", "train.micro_batch=1")
    result = run("train.py", *arguments(config, tmp_path / "run", *odd))
    assert result.returncode == 1
    assert "micro-batches of 1 images cannot be paired" in result.stderr


def test_shards_of_scaled_images_are_refused_for_evaluation_unless_allowed(config, tmp_path):
    out = tmp_path / "val"
    scaled = ("--shorter-side", 30)
    result = run("scripts/make_shards.py", config.parent / "val", "--out", out, *scaled)
    assert result.returncode == 0, result.stderr
    place = arguments(config, tmp_path / "run", f"data.val={out}", "train.max_steps=1")
    result = run("train.py", *place)
    assert result.returncode == 1
    assert "data.allow_resized=true" in result.stderr
    result = run("train.py", *place, "data.allow_resized=true")
    assert result.returncode == 0, result.stderr
    assert run("validate.py", "--run", tmp_path / "run").returncode == 0  # the run has allowed it
    best = ("--weights", tmp_path / "run" / "best.safetensors", "--data", out)
    refused = run("validate.py", *best)
    assert refused.returncode == 1
    assert "allow these: --allow-resized" in refused.stderr
    allowed = run("validate.py", *best, "--allow-resized")
    assert allowed.returncode == 0, allowed.stderr
    assert f"{out}, scaled down to a shorter side of 30 px" in allowed.stdout
