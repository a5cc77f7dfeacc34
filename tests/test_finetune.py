"""Fine-tuning: what a run begins with, what stays, rates by stage; and train.py doing it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import programs
import pytest
import torch
from programs import finish, run, start, wait_for
from same_run import checkpoint_of, differing, timeless
from small_network import ALONE, copied
from torch import nn

from irv2.network import weights
from irv2.network.accelerate import accelerate
from irv2.network.model import InceptionResnetV2, inception_resnet_v2
from irv2.network.weights import WeightsError
from irv2.training import finetune, optim
from irv2.training.state import TrainState, running_average
from irv2.training.step import StepOptions, running_statistics, train_mode, train_step

BLOCKS = (1, 1, 1)
STEM = ("conv2d_1a.", "conv2d_2a.", "conv2d_2b.", "conv2d_3b.", "conv2d_4a.")
FOUR = ["north", "south", "east", "west"]


def network(num_classes: int = 3, seed: int = 0, **options) -> InceptionResnetV2:
    torch.manual_seed(seed)
    model = accelerate(inception_resnet_v2(num_classes, blocks=BLOCKS, width=0.25, **options))
    for name, buffer in model.named_buffers():
        if "running" in name:  # small, so that a network that uses them lets images through
            nn.init.uniform_(buffer, *((0.05, 0.3) if name.endswith("var") else (-0.2, 0.2)))
    return model


def state_of(model: nn.Module, layer_decay: float = 1.0) -> TrainState:
    scales = finetune.lr_scales(model, layer_decay)
    groups = optim.parameter_groups(model, 1e-3, scales)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    average = running_average(model, 0.9)
    return TrainState(model, average, optim.RMSpropTF(groups, 0.1), scaler)


def step(state: TrainState, seed: int = 0) -> None:
    """A training step of two images."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.rand(2, 3, 75, 75, generator=generator) * 2 - 1, torch.tensor([0, 2])
    train_step(state, state.model, iter([batch]), 0.1, StepOptions(), ALONE)


# ---------------------------------------------------------------------------------- stages


def test_every_child_with_parameters_is_in_exactly_one_stage():
    with torch.device("meta"):
        model = inception_resnet_v2(aux_logits=True)
    children = [child for stage in model.stages() for child in stage]
    having = [name for name, child in model.named_children() if list(child.parameters())]
    assert sorted(children) == sorted(having)


def test_stages_lie_in_the_order_in_which_an_image_passes_them():
    model, passed = network().eval(), []
    for name, child in model.named_children():
        child.register_forward_hook(lambda *_, name=name: passed.append(name))
    model(torch.zeros(1, 3, 75, 75))
    backwards = [child for stage in model.stages() for child in stage]
    assert [name for name in passed if name in backwards] == backwards[::-1]


def test_without_layer_decay_the_groups_are_as_if_there_were_no_stages():
    model = network()
    plain, staged = (
        optim.parameter_groups(model, 4e-5, scales)
        for scales in (None, finetune.lr_scales(model, 1.0))
    )
    assert len(plain) == len(staged) == 2
    for ours, theirs in zip(staged, plain):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert ours["weight_decay"] == theirs["weight_decay"]


def test_with_it_every_parameter_is_in_one_group_with_its_stages_share():
    model = network(aux_logits=True)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optim.parameter_groups(model, 4e-5, finetune.lr_scales(model, 0.5))
    found = [(names[id(p)], group["lr_scale"]) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    expected = {"classif": 1, "aux": 1, "conv2d_7b": 2, "block8": 2, "repeat_2": 4, "mixed_7a": 8,
                "repeat_1": 16, "mixed_6a": 32, "repeat": 64, "mixed_5b": 128}  # fmt: skip
    for name, share in found:
        assert share == 1 / expected.get(name.partition(".")[0], 256), name
    free = [names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]]
    assert set(free) == {name for name in names.values() if ".bn." in name}


def test_a_child_without_a_share_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"^1: no share of the learning rate"):
        optim.parameter_groups(model, 0.1, {"0": 1.0})


def test_a_first_step_moves_each_stage_by_its_share():
    moved = []
    for decay in (1.0, 0.5):
        state = state_of(network(), decay)
        before = copied(dict(state.model.named_parameters()))
        step(state)
        moved.append({name: p - before[name] for name, p in state.model.named_parameters()})
    shares = finetune.lr_scales(state.model, 0.5)
    for name, whole in moved[0].items():
        expected = shares[name.partition(".")[0]] * whole
        assert (moved[1][name] - expected).norm() <= 1e-3 * expected.norm() + 1e-6, name


# ---------------------------------------------------------------------------------- frozen parts


