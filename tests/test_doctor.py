"""scripts/doctor.py: each trouble with a run is found before it, and a sound one is let pass."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from calling import Called, call
from PIL import Image

from data import sources
from data.base import Source
from data.errors import DataError, ImageError
from data.prepare import checkup
from data.prepare.checkup import BadImage
from irv2 import build, cli, config_file
from irv2.network import memory
from irv2.network.cpu import fused
from irv2.training import distributed, step
from scripts import doctor
from scripts.checks import capacity, images, machine
from scripts.checks.case import FAIL, OK, WARN, Case, CheckOptions, Finding

FULL = programs.ROOT / "configs" / "irv2_rmsprop.yaml"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The config of a small run: 21 training and 12 validation images of 3 classes."""
    return programs.write_project(tmp_path)


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Called]:
    """The program, called in this process and without timing anything."""
    monkeypatch.setattr(doctor, "CHECKS", [row for row in doctor.CHECKS if row[0] != "pace"])
    return functools.partial(call, doctor)


def test_one_process_has_the_share_of_the_machine_that_a_rank_would_have(monkeypatch):
    def probe(_case: Case) -> list[Finding]:
        with distributed.start("cpu") as world:
            return [Finding(OK, f"{world.size} {distributed.place().local_size}")]

    monkeypatch.setattr(doctor, "CHECKS", [("probe", probe, ())])
    status, out, _ = call(doctor, "any.yaml", "--ranks", 3)
    assert status == 0 and lines_of(out, OK)[0].endswith(" 1 3")
    monkeypatch.setenv("WORLD_SIZE", "3")
    status, out, error = call(doctor, "any.yaml", "--ranks", 3)
    assert (status, out) == (1, "") and "no RANK" in error


def case_of(project: Path, *overrides: str, **asked: object) -> Case:
    """A case whose config and data have been read."""
    case = Case(CheckOptions(str(project), list(overrides), **asked))
    assert [finding.level for finding in doctor.check_config(case)] == [OK]
    assert [finding.level for finding in images.check_sources(case)] == [OK]
    return case


def lines_of(out: str, level: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(level)]


# ---------------------------------------------------------------------------------- the program


