"""train.py from the outside: what it leaves behind, how it goes on, what it says of mistakes."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import safetensors.torch
import torch
from calling import call
from PIL import Image
from same_run import differing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from irv2 import build, config_file, evaluation, input_pipeline
from irv2.network import weights
from irv2.network.model import inception_resnet_v2
from irv2.run import checkpoint, directory, resume
from irv2.training import distributed, exchange, prepare, step
from irv2.training.distributed import World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps (21 images, batches of 8, 3 epochs); returns its folder."""
    folder = tmp_path_factory.mktemp("project")
    result = programs.run("train.py", "--config", programs.write_project(folder), as_user=True)
    assert result.returncode == 0, result.stderr
    return folder


def final_state(folder: Path, run: str = "run") -> dict:
    found = checkpoint.load(folder / run / "checkpoints" / "step-000000008")
    return {**found.parts, **found.meta}


def assert_same(one: object, other: object, where: str = "") -> None:
    """Nested containers of tensors and plain values are equal bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def experiment(state: dict) -> dict:
    return {key: state[key] for key in ("model", "ema", "optimizer", "step", "images_seen")}


# ------------------------------------------------------------------------- what a run leaves


def test_log_has_a_line_per_step_and_evaluations_of_both_weights(project: Path) -> None:
    lines = programs.log_lines(project / "run", "train")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["images_seen"] for line in lines] == list(range(8, 65, 8))
    keys = "kind step images_seen epoch loss lr grad_norm images_per_s data_wait memory_gb"
    assert set(lines[0]) == set(keys.split())
    assert lines[0]["lr"] == 0.045
    evals = programs.log_lines(project / "run", "eval")
    assert [(e["step"], e["weights"]) for e in evals] == [
        (step, which) for step in (3, 6, 8) for which in ("ema", "raw")
    ]
    assert set(evals[0]) == {"kind", "step", "epoch", "weights", "top1", "top5", "mean_per_class",
                             "loss", "images"}  # fmt: skip
    assert all(e["images"] == 12 and e["top5"] == 100 for e in evals)


def test_config_of_the_run_is_complete_and_loads(project: Path) -> None:
    text = (project / "run" / "config.yaml").read_text()
    assert text.startswith("# git ") and "torch" in text.splitlines()[1]
    loaded = config_file.load(project / "run" / "config.yaml")
    assert loaded.model_dump() == final_state(project)["config"]


def test_only_the_newest_checkpoints_are_kept(project: Path) -> None:
    names = [p.name for p in sorted((project / "run" / "checkpoints").iterdir())]
    assert names == ["step-000000006", "step-000000008"]


def test_best_weights_are_those_of_the_best_evaluation(project: Path) -> None:
    with safetensors.safe_open(project / "run" / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    best = json.loads(metadata["result"])
    assert best["top1"] == max(e["top1"] for e in programs.log_lines(project / "run", "eval"))
    assert json.loads(metadata["classes"]) == ["a", "b", "c"]
    model = inception_resnet_v2(3, blocks=(1, 1, 1), width=0.25)
    model.load_state_dict(safetensors.torch.load_file(project / "run" / "best.safetensors"))


def test_the_best_weights_stay_when_later_ones_are_worse(tmp_path, monkeypatch) -> None:
    others = {"top5": 100.0, "mean_per_class": 50.0, "mean_loss": 1.0, "images": 12}
    others["top1_correct"] = 6
    results = iter(SimpleNamespace(top1=top1, **others) for top1 in (50.0, 60.0, 40.0, 55.0))
    monkeypatch.setattr(evaluation, "predict", lambda *_: next(results))
    monkeypatch.setattr(evaluation, "draw", lambda *_: None)
    assert (
        call(train, "--config", programs.write_project(tmp_path), "train.max_steps=6").status == 0
    )
    _, metadata, _ = weights.read(str(tmp_path / "run" / "best.safetensors"))
    best = json.loads(metadata["result"])
    assert (best["step"], best["weights"], best["top1"]) == (3, "raw", 60.0)


def test_tensorboard_has_curves_images_and_config(project: Path) -> None:
    events = EventAccumulator(str(project / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "train/grad_norm", "train/images_per_s", "train/data_wait",
            "eval_ema/top1", "eval_raw/top5", "eval_raw/mean_per_class",
            } <= set(tags["scalars"])  # fmt: skip
    evals = programs.log_lines(project / "run", "eval")
    (last,) = (e for e in evals if (e["step"], e["weights"]) == (8, "ema"))
    shown = ["most confident mistakes"] if last["top1"] < 100 else []
    assert sorted(tags["images"]) == ["confusion matrix", *shown, "training images"]
    (matrix,) = events.Images("confusion matrix")
    assert matrix.step == 8
    assert "config/text_summary" in tags["tensors"]


def test_a_run_says_how_well_its_device_is_used_and_traces_some_steps(tmp_path) -> None:
    config_path = programs.write_project(tmp_path)
    logged = ("log.utilisation=true", "log.profile=[2, 2]", "train.max_steps=3")
    status, out, error = call(train, "--config", config_path, *logged)
    assert status == 0, error
    for line in programs.log_lines(tmp_path / "run", "train"):
        assert 0 < line["mfu"] < 1.5 and 0.05 < line["memory_gb"] < 100
    assert re.search(r"\d images/s \(data \d+ %, MFU \d+ %, \d+\.\d GB\)", out)
    trace = json.loads((tmp_path / "run" / "profile" / "rank0.pt.trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    heads = sum(name == "aten::log_softmax" for name in names)  # of the loss: one step
    assert heads == 1 and any("backward" in name.lower() for name in names)


def test_the_first_lines_say_what_is_trained_on(tmp_path) -> None:
    project = programs.write_project(tmp_path)
    (tmp_path / "train" / "b" / "notes.txt").touch()
    status, out, _ = call(train, "--config", project, "train.max_steps=1", "train.micro_batch=4")
    assert status == 0
    lines = out.splitlines()
    assert lines[1] == (
        "data: 21 training and 12 validation images; 1 steps, "
        "8 images a step = 1 rank x 2 accumulated x 4"
    )
    assert lines[2] == "classes in the order of the outputs: a, b, c"
    assert lines[3] == f"note: {tmp_path}/train: 1 file is no image: .txt 1"


def test_plain_lines_where_the_output_is_no_terminal(project: Path) -> None:
    result = programs.run("train.py", "--config", project / "small.yaml")
    assert result.returncode == 0
    assert "\r" not in result.stdout
    assert "finished: step 8 of 8" in result.stdout


# ------------------------------------------------------------------------- going on


def test_another_experiment_is_refused_with_its_differences(project) -> None:
    status, _, error = call(
        train, "--config", project / "small.yaml", "optim.lr=0.01", "data.workers=1"
    )
    assert status == 1
    assert "optim.lr: 0.045 -> 0.01" in error
    assert "workers" not in error


def test_resume_never_refuses_to_touch_a_run(project) -> None:
    before = (project / "run" / "log.jsonl").read_bytes()
    status, _, error = call(train, "--config", project / "small.yaml", "--resume", "never")
    assert status == 1 and "already holds a run up to step 8" in error
    assert (project / "run" / "log.jsonl").read_bytes() == before


def test_run_that_lost_its_checkpoints_does_not_begin_anew(tmp_path) -> None:
    config_path = programs.write_project(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").touch()
    status, _, error = call(train, "--config", config_path)
    assert status == 1 and "no checkpoint to go on from" in error
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"best.safetensors", ".lock"}


def test_run_directory_that_cannot_be_made_is_one_line(tmp_path) -> None:
    (tmp_path / "file").touch()
    config_path = programs.write_project(tmp_path)
    place = f"run.dir={tmp_path / 'file' / 'run'}"
    status, _, error = call(train, "--config", config_path, place)
    assert status == 1 and "Not a directory" in error and error.count("\n") == 1


def test_resume_from_another_runs_checkpoint(project) -> None:
    origin = project / "run" / "checkpoints" / "step-000000006"
    arguments = ("--config", project / "small.yaml", "--resume", origin)
    result = programs.run("train.py", *arguments, f"run.dir={project / 'branch'}")
    assert result.returncode == 0, result.stderr
    assert_same(experiment(final_state(project)), experiment(final_state(project, "branch")))


# ------------------------------------------------------------------------- several ranks


def test_another_optimizer_begins_from_a_run_without_its_slots(project, tmp_path) -> None:
    """Slots of RMSProp would be taken for SGD's momentum."""
    cfg = config_file.load(project / "small.yaml", ["optim.kind=sgd", "optim.lr=0.1"])
    state = build.new_state(cfg, 3, torch.device("cpu"))
    world = World(0, 1, torch.device("cpu"))
    experiment = build.experiment(
        cfg, build.divide_batch(cfg, 3, world), input_pipeline.open_sources(cfg)[0]
    )
    resume.restore(state, tmp_path, str(project / "run"), experiment, world)
    assert state.step == 8 and not state.optimizer.state
    saved = final_state(project)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in state.model.state_dict().items())