def test_a_frozen_stem_stays_to_the_bit_with_its_statistics_and_gets_no_gradient():
    model = network()
    finetune.freeze(model, "stem")
    state = state_of(model)
    before = copied(model.state_dict())
    reached = []
    model.conv2d_4a.register_forward_hook(lambda _m, _i, out: reached.append(out.requires_grad))
    for seed in range(3):
        step(state, seed)
    assert reached == [False] * 3
    for part in (model.state_dict(), state.ema.module.state_dict()):
        same = {name for name in before if torch.equal(part[name], before[name])}
        assert {name for name in before if name.startswith(STEM)} <= same
        changed = {name for name in before if name not in same}
        assert {"mixed_5b.branch0.bn.running_mean", "mixed_5b.branch0.conv.weight",
                "mixed_5b.branch0.bn.bias", "classif.bias"} <= changed  # fmt: skip
    assert not any(name.startswith(STEM) for name in (n.partition(".")[2] for n in
                   state.tensors()["optimizer"]))  # fmt: skip


def test_with_a_frozen_backbone_only_the_classifier_changes():
    model = network()
    finetune.freeze(model, "backbone")
    state = state_of(model)
    before = copied(model.state_dict())
    step(state)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"classif.weight", "classif.bias"}


def test_statistics_of_frozen_parts_are_not_averaged_over_ranks():
    """A mean of three equal numbers need not be that number."""
    model = network()
    finetune.freeze(model, "stem")
    train_mode(model, freeze_bn=False)
    moving = {id(tensor) for tensor in running_statistics(model)}
    stem = {id(b) for name, b in model.named_buffers() if name.startswith(STEM)}
    assert stem and not stem & moving
    assert len(moving) == len(list(model.named_buffers())) - len(stem)


def test_gamma_that_is_never_learned_does_not_freeze_its_batch_norm():
    model = network(bn_scale=False)
    train_mode(model, freeze_bn=False)
    assert len(running_statistics(model)) == len(list(model.named_buffers()))


# ---------------------------------------------------------------------------------- weights


def load(model: InceptionResnetV2, state: dict, named: list | None, classes: list) -> str:
    return finetune.load(model, dict(state), named, classes, "file")


@pytest.mark.parametrize("named", [["a", "b", "c\u0327"], None])
def test_the_same_classes_or_as_many_unnamed_keep_their_classifier(named):
    origin, model = network(seed=1).state_dict(), network()
    assert "classifier kept" in load(model, origin, named, ["a", "b", "\u00e7"])
    assert differing({"model": model.state_dict()}, {"model": origin}) == []


@pytest.mark.parametrize(
    ("count", "named"),
    [(4, FOUR), (4, None), (3, ["a", "c", "d"]), (1000, None)],
)
def test_a_classifier_of_other_classes_is_made_new_and_all_else_is_loaded(count, named):
    origin, model = network(count, seed=1).state_dict(), network()
    first = copied(model.state_dict())
    told = load(model, origin, named, ["a", "b", "c"])
    assert told == (f"begins from file: new classifier for 3 classes, as its {count:,} are others")
    for name, value in model.state_dict().items():
        expected = first if name.startswith("classif.") else origin
        assert torch.equal(value, expected[name]), name


def test_the_same_classes_in_another_order_keep_their_rows():
    origin, model = network(seed=1).state_dict(), network()
    assert "its rows put into their order" in load(model, origin, ["c", "a", "b"], [*"abc"])
    for name in ("classif.weight", "classif.bias"):
        assert torch.equal(model.state_dict()[name], origin[name][[1, 2, 0]])


def test_weights_without_a_classifier_get_one():
    origin = {k: v for k, v in network(seed=1).state_dict().items() if "classif" not in k}
    assert "new classifier for 3 classes, as it has none" in load(network(), origin, None, [*"abc"])


def test_an_auxiliary_head_is_kept_made_new_or_left_out():
    without = network(seed=1).state_dict()
    having = network(4, seed=1, aux_logits=True).state_dict()
    model = network(aux_logits=True)
    first = copied(model.state_dict())
    assert "new auxiliary head" in load(model, without, None, [*"abc"])
    assert torch.equal(model.aux.conv_1b.conv.weight, first["aux.conv_1b.conv.weight"])
    assert "auxiliary" not in load(model, having, FOUR, [*"abc"])
    assert torch.equal(model.aux.conv_1b.conv.weight, having["aux.conv_1b.conv.weight"])
    assert torch.equal(model.aux.classif.weight, first["aux.classif.weight"])
    model = network()
    load(model, having, FOUR, [*"abc"])
    assert torch.equal(model.conv2d_7b.conv.weight, having["conv2d_7b.conv.weight"])


@pytest.mark.parametrize("name", ["mixed_5b.branch0.conv.weight", "conv2d_1a.bn.running_var"])
@pytest.mark.parametrize("how", ["missing", "other shape"])
def test_anything_else_that_does_not_fit_is_refused_by_the_tensors_name(name, how):
    origin = dict(network(seed=1).state_dict())
    value = origin.pop(name)
    if how == "other shape":
        origin[name] = torch.cat([value, value])
    with pytest.raises(WeightsError, match=rf"^file: .*{name}"):
        load(network(), origin, None, [*"abc"])
    origin[name], origin["more.weight"] = value, value
    with pytest.raises(WeightsError, match=r"^file: .*more\.weight"):
        load(network(), origin, None, [*"abc"])