@pytest.mark.slow
def test_a_sound_run_passes_and_nothing_is_written(project, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = programs.run("scripts/doctor.py", project, "data.workers=1", "--seconds", 0.5)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert not lines_of(result.stdout, FAIL)
    names = [line[6:17].strip() for line in result.stdout.splitlines()[:-1] if line[:5].strip()]
    assert list(dict.fromkeys(names)) == [name for name, _, _ in doctor.CHECKS]
    assert "1 worker gives" in lines_of(result.stdout, "ok")[-1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_with_status_130(project):
    process = programs.start("scripts/doctor.py", project, "data.workers=1", "--seconds", 200)
    programs.wait_for(process, "ok    memory      RAM")
    children = programs.children(process.pid)
    process.send_signal(signal.SIGINT)
    result = programs.finish(process)
    assert result.returncode == 130
    assert result.stderr == ""
    assert not any(programs.is_alive(pid) for pid in children)


def test_a_truncated_validation_image_is_named(project, tmp_path, examine):
    path = tmp_path / "val" / "b" / "2.png"
    path.write_bytes(path.read_bytes()[:300])
    listed, report = tmp_path / "bad.txt", tmp_path / "report.json"
    status, out, _ = examine(project, "--bad-files", listed, "--json", report)
    assert status == 1
    (line,) = lines_of(out, FAIL)
    assert "decoding    val: 1 of 12 images looked at cannot be decoded" in line
    assert str(path) in out
    assert listed.read_text().startswith(f"{path}\t") and listed.read_text().count("\n") == 1
    findings = json.loads(report.read_text())
    (failed,) = [finding for finding in findings if finding["level"] == FAIL]
    assert failed["figures"] == {"split": "val", "bad": 1, "looked_at": 12, "images": 12}


def test_a_bad_files_name_acts_on_no_terminal_and_ends_no_line(project, tmp_path, examine):
    bad = tmp_path / "train" / "b" / "x\x1b[2J\n0.png"
    bad.write_bytes(b"no image")
    status, out, err = examine(project, "--bad-files", tmp_path / "bad.txt")
    assert status == 1
    assert r"x\x1b[2J\n0.png: cannot be decoded" in out and "\x1b" not in out + err
    assert (tmp_path / "bad.txt").read_text().count("\n") == 1


def test_an_unusable_image_is_one_line_whatever_it_is_called(capsys):
    def body() -> int:
        raise ImageError("x\x1b[2J\n.png: cannot be read")

    assert cli.exit_status(body) == 1
    assert capsys.readouterr().err.endswith("x\\x1b[2J\\n.png: cannot be read\n")


def test_a_mistyped_key_is_refused_and_nothing_else_looked_at(project, examine):
    status, out, _ = examine(project, "optim.lrr=0.1")
    assert status == 1
    assert "optim.lrr=0.1: unknown key; did you mean optim.lr?" in lines_of(out, FAIL)[0]
    assert len(lines_of(out, "-")) == len(doctor.CHECKS) - 1


def test_a_batch_that_ranks_cannot_share_is_refused_and_the_data_looked_at(project, examine):
    status, out, _ = examine(project, "--ranks", "3")
    assert status == 1
    assert "cannot be divided among 3 ranks" in lines_of(out, FAIL)[0]
    assert any("21 images of 3 classes" in line for line in lines_of(out, OK))


def test_a_missing_split_is_named(project, tmp_path, examine):
    status, out, _ = examine(project, f"data.val={tmp_path / 'vall'}")
    assert status == 1
    assert f"{tmp_path / 'vall'}: no such data folder" in lines_of(out, FAIL)[0]


def test_classes_that_differ_are_named_beforehand(project, tmp_path, examine):
    (tmp_path / "val" / "c").rename(tmp_path / "val" / "d")
    status, out, _ = examine(project)
    assert status == 1
    assert "1 unknown (d) and 1 missing (c)" in lines_of(out, FAIL)[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=ROOT", "its folders train and val are parts of a data set"),
        ("data.val=ROOT/train", "data.train and data.val are the same"),
        ("data.val=ROOT/train/..", "its folders train and val are parts of a data set"),
        ("data.val=ROOT/top", "has only one class, deep, and that holds folders (a, b, c)"),
    ],
)
def test_the_wrong_level_as_root_is_told(project, tmp_path, examine, override, message):
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "deep").symlink_to(tmp_path / "val", target_is_directory=True)
    status, out, _ = examine(project, override.replace("ROOT", str(tmp_path)))
    assert status == 1
    assert message in lines_of(out, FAIL)[0]


def test_what_is_left_out_of_a_folder_is_told(project, tmp_path, examine):
    for k in range(12):
        (tmp_path / "val" / "b" / f"{k}.{'xml' if k < 2 else 'txt'}").touch()
    status, out, _ = examine(project)
    assert status == 0
    assert f"{tmp_path}/val: 12 files are not images: .txt 10, .xml 2" in lines_of(out, WARN)[0]


def test_synthetic_images_are_looked_at_too(project, examine):
    sets = ("data.train=synthetic:64x4", "data.val=synthetic:16x4")
    status, out, _ = examine(project, *sets, "--scan", "full")
    assert status == 0
    assert any("train: 64 images of 4 classes, 16 each" in line for line in lines_of(out, OK))


@pytest.mark.parametrize(
    "arguments", [("--scan", "0"), ("--ranks", "0"), ("--scan", "all"), ("--json", "no/such/file")]
)
def test_an_impossible_option_is_refused_first(arguments, project, examine):
    assert examine(project, *arguments).status == 2


# ---------------------------------------------------------------------------------- images


class Unfiled(Source):
    """Six images of three classes that lie in no files."""

    classes, starts = ("a", "b", "c"), (0, 2, 3, 6)

    def read(self, index: int) -> tuple[bytes, int]:
        return bytes([index]), self.label(index)

    def name(self, index: int) -> str:
        return f"image {index}"