def test_two_ranks_train_and_evaluate_every_image_once(project: Path) -> None:
    arguments = ("--config", project / "small.yaml", f"run.dir={project / 'two'}")
    result = programs.run(
        "train.py", *arguments, "train.max_steps=2", ranks=2, torchrun=(), as_user=True
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks x 1 accumulated x 4" in result.stdout
    assert "Warning" not in result.stderr
    assert result.stdout.count("step 2/2") == 1
    assert [e["images"] for e in programs.log_lines(project / "two", "eval")] == [12, 12]


def test_bad_image_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    project = programs.write_project(tmp_path)
    bad = tmp_path / "val" / "b" / "1.png"  # in the first rank's half
    bad.write_bytes(b"this is no image")
    started = time.monotonic()
    result = programs.run("train.py", "--config", project, ranks=2)
    assert result.returncode != 0
    assert time.monotonic() - started < 200
    assert f"train.py: {bad}: cannot be decoded" in result.stderr
    assert "Traceback" not in result.stderr


def test_ranks_exchange_as_the_config_says_in_a_settled_order(tmp_path, monkeypatch) -> None:
    """As the first of two ranks, of which there is but one."""
    done = []
    two = World(0, 2, torch.device("cpu"))
    for name, answer in {"same": True, "votes": [False, False], "any": False}.items():
        monkeypatch.setattr(World, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(World, "gather", lambda _, items: items)
    monkeypatch.setattr(World, "average_", lambda *_: done.append("step"))
    monkeypatch.setattr(distributed, "start", lambda *_: nullcontext(two))
    monkeypatch.setattr(directory, "check_shared", lambda *_: None)
    monkeypatch.setattr(exchange, "wrapped", lambda model, *how: done.append(how[1:]) or model)
    monkeypatch.setattr(prepare, "settle", lambda *_: done.append("settled"))
    overrides = ("train.reduce_dtype=bf16", "train.max_steps=1")
    assert call(train, "--config", programs.write_project(tmp_path), *overrides).status == 0
    assert done == [("bf16",), "settled", "step"]


def test_the_loop_takes_the_steps_that_train_step_takes(tmp_path) -> None:
    """To the bit, in accumulated micro-batches, so that tests of `train_step` are of train.py."""
    path, limits = programs.write_project(tmp_path), ("train.micro_batch=4", "train.max_steps=2")
    assert call(train, "--config", path, *limits).status == 0
    cfg, alone = config_file.load(path, limits), World(0, 1, torch.device("cpu"))
    source, _ = input_pipeline.open_sources(cfg)
    state = build.new_state(cfg, 3, alone.device)
    options = build.step_options(cfg, 2, source, alone)
    schedule, order = build.schedule(cfg, len(source)), input_pipeline.training_order(cfg, source)
    batches = input_pipeline.training_batches(cfg, source, order, 0, 4, alone)
    pairs = ((batch.images, batch.labels) for batch in batches)
    for images_seen in (0, 8):
        lr = schedule.learning_rate(images_seen)
        step.train_step(state, state.model, pairs, lr, options, alone)
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-000000002").parts
    assert differing(saved, state.tensors()) == []


# ------------------------------------------------------------------------- progressive sizes

GROWING = "data.train_sizes=[[0, 75], [0.5, 80]]"  # of 42 images: from the fourth batch of 8 on


def sizes_and_keys(path: Path, start: int, *overrides: str) -> list[tuple[int, list]]:
    """Side and keys of five batches from a stream position on."""
    cfg, alone = config_file.load(path, overrides), World(0, 1, torch.device("cpu"))
    source, _ = input_pipeline.open_sources(cfg)
    order = input_pipeline.training_order(cfg, source)
    with closing(input_pipeline.training_batches(cfg, source, order, start, 8, alone)) as batches:
        return [(batch.images.shape[-1], batch.keys) for batch in islice(batches, 5)]


@pytest.mark.parametrize(
    ("start", "sizes"), [(0, [75] * 3 + [80] * 2), (13, [75] + [80] * 4), (21, [80] * 5)]
)
def test_sizes_change_with_the_step_that_reaches_their_share(tmp_path, start, sizes) -> None:
    """And nothing else does: the same images in the same batches."""
    path, epochs = programs.write_project(tmp_path), "train.epochs=2"
    growing = sizes_and_keys(path, start, GROWING, epochs)
    assert [size for size, _ in growing] == sizes
    same = sizes_and_keys(path, start, epochs)
    assert [keys for _, keys in growing] == [keys for _, keys in same]


def test_a_growing_run_is_resumed_to_the_bit_on_either_side_of_the_change(tmp_path) -> None:
    path, names = programs.write_project(tmp_path), ("whole", "parts", "small")
    whole, parts, small = (
        ("--config", path, "train.epochs=2", f"run.dir={tmp_path / n}") for n in names
    )
    assert "75 px, 80 px after 50 %" in call(train, *whole, GROWING).out
    for limit in (2, 3, 4, 6):
        assert call(train, *parts, GROWING, f"train.max_steps={limit}").status == 0
    assert call(train, *small).status == 0
    losses = {
        n: [line["loss"] for line in programs.log_lines(tmp_path / n, "train")] for n in names
    }
    assert losses["whole"] == losses["parts"]
    assert losses["whole"][:3] == losses["small"][:3] and losses["whole"][3] != losses["small"][3]


# ------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=nowhere", "nowhere: no such data folder"),
        ("run.device=cuda", "no usable GPU"),
        ("train.micro_batch=0", "train.micro_batch=0"),
        ("optim.learning_rate=1", "unknown key"),
        ("data.train=ROOT", "its folders train and val are parts of a data set"),
        ("data.val=ROOT/train", "data.train and data.val are the same"),
        ("data.val=synthetic:4x1", "data.val=synthetic:4x1: has only one class, class0000"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(tmp_path, override, message) -> None:
    if override == "run.device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    project = programs.write_project(tmp_path)
    status, _, error = call(train, "--config", project, override.replace("ROOT", str(tmp_path)))
    assert status == 1
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_classes_that_differ_are_named(tmp_path) -> None:
    project = programs.write_project(tmp_path)
    (tmp_path / "val" / "c").rename(tmp_path / "val" / "d")
    status, _, error = call(train, "--config", project)
    assert status == 1 and "1 unknown (d) and 1 missing (c)" in error


def test_unusable_validation_image_is_named(tmp_path) -> None:
    project = programs.write_project(tmp_path)
    path = tmp_path / "val" / "a" / "0.png"
    Image.new("RGB", (9, 9)).save(path)
    path.write_bytes(path.read_bytes()[:40])
    status, _, error = call(train, "--config", project)
    assert status == 1 and f"{path}: cannot be decoded" in error
    assert not (tmp_path / "run").exists()  # told before the first step


def test_checkpoint_of_another_network_is_refused(project, tmp_path) -> None:
    arguments = ("--config", programs.write_project(tmp_path), "--resume", project / "run")
    status, _, error = call(train, *arguments, "model.blocks=[1, 2, 1]")
    assert status == 1 and "model.blocks: [1, 1, 1] -> [1, 2, 1]" in error
    programs.write_images(tmp_path / "train", ["d"], 1)
    programs.write_images(tmp_path / "val", ["d"], 1)
    status, _, error = call(train, *arguments)
    assert status == 1 and "classes: 3 before, 4 now" in error
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_divide_the_batch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    project = programs.write_project(tmp_path)
    status, _, error = call(train, "--config", project, "train.global_batch=9")
    assert status == 1
    assert error.startswith("train.py: train.global_batch=9 cannot be divided among 2 ranks")
    assert not (tmp_path / "run").exists()
