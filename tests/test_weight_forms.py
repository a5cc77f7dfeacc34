"""Weights in the forms that people have: each read as what it is, or refused by its name."""

from __future__ import annotations

import argparse
import io
import json
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import programs
import pytest
import safetensors
import small_meta
import timm
import torch
from calling import call
from huggingface_hub.errors import EntryNotFoundError
from small_network import copied, randomised
from small_weights import SYNSETS, VIEW
from tars import deflated
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import validate
from irv2.network import imagenet_names, weights
from irv2.network.forms.base import WeightsError
from irv2.network.model import InceptionResnetV2, inception_resnet_v2
from irv2.run import checkpoint, trained
from irv2.training import finetune
from scripts import export, predict

BLOCKS = (1, 1, 1)
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that do not say how many blocks they hold have one of each kind here."""
    monkeypatch.setattr(InceptionResnetV2, "published", (BLOCKS, 1.0))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return randomised(inception_resnet_v2(3, blocks=BLOCKS, width=0.25))


class Ends(nn.Module):
    """The first and the last layer of a network, by which it is known and told from others."""

    def __init__(self, state: State) -> None:
        super().__init__()
        outputs, features = state["classif.weight"].shape
        self.conv2d_1a = nn.Module()
        self.conv2d_1a.conv = nn.Conv2d(3, 32, 3, bias=False)
        self.classif = nn.Linear(features, outputs)
        self.load_state_dict(state)
        self.num_classes, self.in_chans = outputs, 3


def ends(outputs: int = 3) -> State:
    return {
        "conv2d_1a.conv.weight": torch.randn(32, 3, 3, 3),
        "classif.weight": torch.randn(outputs, 4),
        "classif.bias": torch.randn(outputs),
    }


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> State:
    """Weights of `Ends`, which is built in the place of a whole network."""
    monkeypatch.setattr(trained, "_network", lambda state, source, blocks: Ends(state))
    return ends()


@pytest.fixture
def averaged() -> State:
    """Other weights of the same."""
    return ends()


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def is_same(found: trained.Trained, state: State) -> bool:
    ours = found.model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[k], state[k]) for k in state)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


# ---------------------------------------------------------------------- trainers' checkpoints


def timms_checkpoint(state: State, averaged: State | None, **arguments: Any) -> dict[str, Any]:
    """A file as timm's CheckpointSaver writes it."""
    content = {
        "epoch": 3,
        "arch": "inception_resnet_v2",
        "state_dict": state,
        "optimizer": {"state": {0: {"square_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": argparse.Namespace(model="inception_resnet_v2", **arguments),
        "metric": 71.3,
    }
    return content | ({} if averaged is None else {"state_dict_ema": averaged})


def torchvisions_checkpoint(state: State, averaged: State) -> dict[str, Any]:
    """A file as torchvision's references/classification/train.py writes it with --model-ema."""
    ema = AveragedModel(Ends(averaged))
    arguments = argparse.Namespace(
        model="x", val_crop_size=299, val_resize_size=342, interpolation="bilinear"
    )
    return {
        "model": state,
        "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": arguments,
        "model_ema": ema.state_dict(),
    }


@pytest.mark.parametrize("trainer", ["timm", "torchvision"])
def test_a_trainers_averaged_weights_are_taken_unless_raw_ones_are_asked_for(
    tmp_path, state, averaged, trainer
):
    content = {
        "timm": timms_checkpoint(state, averaged),
        "torchvision": torchvisions_checkpoint(state, averaged),
    }[trainer]
    path = saved(tmp_path / "last.pth.tar", content)
    for which, expected, kind in (
        (None, averaged, "ema"),
        ("ema", averaged, "ema"),
        ("raw", state, "raw"),
    ):
        found = trained.load_weights(path, which)
        assert is_same(found, expected) and found.which == kind
        words = "averaged weights are taken" if kind == "ema" else "raw weights are taken"
        assert any(words in line for line in found.remarks), found.remarks
    theirs = timm.models.load_state_dict(path)
    assert all(torch.equal(theirs[name], value) for name, value in averaged.items())


def test_a_kind_of_weights_that_is_not_there_is_refused(tmp_path, state, averaged):
    path = saved(tmp_path / "raw.pth", timms_checkpoint(state, None))
    with pytest.raises(WeightsError, match=r"raw\.pth: holds raw weights alone, no averaged ones"):
        trained.load_weights(path, "ema")
    path = saved(tmp_path / "ema.pth", {"state_dict_ema": averaged})
    with pytest.raises(WeightsError, match=r"ema\.pth: holds averaged weights alone, no raw ones"):
        trained.load_weights(path, "raw")
    weights.write(tmp_path / "b.safetensors", averaged, {"result": '{"weights": "ema"}'})
    with pytest.raises(WeightsError, match=r"holds averaged weights alone, no raw ones"):
        trained.load_weights(str(tmp_path / "b.safetensors"), "raw")
    weights.write(tmp_path / "c.safetensors", averaged, {"result": '{"weights": "as published"}'})
    assert trained.load_weights(str(tmp_path / "c.safetensors"), "raw").which == "as published"


def test_several_sets_of_one_kind_are_refused_by_their_places(tmp_path, state, averaged):
    path = saved(tmp_path / "a.pth", {"teacher": averaged, "student": state})
    with pytest.raises(WeightsError, match=r"several sets of weights \(teacher, student\)"):
        trained.load_weights(path)


def test_a_trainers_arguments_say_how_images_are_seen(tmp_path, state, averaged):
    content = timms_checkpoint(
        state,
        averaged,
        input_size=[3, 75, 75],
        crop_pct=0.9,
        interpolation="bilinear",
        mean=[0.1, 0.2, 0.3],
        std=None,
        dataset="",
    )
    data = trained.load_weights(saved(tmp_path / "a.pth", content)).data
    assert (data.image_size, data.eval_crop, data.eval_interpolation) == (75, 0.9, "bilinear")
    assert (data.mean, data.std) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    content = torchvisions_checkpoint(state, averaged)
    data = trained.load_weights(saved(tmp_path / "b.pth", content)).data
    assert int(data.image_size / data.eval_crop) == 342
    assert (data.image_size, data.eval_interpolation) == (299, "bilinear")
    assert data.mean == list(IMAGENET_DEFAULT_MEAN)
    odd = timms_checkpoint(state, None, interpolation="lanczos", crop_mode="border")
    found = trained.load_weights(saved(tmp_path / "c.pth", odd))
    assert found.data.eval_interpolation == "bicubic"
    assert "lanczos" in found.remarks[0] and "border" in found.remarks[1]
    oblong = timms_checkpoint(state, None, input_size=[3, 75, 99])
    with pytest.raises(WeightsError, match=r"d\.pth: is for images of 99x75 px"):
        trained.load_weights(saved(tmp_path / "d.pth", oblong))
    for arguments in ({"interpolation": torch.zeros(2)}, {"input_size": "3x75x75"}):
        damaged = timms_checkpoint(state, None, **arguments)
        with pytest.raises(WeightsError, match=r"e\.pth: its trainer's arguments are damaged \("):
            trained.load_weights(saved(tmp_path / "e.pth", damaged))
    others = {"model": state, "args": argparse.Namespace(input_size=224, mean=0.5)}  # DeiT's
    assert trained.load_weights(saved(tmp_path / "f.pth", others)).data.image_size == 299


def test_classes_beside_the_weights_are_followed_or_said_not_to_be(tmp_path, state):
    for key, named in (
        ("class_to_idx", {"c": 2, "a": 0, "b": 1}),
        ("idx_to_class", {2: "c", 0: "a", 1: "b"}),
        ("classes", [*"abc"]),
    ):
        path = saved(tmp_path / "a.pth", {"state_dict": state, key: named})
        assert trained.load_weights(path).classes == [*"abc"]
    for odd in ({"a": 0, "b": 2}, [0, 1, 2], {}, {"a": torch.zeros(2)}):
        path = saved(tmp_path / "a.pth", {"state_dict": state, "class_to_idx": odd})
        found = trained.load_weights(path)
        assert found.classes is None and "its class_to_idx does not name" in found.remarks[0]
    assert trained.load_weights(saved(tmp_path / "a.pth", {"m": state, "classes": 3})).remarks == ()
    path = saved(tmp_path / "a.pth", {"state_dict": state, "classes": [*"abcd"]})
    with pytest.raises(WeightsError, match=r"a\.pth: has 3 outputs, but names for 4"):
        trained.load_weights(path)
    mapped = timms_checkpoint(state, None, class_map="map.txt")
    found = trained.load_weights(saved(tmp_path / "a.pth", mapped))
    assert "trainer's file map.txt: give that as --class-index" in found.remarks[0]


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod.module."]
)
def test_prefixes_are_left_out_and_said(tmp_path, state, prefix):
    found = trained.load_weights(saved(tmp_path / "a.pth", prefixed(state, prefix)))
    assert is_same(found, state)
    (line,) = found.remarks
    assert "is left out of its tensors' names" in line
    assert all(part in line for part in prefix.split(".") if part)


def test_a_lightning_checkpoint_is_read_without_what_is_beside_the_network(tmp_path, state):
    beside = {"criterion.weight": torch.ones(3), "train_metric.total": torch.tensor(1)}
    content = {"state_dict": prefixed(state, "model.") | beside, "loops": {}, "epoch": 3}
    found = trained.load_weights(saved(tmp_path / "last.ckpt", content))
    assert is_same(found, state)
    assert "2 tensors that are not the network's are passed over" in found.remarks[1]
    both = {"state_dict": prefixed(state, "model.") | prefixed(state, "ema_model.module.")}
    assert trained.load_weights(saved(tmp_path / "both.ckpt", both)).which == "ema"


def test_layers_that_were_compiled_have_their_names(tmp_path, state):
    odd = {name.replace("repeat.0.", "repeat.0._orig_mod."): value for name, value in state.items()}
    assert is_same(trained.load_weights(saved(tmp_path / "a.pth", odd)), state)


def test_cadenes_classifier_is_read_and_the_background_left_out(tmp_path, state):
    state = ends(1001)
    older = {name.replace("classif.", "last_linear."): value for name, value in state.items()}
    found = trained.load_weights(saved(tmp_path / "a.pth", older))
    assert torch.equal(found.model.classif.weight, state["classif.weight"][1:])
    assert torch.equal(found.model.classif.bias, state["classif.bias"][1:])
    assert found.classes == imagenet_names.synsets()
    assert "TensorFlow's background, is left out" in found.remarks[0]
    folder = write_folder(tmp_path / "timm's", state, label_names=None)
    found = trained.load_weights(str(folder))
    assert torch.equal(found.model.classif.weight, state["classif.weight"][1:])
    named = {"classes": json.dumps([f"c{i}" for i in range(1001)])}
    weights.write(tmp_path / "own.safetensors", state, named)
    assert trained.load_weights(str(tmp_path / "own.safetensors")).model.num_classes == 1001


# ---------------------------------------------------------------------- timm's folders and hub


def write_folder(folder: Path, state: State, **changes: Any) -> Path:
    """A folder as timm's save_for_hf writes it, with its own view and classes."""
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    view = {
        "input_size": [3, 75, 75],
        "crop_pct": VIEW["eval_crop"],
        "interpolation": VIEW["eval_interpolation"],
        "mean": VIEW["mean"],
        "std": VIEW["std"],
    }
    config = {
        "architecture": "inception_resnet_v2",
        "num_classes": 3,
        "label_names": SYNSETS,
        "pretrained_cfg": view,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_timm_folder_says_its_view_and_classes(tmp_path, state, monkeypatch):
    folder = write_folder(tmp_path / "a", state)

    def download(repository: str, file: str, revision: str | None = None) -> str:
        assert (repository, revision) == ("org/name", "main")
        if not (folder / file).exists():
            raise EntryNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    sources = ["local-dir:", "timm:local-dir:", "timm:hf-hub:", "hf-hub:", "hf_hub:"]
    for source in [str(folder)] + [
        s + (str(folder) if "dir" in s else "org/name@main") for s in sources
    ]:
        found = trained.load_weights(source)
        assert is_same(found, state)
        assert {key: getattr(found.data, key) for key in VIEW} == VIEW
        assert found.classes == SYNSETS


def test_a_hub_that_cannot_be_reached_gives_advice(monkeypatch):
    def download(*_arguments: object, **_options: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(WeightsError, match=r"^hf-hub:org/name: .*give the file's path instead"):
        weights.read("timm:hf-hub:org/name")


def test_what_a_folder_says_goes_before_its_weights_and_is_said(tmp_path, state):
    folder = write_folder(tmp_path / "a", state)
    told = {"classes": json.dumps(["a", "b", "c"]), "data": json.dumps(VIEW | {"eval_crop": 0.7})}
    weights.write(folder / "model.safetensors", state, told)
    found = trained.load_weights(str(folder))
    assert (found.classes, found.data.eval_crop) == (SYNSETS, 0.8)
    assert "differ in eval_crop, classes; config.json is followed" in found.remarks[0]


def test_a_file_of_a_folder_that_says_more_gets_a_remark(tmp_path, state):
    folder = write_folder(tmp_path / "a", state)
    (line,) = trained.load_weights(str(folder / "pytorch_model.bin")).remarks
    assert "config.json beside it" in line and f"give the folder, {folder}, " in line
    assert trained.load_weights(str(folder)).remarks == ()
    weights.write(folder / "model.safetensors", state, {"data": json.dumps(VIEW)})
    assert trained.load_weights(str(folder / "model.safetensors")).remarks == ()


def test_odd_configs_are_followed_or_refused(tmp_path, state):
    wide = state | {"classif.weight": torch.randn(4, 4), "classif.bias": torch.randn(4)}
    by_number = {"2": "c", "0": "a", "1": "b"}
    flat = {"architecture": "inception_resnet_v2", "input_size": [3, 75, 75], "labels": [*"abc"]}
    folder = write_folder(tmp_path / "dict", state, label_names=by_number)
    assert trained.load_weights(str(folder)).classes == [*"abc"]
    (folder / "config.json").write_text(json.dumps(flat))
    found = trained.load_weights(str(folder))
    assert (found.classes, found.data.image_size) == ([*"abc"], 75)
    assert found.data.mean == list(IMAGENET_DEFAULT_MEAN)  # timm's, where none is said
    offset = {"input_size": [3, 75, 75], "label_offset": 1}
    found = trained.load_weights(str(write_folder(tmp_path / "o", wide, pretrained_cfg=offset)))
    assert torch.equal(found.model.classif.weight, wide["classif.weight"][1:])
    for number, (changes, message) in enumerate(
        (
            ({"architecture": "resnet50"}, "is for resnet50"),
            ({"model_args": {"norm_eps": 1e-5}}, "asks for another norm_eps"),
            ({"global_pool": "max"}, "asks for another global_pool"),
            ({"label_names": {"0": "a", "2": "c"}}, "does not name every class"),
            ({"label_names": ["a"]}, "has 3 outputs, but names for 1"),
            ({"pretrained_cfg": {"input_size": 75}}, "what it says of its images is damaged"),
            ({"pretrained_cfg": [1]}, "damaged or not timm's"),
            ({"pretrained_cfg": {"input_size": [3, 30000, 30000]}}, "data.image_size"),
        )
    ):
        folder = write_folder(tmp_path / str(number), state, **changes)
        with pytest.raises(WeightsError, match=message):
            trained.load_weights(str(folder))
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"config\.json: damaged or not timm's"):
        trained.load_weights(str(folder))


# ---------------------------------------------------------------------- in programs


@pytest.fixture
def explosive(tmp_path, network) -> Path:
    """Weights that are finite, and whose logits are not."""
    state = copied(network.state_dict())
    state["classif.weight"][0] = 3e38
    told = {"blocks": json.dumps(BLOCKS), "classes": json.dumps(SYNSETS), "data": json.dumps(VIEW)}
    weights.write(tmp_path / "explosive.safetensors", state, told)
    return tmp_path / "explosive.safetensors"


def test_predict_says_which_logits_are_not_finite_and_prints_no_nan(tmp_path, explosive):
    photographs = programs.write_images(tmp_path / "images", ["a"], 2)
    for options in ((), ("--json",)):
        status, out, error = call(predict, photographs, "--weights", explosive, *options)
        assert status == 1 and "nan" not in out.lower()
        assert error.count("0.png: the network's logits of it are not finite") == 1
    lines = [json.loads(line) for line in out.splitlines()]
    assert [set(line) for line in lines] == [{"image", "error"}] * 2


def test_a_network_whose_logits_are_not_finite_is_not_exported(tmp_path, explosive):
    out = tmp_path / "out.safetensors"
    status, _, error = call(export, "--weights", explosive, "--format", "safetensors", "--out", out)
    assert status == 1 and "its logits of scikit-learn's photographs are not finite" in error
    assert not out.exists()


def test_validate_ends_with_the_first_image_whose_scores_are_not_finite(tmp_path, explosive):
    photographs = programs.write_images(tmp_path / "images", SYNSETS, 1)
    told = ("--weights", explosive, "--data", photographs, "--json", tmp_path / "result.json")
    status, out, error = call(validate, *told)
    assert (status, out) == (1, "")
    first = photographs / SYNSETS[0] / "0.png"
    assert f"its scores of 3 of 3 images are not finite, first of {first}" in error
    assert not (tmp_path / "result.json").exists()


def test_programs_take_and_name_the_weights_that_are_asked_for(tmp_path, network):
    state = network.state_dict()
    averaged = state | {"classif.bias": state["classif.bias"] + 1}
    content = timms_checkpoint(state, averaged, input_size=[3, 75, 75])
    path = saved(tmp_path / "last.pth.tar", content)
    photographs = programs.write_images(tmp_path / "images", SYNSETS, 1)
    told = ("--weights", path, "--data", photographs, "--mean", 0.1, 0.2, 0.3)
    status, out, error = call(validate, *told)
    assert status == 0, error
    assert f"weights  {path} (ema)" in out
    assert "75 px, crop 0.8975, bicubic, mean 0.1 0.2 0.3" in out
    assert f"note: {path}: its averaged weights are taken" in out
    out = tmp_path / "out.safetensors"
    options = ("--which", "raw", "--crop", 0.5, "--format", "safetensors", "--out", out)
    status, _, error = call(export, "--weights", path, *options)
    assert status == 0 and "its raw weights are taken" in error
    found = trained.load_weights(str(out))
    assert is_same(found, state) and (found.which, found.data.eval_crop) == ("raw", 0.5)
    status, _, error = call(validate, *told, "--std", 0, 1, 1)
    assert (status, error.count("\n")) == (1, 1) and "not possible (data.std" in error


def test_an_order_of_classes_that_is_a_guess_is_said_and_one_that_is_known_is_taken(
    tmp_path, network
):
    state, folders = network.state_dict(), ["c1", "c10", "c2"]
    photographs = programs.write_images(tmp_path / "images", folders, 1)
    plain = saved(tmp_path / "plain.pth", state)
    timms = saved(tmp_path / "timms.pth", timms_checkpoint(state, None, dataset=""))
    listed, natural = "3 outputs: c1, c10, c2", "3 outputs: c1, c2, c10"
    for path, options, order, is_said in (
        (plain, (), listed, True),
        (plain, ("--class-order", "alphabetical"), listed, False),
        (plain, ("--class-order", "natural"), natural, False),
        (timms, (), natural, False),
    ):
        told = ("--weights", path, "--data", photographs, "--image-size", 75, *options)
        status, out, error = call(validate, *told)
        assert status == 0, error
        assert order in out and ("their folders have two orders" in out) is is_said
    out = tmp_path / "out.safetensors"
    told = ("--image-size", 75, "--format", "safetensors", "--out", out)
    assert call(export, "--weights", timms, *told).status == 0
    assert trained.load_weights(str(out)).class_order == "natural"


def test_one_network_has_one_figure_through_every_form(tmp_path, network):
    state = network.state_dict()
    told = {"classes": SYNSETS, "data": VIEW, "blocks": BLOCKS}
    texts = {key: json.dumps(value) for key, value in told.items()}
    weights.write(tmp_path / "a.safetensors", state, texts)
    arguments = {
        "input_size": [3, VIEW["image_size"], VIEW["image_size"]],
        "crop_pct": VIEW["eval_crop"],
        "interpolation": VIEW["eval_interpolation"],
        "mean": VIEW["mean"],
        "std": VIEW["std"],
    }
    content = timms_checkpoint(state, prefixed(state, "module."), **arguments)
    config = small_meta.config(data={**VIEW, "train": "x", "val": "y"}, model={"blocks": BLOCKS})
    meta = small_meta.meta(7, config=config, classes=SYNSETS)
    checkpoint.save(tmp_path / "run" / "checkpoints", 7, {"ema": state, "model": state}, meta)
    sources = (
        ("--weights", tmp_path / "a.safetensors"),
        ("--weights", saved(tmp_path / "timms.pth.tar", content)),
        ("--weights", write_folder(tmp_path / "folder", state)),
        ("--run", tmp_path / "run"),
    )
    photographs = programs.write_images(tmp_path / "images", SYNSETS, 3)
    losses = []
    for number, source in enumerate(sources):
        out = tmp_path / f"{number}.json"
        status, _, error = call(validate, *source, "--data", photographs, "--json", out)
        assert status == 0, error
        losses.append(json.loads(out.read_text())["loss"])
    assert len(set(losses)) == 1 and losses[0] > 0


# ---------------------------------------------------------------------- what is refused


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(1),)), path)