def test_extreme_imbalance_is_warned_of():
    cases = (([40, 4], OK), ([41, 4], WARN), ([7, 7], OK), ([0, 1], WARN))
    for counts, level in cases:
        assert images.count_finding("train", ["a", "b"], np.array(counts)).level == level, counts


@pytest.mark.parametrize(("split", "total"), [("train", 1_281_167), ("val", 50_000)])
def test_imagenet_is_expected_whole(split, total):
    classes = [f"n{i:08d}" for i in range(1000)]
    counts = np.full(1000, total // 1000)
    counts[0] += total - counts.sum()
    assert images.count_finding(split, classes, counts).level == OK
    counts[3] -= 1
    short = images.count_finding(split, classes, counts)
    assert short.level == WARN and f"{total:,}" in short.todo
    others = ["mine", *classes[1:]]
    assert images.count_finding(split, others, counts).level == OK


def test_a_sample_is_spread_evenly_and_has_no_image_twice():
    drawn = checkup.sample(1000, 64, seed=0)
    assert drawn == sorted(set(drawn)) and len(drawn) == 64
    assert np.histogram(drawn, bins=8, range=(0, 1000))[0].tolist() == [8] * 8
    assert drawn != checkup.sample(1000, 64, seed=1)
    assert checkup.sample(5, 64, seed=0) == [0, 1, 2, 3, 4]


def judged(split: str, bad: int, looked: int, length: int) -> Finding:
    found = [BadImage(f"{i}.jpg", "broken") for i in range(bad)]
    return images.decoding_finding(split, found, looked, length, 0.0 if split == "val" else 0.01)


def test_bad_images_are_judged_by_what_the_run_allows():
    assert judged("train", 0, 100, 100).level == OK
    assert judged("train", 1, 100, 100).level == WARN
    assert judged("train", 2, 100, 100).level == FAIL
    assert judged("train", 2, 100, 9000).level == WARN  # 0.6 to 7.0 %: not yet shown to be over 1 %
    assert judged("train", 9, 100, 9000).level == FAIL
    assert judged("val", 1, 100, 9000).level == FAIL


def test_twenty_bad_images_are_shown():
    finding = judged("val", 33, 100, 100)
    assert finding.details[0] == "0.jpg: broken"
    assert len(finding.details) == 21 and finding.details[-1] == "… and 13 more"


def test_a_scan_names_every_bad_image_with_its_reason(project, tmp_path):
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"no image")
    (tmp_path / "train" / "c" / "0.png").unlink()
    (tmp_path / "train" / "c" / "0.png").symlink_to(tmp_path / "nowhere.png")
    source = sources.FolderSource(tmp_path / "train")
    bad = checkup.bad_images(source, range(len(source)), processes=2)
    assert [image.name for image in bad] == [
        str(tmp_path / "train" / name) for name in ("a/3.png", "c/0.png")
    ]
    assert bad[0].reason.startswith("cannot be decoded") and "No such file" in bad[1].reason


def die(_source: object, _index: int) -> None:
    os._exit(1)


def test_a_process_that_dies_while_scanning_is_told():
    with pytest.raises(DataError, match="a worker process has died"):
        list(checkup.in_parallel(die, Unfiled(), range(6), 2, "decoding"))


def test_images_of_both_splits_are_found_by_content(project, tmp_path):
    case = case_of(project)
    assert [finding.level for finding in images.check_duplicates(case)] == [OK]
    shutil.copyfile(tmp_path / "val" / "b" / "1.png", tmp_path / "train" / "c" / "copy.png")
    case = case_of(project)
    (finding,) = images.check_duplicates(case)
    assert finding.level == FAIL
    assert finding.figures == {"same": 1, "val_images": 12, "train_images": 22}
    assert finding.details == [f"{tmp_path / 'val/b/1.png'} = {tmp_path / 'train/c/copy.png'}"]


def photograph(seed: int) -> Image.Image:
    """Soft blots, 64 x 48 px."""
    blots = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize((64, 48), Image.Resampling.BICUBIC)


