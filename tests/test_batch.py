"""How the global batch is divided among ranks and micro-batches, and what memory has to say."""

from __future__ import annotations

import re

import pytest
import torch
from small_network import ALONE

from irv2 import build, config, config_file
from irv2.network import memory
from irv2.run import directory
from irv2.training import batch
from irv2.training.batch import divide
from irv2.training.distributed import World, WorldError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "expected"),
    [
        (640, 32, 20, (32, 1)),  # the paper's machine
        (640, 32, 1, (32, 20)),
        (640, 32, 8, (20, 4)),
        (640, 64, 8, (40, 2)),
        (32, 32, 1, (32, 1)),
        (32, 64, 2, (16, 1)),
        (96, 32, 2, (24, 2)),
        (7, 32, 7, (1, 1)),
    ],
)
def test_the_batch_is_divided_into_the_largest_equal_parts(
    global_batch, micro_batch, ranks, expected
):
    assert divide(global_batch, micro_batch, ranks) == expected


def test_every_division_makes_the_global_batch_of_parts_no_larger_than_asked():
    for global_batch in range(1, 65):
        for ranks in (1, 2, 3, 4, 8):
            for micro_batch in (1, 2, 5, 8, 32):
                try:
                    size, accumulation = divide(global_batch, micro_batch, ranks)
                except WorldError:
                    continue
                assert size * accumulation * ranks == global_batch
                assert min(micro_batch, global_batch // ranks) / 2 <= size <= micro_batch


@pytest.mark.parametrize(("global_batch", "ranks"), [(640, 6), (640, 7), (100, 8), (74, 3)])
def test_a_number_of_ranks_that_does_not_divide_the_batch_names_values_that_work(
    global_batch, ranks
):
    with pytest.raises(WorldError) as caught:
        divide(global_batch, 32, ranks)
    message = str(caught.value)
    assert message.startswith(f"train.global_batch={global_batch} ")
    assert f"{ranks} ranks" in message
    near = re.search(r"start (\d+)(?: or (\d+))? ranks", message).groups()
    for other in filter(None, near):
        assert global_batch % int(other) == 0
    fitting = int(re.search(r"set train\.global_batch=(\d+)", message)[1])
    divide(fitting, 32, ranks)


def test_more_ranks_than_images_are_refused_with_a_batch_that_works():
    with pytest.raises(WorldError, match=r"start 3 ranks, or set train\.global_batch=8"):
        divide(3, 32, 8)


def test_a_share_without_equal_parts_near_the_micro_batch_names_values_that_work():
    with pytest.raises(WorldError) as caught:
        divide(74, 32, 2)  # 37 images a rank, a prime
    message = str(caught.value)
    assert "37 images a rank" in message
    micro_batches = re.search(r"train\.micro_batch=(\d+) or (\d+)", message).groups()
    assert micro_batches == ("1", "37")
    for micro_batch in map(int, micro_batches):
        divide(74, micro_batch, 2)
    fitting = int(re.search(r"or train\.global_batch=(\d+)", message)[1])
    assert divide(fitting, 32, 2) == (32, fitting // 64)


# ---------------------------------------------------------------------- train.micro_batch=auto


def configured(*overrides: tuple[str, dict]) -> config.Config:
    return config_file.from_tree(
        {
            "data": {"train": "synthetic:64x4", "val": "synthetic:8x4", "image_size": 299},
            "model": {"blocks": [1, 1, 1]},
            "train": {"global_batch": 96, "micro_batch": "auto"},
            **dict(overrides),
        }
    )


def fitting(monkeypatch, images: int, cfg: config.Config, ranks: int = 1) -> int:
    """Micro-batch chosen where memory holds a step of so many images on each rank."""
    need = build.memory_sizes(cfg, 4).training(images)
    monkeypatch.setattr(memory, "device_memory", lambda _: int(ranks * need / 0.85) + 1)
    room = batch.memory_room(CPU, ranks)
    return build.fitting_micro_batch(cfg, 4, ranks, room)


@pytest.mark.parametrize(
    ("images", "ranks", "expected"),
    [(1000, 1, 96), (96, 1, 96), (95, 1, 48), (31, 1, 24), (1000, 2, 48), (47, 2, 24)],
)
def test_the_largest_equal_part_that_fits_is_taken(monkeypatch, images, ranks, expected):
    assert fitting(monkeypatch, images, configured(), ranks) == expected


def test_pairs_are_not_parted(monkeypatch):
    mixed = ("data", {**configured().data.model_dump(), "mixup": 0.2})
    odd = ("train", {"global_batch": 90, "micro_batch": "auto"})
    assert fitting(monkeypatch, 17, configured(odd)) == 15
    assert fitting(monkeypatch, 17, configured(odd, mixed)) == 10


def test_a_run_goes_on_with_as_many_images_at_once_as_before(monkeypatch, tmp_path):
    """Else batch norm would see other images together, and the run would not be the same."""
    need = build.memory_sizes(configured(), 4).training(50)
    monkeypatch.setattr(memory, "device_memory", lambda _: int(need / 0.85) + 1)
    runs = {
        name: configured(("run", {"dir": str(tmp_path / name)}))
        for name in ("new", "24", "96", "7")
    }
    for taken in (24, 96, 7):
        (tmp_path / str(taken)).mkdir()
        directory.write_config(tmp_path / str(taken), {"train": {"micro_batch": taken}})
    taken = {name: build.divide_batch(cfg, 4, ALONE).micro_batch for name, cfg in runs.items()}
    assert taken["24"] == 24
    assert taken["new"] == taken["96"] == 48  # 96 do not fit any more
    assert taken["7"] == 48  # of another number of ranks


def test_what_cannot_fit_is_an_error_with_what_to_do(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda _: 1 << 20)
    with pytest.raises(WorldError, match=r"a step of 1 images.*grad_checkpointing=true"):
        build.divide_batch(configured(), 4, ALONE)


def test_the_rank_with_the_least_memory_decides_for_all(monkeypatch):
    sizes = build.memory_sizes(configured(), 4)
    monkeypatch.setattr(memory, "device_memory", lambda _: int(sizes.training(96) / 0.85) + 1)

    class Elsewhere(World):
        def smallest(self, value: int) -> int:
            return min(value, sizes.training(24))  # bytes; as a number of images it is no limit

    assert build.divide_batch(configured(), 4, ALONE).micro_batch == 96
    assert build.divide_batch(configured(), 4, Elsewhere(0, 1, CPU)).micro_batch == 24


def test_a_number_is_taken_whatever_the_memory(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda _: 1 << 20)
    cfg = configured(("train", {"global_batch": 96, "micro_batch": 12}))
    assert build.divide_batch(cfg, 4, ALONE).micro_batch == 12