def archive(path: Path) -> None:
    np.savez(path, weight=np.zeros(3))


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of TorchScript
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", torchscript, "is a TorchScript program: load it with torch.jit.load"),
        ("a.pt2", exported, "is a program of torch.export"),
        ("a.npz", archive, "is NumPy arrays"),
        ("a.pth", partial(torch.save, nn.Linear(2, 2)), "a whole pickled module"),
        ("a.onnx", b"\x08\x07onnx", "is an ONNX graph"),
        ("a.pb", b"\x0a\x07graph", "is a TensorFlow graph"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("a.safetensors", b"<!DOCTYPE html>", "is a web page"),
        ("a.tar.gz", b"\x1f\x8b\x08", "is packed by gzip: unpack it"),
        ("a.pth", b"", "damaged or not a PyTorch file"),
    ],
)
def test_other_forms_are_refused_by_their_names(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(f=path) if isinstance(content, partial) else content(path)
    with pytest.raises(WeightsError, match=f"{name}: .*{message}") as raised:
        weights.read(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("saved_model.pb", "is TensorFlow's SavedModel"),
        ("checkpoint", "give one, as FOLDER/model.ckpt-123"),
        (".metadata", "dcp_to_torch_save"),
        ("config.yaml", "is a run: give it as --run"),
        ("meta.json", "is a checkpoint of a run"),
        ("else", "is a folder without config.json"),
    ],
)
def test_other_folders_are_refused_by_what_they_are(tmp_path, name, message):
    (tmp_path / name).touch()
    with pytest.raises(WeightsError, match=message):
        weights.read(str(tmp_path))