def test_the_running_average_begins_with_the_same_weights(tmp_path, capsys):
    path = tmp_path / "origin.safetensors"
    weights.write(path, network(4, seed=1).state_dict(), {"classes": json.dumps(FOUR)})
    state = state_of(network())
    finetune.begin(state, str(path), [*"abc"], ALONE)
    parts = state.tensors()
    assert differing({"ema": parts["ema"]}, {"ema": parts["model"]}) == []
    assert not torch.equal(parts["ema"]["conv2d_1a.conv.weight"], network().conv2d_1a.conv.weight)
    assert capsys.readouterr().out.startswith(f"begins from {path}: new classifier")


def test_damaged_class_names_are_one_line(tmp_path):
    path = tmp_path / "origin.safetensors"
    weights.write(path, network(seed=1).state_dict(), {"classes": "[a, b"})
    with pytest.raises(WeightsError, match=r"origin\.safetensors: its metadata is damaged"):
        finetune.begin(state_of(network()), str(path), [*"abc"], ALONE)


# ---------------------------------------------------------------------------------- train.py


CONFIG = """
model: {{blocks: [1, 1, 1], width: 0.25, init: {origin}, freeze: stem}}
data: {{image_size: 75, workers: 0, train: {data}/train, val: {data}/val}}
train: {{epochs: 2, global_batch: 6, micro_batch: 6}}
optim: {{lr: 0.02, layer_decay: 0.5}}
schedule: {{kind: cosine}}
loss: {{class_weights: balanced}}
eval: {{every_epochs: 2, batch: 3}}
checkpoint: {{every_steps: 2}}
log: {{every_steps: 1}}
run: {{device: cpu}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A config of 4 steps on 12 images of two unequal classes, from weights for four classes."""
    for split, counts in {"train": (9, 3), "val": (3, 2)}.items():
        for name, count in zip("ab", counts):
            programs.write_images(tmp_path / split, [name], count, seed=count)
    metadata = {"classes": json.dumps(FOUR)}
    weights.write(tmp_path / "origin.safetensors", network(4, seed=1).state_dict(), metadata)
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.format(data=tmp_path, origin=tmp_path / "origin.safetensors"))
    return path


def arguments(project: Path, name: str, *overrides: object) -> list[object]:
    return ["--config", project, f"run.dir={project.parent / name}", *overrides]


@pytest.mark.slow
def test_a_run_from_other_weights_is_stopped_and_continued_bit_by_bit(project, tmp_path):
    whole = run("train.py", *arguments(project, "whole"))
    assert whole.returncode == 0, whole.stderr
    assert "new classifier for 2 classes, as its 4 are others" in whole.stdout
    assert "frozen: the stem; " in whole.stdout
    assert "mean of classes" in whole.stdout

    process = start("train.py", *arguments(project, "stopped"))
    wait_for(process, "step 1/")
    process.send_signal(signal.SIGINT)
    assert finish(process).returncode == 130
    origin = tmp_path / "origin.safetensors"
    first, *_ = weights.read(str(origin))
    origin.unlink()  # a run that has begun needs it no more
    continued = run("train.py", *arguments(project, "stopped"))
    assert continued.returncode == 0, continued.stderr
    assert "continuing after step" in continued.stdout and "begins" not in continued.stdout

    ours, theirs = (checkpoint_of(tmp_path / name, 4) for name in ("stopped", "whole"))
    assert differing(ours.parts, theirs.parts) == []
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")
    for part in ("model", "ema"):
        tensors = theirs.parts[part]
        assert all(torch.equal(tensors[n], first[n]) for n in first if n.startswith(STEM))
        assert not torch.equal(tensors["mixed_5b.branch0.conv.weight"],
                               first["mixed_5b.branch0.conv.weight"])  # fmt: skip


@pytest.mark.slow
def test_two_ranks_begin_with_the_same_weights_and_train_as_one(project, tmp_path):
    same = ("model.freeze_bn=true", "model.drop_rate=0")  # what else depends on a rank's images
    ends = []
    for ranks in (1, 2):
        result = run("train.py", *arguments(project, f"{ranks}", *same), ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("begins from") == 1
        ends.append(checkpoint_of(tmp_path / f"{ranks}", 4).parts["model"])
    first, *_ = weights.read(str(tmp_path / "origin.safetensors"))
    for name, value in ends[0].items():
        if name.startswith(STEM):
            assert torch.equal(ends[1][name], first[name])
        elif value.is_floating_point() and value.shape == first[name].shape:
            moved, both_moved = value - first[name], ends[1][name] - first[name]
            assert (both_moved - moved).norm() <= 0.01 * moved.norm(), name


@pytest.mark.slow
def test_weights_that_cannot_be_had_are_one_line_before_anything_is_made(project, tmp_path):
    """One of two ranks speaks. Programs under test find no hub (`environment()`)."""
    init = "model.init=timm:inception_resnet_v2.tf_in1k"
    for ranks in (1, 2):
        result = run("train.py", *arguments(project, "run", init), ranks=ranks)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("train.py: timm:inception_resnet_v2.tf_in1k: not available (")
        assert line.endswith("give the file's path instead")
        assert not (tmp_path / "run").exists()