def test_images_that_look_like_those_of_the_other_split_are_found_if_asked(project, tmp_path):
    for number, folder in enumerate(["train/a", "train/b", "val/a", "val/b"]):
        photograph(number).save(tmp_path / folder / f"photo{number}.png")
    photograph(0).resize((40, 30)).save(tmp_path / "val" / "c" / "smaller.jpg", quality=70)
    shutil.copyfile(tmp_path / "train/b/photo1.png", tmp_path / "val" / "c" / "same.png")
    (tmp_path / "val" / "c" / "broken.png").write_bytes(b"no image")
    _, finding = images.check_duplicates(case_of(project, near_duplicates=True))
    assert finding.level == WARN
    assert "1 of 17 val images look like one of 23 (all: 23) train images" in finding.what
    assert finding.figures == {"alike": 1, "val_images": 17, "train_images": 23}
    pair = f"{tmp_path / 'val/c/smaller.jpg'} ~ {tmp_path / 'train/a/photo0.png'} ("
    assert len(finding.details) == 1 and finding.details[0].startswith(pair)
    assert len(list(images.check_duplicates(case_of(project)))) == 1


def test_without_imagehash_it_is_said_how_to_install_it(project, examine, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    status, out, error = examine(project, "--near-duplicates")
    assert (status, out) == (1, "")
    assert "--near-duplicates needs imagehash: pip install -r requirements-data.txt" in error


def test_sources_without_files_are_compared_as_far_as_asked():
    here = there = Unfiled()
    whole = checkup.same_images(here, [0, 4], there, limit=6, processes=1)
    assert sorted(whole.pairs) == [(0, 0), (4, 4)] and whole.compared == 6
    assert checkup.same_images(here, [0, 4], there, limit=3, processes=1).compared == 3


# ---------------------------------------------------------------------------------- machine


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make every file system have so many bytes left."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _place: Usage(size, 0, size))

    return set_free


def test_a_checkpoints_size_is_that_of_its_tensors(project):
    for overrides in ((), ("model.bn_scale=false", "train.precision=bf16")):
        case = case_of(project, *overrides)
        with distributed.start("cpu") as world:
            state = build.new_state(case.cfg, 3, world.device)
            batch = torch.rand(2, 3, 75, 75), torch.tensor([0, 1])
            step.train_step(state, state.model, iter([batch]), 0.1, step.StepOptions(), world)
        sizes = build.memory_sizes(case.cfg, 3)
        parts = [sum(t.nbytes for t in part.values()) for part in state.tensors().values()]
        assert sizes.checkpoint == sum(parts)
        assert sizes.weights == parts[0]


@pytest.mark.slow
def test_the_full_networks_checkpoint_has_870_megabytes():
    cfg = config_file.load(FULL, ["model.bn_scale=true"])
    assert build.memory_sizes(cfg, 1000).checkpoint == pytest.approx(870e6 + 24e6, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_that_autograd_keeps(project, precision, monkeypatch):
    """With plain operations, as on a GPU."""
    monkeypatch.setattr(fused, "trains", lambda x, norms: False)
    cfg = config_file.load(project, [f"train.precision={precision}"])
    sizes = build.memory_sizes(cfg, 3)
    model = build.new_state(cfg, 3, torch.device("cpu")).model.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    dtype = step.PRECISIONS[precision]
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        _output = model(torch.rand(4, 3, 75, 75))
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert 4 * sizes.activations + sizes.cast_weights == pytest.approx(total, rel=0.02)


@pytest.mark.slow
def test_gradient_checkpointing_is_seen_to_keep_less():
    cfgs = [config_file.load(FULL, [f"model.grad_checkpointing={on}"]) for on in ("false", "true")]
    plain, frugal = (build.memory_sizes(cfg, 10).activations for cfg in cfgs)
    assert plain / 2 < frugal < 0.7 * plain  # the stem, not checkpointed, has half of them


def test_a_disk_too_small_for_the_checkpoints_is_told(project, free):
    case = case_of(project, "checkpoint.keep=3")
    sizes = build.memory_sizes(case.cfg, 3)
    need = 5 * sizes.checkpoint + 2 * sizes.weights
    for size, level in ((need - 1, FAIL), (need, WARN), (2 * need, OK)):
        free(size)
        (finding,) = machine.check_disk(case)
        assert (finding.level, finding.figures["need"]) == (level, need)
    assert not case.cfg.directory.exists()


def test_a_place_may_have_any_name(project, tmp_path, free):
    place = tmp_path / "{runs}"
    place.mkdir()
    free(10**12)
    (finding,) = machine.check_disk(case_of(project, f"run.dir='{place}'"))
    assert finding.what.startswith(f"{place}: 931.32 GiB free")


def test_checkpoints_that_are_there_need_no_room(project, free):
    case = case_of(project)
    old = case.cfg.directory / "checkpoints" / "step-000000002"
    old.mkdir(parents=True)
    (old / "model.safetensors").write_bytes(bytes(1_000_000))
    free(10**12)
    (finding,) = machine.check_disk(case)
    sizes = build.memory_sizes(case.cfg, 3)
    assert finding.figures["need"] == 4 * sizes.checkpoint + 2 * sizes.weights - 1_000_000


def test_a_place_that_may_not_be_written_is_told(project, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: (place, mode) != (tmp_path, os.W_OK))
    (finding,) = machine.check_disk(case_of(project))
    assert finding.level == FAIL and finding.what == f"{tmp_path}: may not be written"


@pytest.mark.parametrize(
    ("spec", "cache", "free_bytes", "level"),
    [
        ("images/train", None, 0, OK),
        ("s3://bucket/train", None, 10**12, WARN),
        ("s3://bucket/train", "cache", 2 * 10**9 - 1, WARN),
        ("https://host/train", "cache", 2 * 10**9, OK),
    ],
)
def test_images_of_an_object_store_want_a_cache_with_room(
    tmp_path, free, spec, cache, free_bytes, level
):
    free(free_bytes)
    place = None if cache is None else str(tmp_path / cache)
    data = {"train": spec, "val": spec, "cache_dir": place, "cache_gb": 2.0}
    case = Case(CheckOptions("small.yaml", []), cfg=config_file.from_tree({"data": data}))
    (finding,) = machine.check_cache(case)
    assert finding.level == level
    assert bool(finding.todo) == (level != OK)
    assert not (tmp_path / "cache").exists()


def test_shared_memory_must_hold_the_batches_that_wait(project, free):
    # 2 ranks x 3 workers x 2 batches waiting, of 4 images in training and 7 in evaluation
    case = case_of(project, "data.workers=3", ranks=2)
    need = 2 * 3 * 2 * (4 + 7) * 3 * 75 * 75
    for size, level in ((need - 1, FAIL), (need, WARN), (2 * need, OK)):
        free(size)
        (finding,) = machine.check_shared_memory(case)
        assert (finding.level, finding.figures["need"]) == (level, need)


def test_without_workers_shared_memory_is_not_used(project, free):
    free(0)
    (finding,) = machine.check_shared_memory(case_of(project))
    assert finding.level == OK


def test_available_memory_heeds_the_limits_around_a_process(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   2048 kB\n")
    (tmp_path / "cgroup").write_text("4:memory:/other\n0::/slurm/job/step\n")
    step = tmp_path / "groups" / "slurm" / "job" / "step"
    step.mkdir(parents=True)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")

    def limit(folder: Path, most: int | str, used: int, cached: int) -> int:
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        stat = f"anon {used - cached}\nactive_file {cached // 4}\ninactive_file {3 * cached // 4}\n"
        (folder / "memory.stat").write_text(stat)
        return memory.available_memory()

    assert memory.available_memory() == 2 << 20  # no limit anywhere
    assert limit(step, "max", 1 << 30, 0) == 2 << 20
    assert limit(step, 1 << 40, 1 << 30, 0) == 2 << 20
    assert limit(step, 1000, 700, 400) == 1000 - 300
    assert limit(step.parent, 900, 800, 0) == 100  # of all steps together
    assert limit(step.parent, 900, 1000, 0) == 0
    (tmp_path / "cgroup").write_text("0::/\n")  # a container sees its own group as the root
    assert memory.available_memory() == 2 << 20
    assert limit(tmp_path / "groups", 5000, 2000, 0) == 3000


def test_too_little_memory_is_told(project, monkeypatch):
    case = case_of(project)
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    information, ram = machine.check_memory(case)
    assert information.level == OK and "a GPU would need about" in information.what
    assert ram.level == FAIL


# ---------------------------------------------------------------------------------- pace


@pytest.mark.parametrize(
    ("model", "loads", "workers", "level", "said"),
    [
        (25, {1: 640}, 1, OK, "the loader keeps up: 1 worker gives 640 images/s, the model"),
        (1000, {1: 200, 2: 400}, 2, WARN, "set data.workers=6"),
        (3000, {1: 200, 2: 400}, 2, WARN, "set data.workers=8, the cores of a rank: it will still"),
        (1000, {1: 200, 6: 500}, 6, WARN, "more workers will not help"),
        (100, {0: 100, 1: 100}, 0, WARN, "the model will wait 50% of the time"),
        (0.123, {1: 64}, 1, OK, "the model takes 0.12"),
        (1000, {1: 990}, 1, OK, "the model will wait 1% of the time"),
    ],
)
def test_the_verdict_on_the_loader(model, loads, workers, level, said):
    finding = machine.pace_finding(model, loads, workers, cores=8, shares_cores=False)
    assert finding.level == level
    assert said in f"{finding.what} {finding.todo}"


@pytest.mark.parametrize(
    ("loads", "workers", "pace", "bottleneck", "epoch"),
    [
        ({1: 300.0, 8: 2400.0}, 8, 1800.0, "the GPU", "0:12 h"),
        ({1: 100.0, 8: 600.0}, 8, 600.0, "the loader", "0:36 h"),
        ({0: 1800.0, 1: 300.0}, 0, 900.0, "the loader", "0:24 h"),  # they take turns
    ],
)
def test_what_to_expect_of_a_gpu(loads, workers, pace, bottleneck, epoch):
    finding = machine.expectation(1800.0, loads, workers, 16, 256, 1_281_167)
    assert finding.figures["images_per_s"] == pytest.approx(pace)
    assert finding.figures["bottleneck"] == bottleneck
    assert f"an epoch in {epoch}" in finding.what and f"{loads[1] * 16:,.0f};" in finding.what
    assert finding.what.endswith(f"{bottleneck} is the bottleneck; micro-batches of 256 fit")


def test_on_a_gpu_the_last_line_says_what_to_expect(project, monkeypatch):
    case = case_of(project, "data.workers=1")
    monkeypatch.setattr(Case, "has_gpu", True)
    monkeypatch.setattr(capacity, "loader_rate", lambda *_: 300.0)
    monkeypatch.setattr(capacity, "model_rate", lambda *_: 100.0)
    monkeypatch.setattr(machine.build, "fitting_micro_batch", lambda *_: 8)
    keeps_up, expected = machine.check_pace(case)
    assert keeps_up.level == OK and "the loader keeps up" in keeps_up.what
    assert expected.what.endswith("micro-batches of 8 fit")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a measurement sees; only the test moves it."""
    times = [0.0]
    monkeypatch.setattr(capacity.time, "perf_counter", lambda: times[0])
    return times


def test_a_rate_leaves_out_the_warm_up(now):
    taken = []

    def take() -> int:
        now[0] += 100.0 if len(taken) < 2 else 0.5
        taken.append(8)
        return 8

    assert capacity.rate(take, warm_up=2, seconds=300) == 16
    assert len(taken) == 2 + 600


def test_a_warm_up_that_lasts_long_enough_is_the_measurement(now):
    def take() -> int:
        now[0] += 40.0
        return 8

    assert capacity.rate(take, warm_up=1, seconds=10) == 0.2
    assert now == [40.0]