def test_what_a_pickle_wants_beside_tensors_is_named(tmp_path, state):
    path = saved(tmp_path / "a.pth", {"state_dict": state, "when": Decimal(3)})
    message = r"a\.pth: not a file of tensors .*decimal\.Decimal.*nothing in it was run"
    with pytest.raises(WeightsError, match=message):
        weights.read(path)


def test_members_that_are_compressed_are_refused(tmp_path, network):
    buffer = io.BytesIO()
    torch.save({"conv2d_1a.conv.weight": torch.zeros(1000)}, buffer)
    (tmp_path / "a.pth").write_bytes(deflated(buffer.getvalue()))
    with pytest.raises(WeightsError, match=r"a\.pth: .*members are compressed"):
        weights.read(str(tmp_path / "a.pth"))


def assert_refused(path, network, state, message: str) -> None:
    """Weights are refused both as a network and to begin from."""
    with pytest.raises(WeightsError, match=message):
        trained.load_weights(path)
    with pytest.raises(WeightsError, match=message):
        finetune.load(network, state, None, [*"abc"], path)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.int64, torch.complex64])
def test_weights_that_are_no_floats_are_refused_by_name_and_type(tmp_path, network, kind):
    state = copied(network.state_dict())
    state["repeat.0.conv2d.weight"] = state["repeat.0.conv2d.weight"].to(kind)
    path = saved(tmp_path / "a.pth", state)
    message = rf"a\.pth: repeat\.0\.conv2d\.weight holds {str(kind)[6:]} numbers"
    assert_refused(path, network, state, message)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read_as_float32(tmp_path, network, kind):
    state = {
        name: value.to(kind) if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    found = trained.load_weights(saved(tmp_path / "a.pth", state))
    assert is_same(found, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def test_weights_that_are_not_finite_are_refused_also_to_begin_from(tmp_path, network):
    for value in (float("nan"), float("-inf")):
        state = copied(network.state_dict())
        state["mixed_5b.branch0.bn.running_var"][3] = value
        path = saved(tmp_path / "a.pth", state)
        message = r"mixed_5b\.branch0\.bn\.running_var holds numbers that are not finite"
        assert_refused(path, network, state, message)
    state["mixed_5b.branch0.bn.running_var"][3] = -1e-3
    path = saved(tmp_path / "a.pth", state)
    message = r"mixed_5b\.branch0\.bn\.running_var holds variances below zero"
    assert_refused(path, network, state, message)


def test_claims_of_more_than_is_stored_take_no_memory(tmp_path, network, monkeypatch):
    state = network.state_dict()
    vast = torch.empty(1).expand(10**9, 1536)
    with pytest.raises(WeightsError, match=r"classif\.weight has the shape \[1000000000, 1536\]"):
        trained.load_weights(saved(tmp_path / "a.pth", {**state, "classif.weight": vast}))
    counter = "conv2d_2a.bn.num_batches_tracked"
    with pytest.raises(WeightsError, match=rf"{counter} has the shape \[1000000000, 1536\]"):
        trained.load_weights(saved(tmp_path / "a.pth", {**state, counter: vast}))
    weights.write(tmp_path / "b.safetensors", state, {"blocks": f"[1, {10**9}, 1]"})
    with pytest.raises(WeightsError, match="says that it has"):
        trained.load_weights(str(tmp_path / "b.safetensors"))
    weights.write(tmp_path / "c.safetensors", state, {"data": '{"image_size": 30000}'})
    with pytest.raises(WeightsError, match=r"data\.image_size"):
        trained.load_weights(str(tmp_path / "c.safetensors"))


def test_odd_dicts_are_refused_in_one_line(tmp_path, network):
    state = network.state_dict()
    for content, message in (
        ({7: torch.zeros(3)}, "holds no state dict"),
        ({**state, "conv2d_1a.conv.weight": torch.zeros(32)}, "no conv2d_1a.conv.weight of 4 dim"),
        ({**state, "conv2d_1a.conv.weight": torch.zeros(32, 3, 3)}, "of 4 dim"),
        ({**state, "classif.weight": torch.tensor(1.0)}, "no classif.weight of 2 dim"),
        ({**state, "conv2d_2a.conv.weight": torch.zeros(32)}, "size mismatch"),
    ):
        with pytest.raises(WeightsError, match=message):
            trained.load_weights(saved(tmp_path / "a.pth", content))
    with pytest.raises(WeightsError, match=r"^file: classif\.weight is not a matrix"):
        finetune.load(network, {"classif.weight": torch.tensor(1.0)}, None, [*"abc"], "file")


def test_a_panic_of_safetensors_is_an_error_of_the_file(tmp_path, network, monkeypatch):
    class PanicException(BaseException):  # pyo3's is no Exception either
        pass

    def panic(*_arguments: object, **_options: object) -> None:
        raise PanicException("index out of range")

    weights.write(tmp_path / "a.safetensors", network.state_dict(), {})
    monkeypatch.setattr(safetensors, "safe_open", panic)
    with pytest.raises(WeightsError, match=r"a\.safetensors: damaged .*index out of range"):
        weights.read(str(tmp_path / "a.safetensors"))
