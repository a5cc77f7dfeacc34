"""Keras' and TF-slim's weights: their logits as TensorFlow computes them, from each of their files.

`data/record_networks.py` has recorded them.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
import small_meta
import torch
from calling import call
from drawn_weights import DATA, drawn, image, write_slim
from torch import Tensor

import validate
from irv2.network import weights
from irv2.network.forms import keras, tensorflow
from irv2.network.forms.base import State, WeightsError
from irv2.network.model import inception_resnet_v2
from irv2.run import checkpoint as run
from scripts import export

VARIABLES = {4: ("kernel", "bias"), 2: ("kernel", "bias"), 1: keras.BATCH_NORM[1:]}
SCOPE = "InceptionResnetV2"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((DATA / "networks.json").read_text())


def pixels(size: int) -> Tensor:
    return torch.from_numpy(image(size)).permute(0, 3, 1, 2)


def logits(state: State, size: int) -> np.ndarray:
    with torch.inference_mode():
        return weights.build_model(state, "file").eval()(pixels(size)).numpy()[0]


def assert_same(found: np.ndarray, expected: list[float]) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# ---------------------------------------------------------------------------------- Keras


@pytest.fixture(scope="module")
def layers(recorded) -> dict[str, dict[str, np.ndarray]]:
    """Keras' layers in the order of its Model.layers, with their variables."""
    found = {}
    for name, *shapes in recorded["keras"]["layers"]:
        names = VARIABLES[len(shapes[0])]
        found[name] = {n: drawn(f"{name}/{n}", shape) for n, shape in zip(names, shapes)}
    return found


def counted(layers: dict) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Layers as older .weights.h5 have them: classes counted in the order of Model.layers."""
    kinds, numbers = {4: "conv2d", 2: "dense", 1: "batch_normalization"}, {}
    for variables in layers.values():
        kind = kinds[max(values.ndim for values in variables.values())]
        number = numbers[kind] = numbers.get(kind, -1) + 1
        values = {str(i): value for i, value in enumerate(variables.values())}
        yield f"{kind}_{number}" if number else kind, values


@pytest.mark.parametrize("are_named", [True, False])
def test_keras_layers_give_keras_logits(recorded, layers, are_named):
    found = keras.Kinds.of(layers if are_named else dict(counted(layers)))
    assert_same(logits(keras.in_timms(found), 75), recorded["keras"]["logits"])


def test_keras_layers_of_a_later_model_of_the_session_are_counted_from_another_number(layers):
    later = {}
    for name, values in layers.items():
        kind, _, number = name.rpartition("_")
        if name in ("conv2d", "batch_normalization"):
            kind, number = name, "0"
        is_counted = kind in ("conv2d", "batch_normalization")
        later[f"{kind}_{int(number) + 203}" if is_counted else name] = values
    expected = keras.in_timms(keras.Kinds.of(layers))
    found = keras.in_timms(keras.Kinds.of(later))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def write_hdf5(path: Path, layers: dict, form: str, **attributes: str) -> Path:
    """A file as Keras 2 ("h5") or 3 ("vars", with or without names) writes it."""
    h5py = pytest.importorskip("h5py")
    places = layers if form == "h5" else dict(zip(dict(counted(layers)), layers.values()))
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        for (group, variables), name in zip(places.items(), layers):
            for number, (variable, values) in enumerate(variables.items()):
                place = f"{group}/{group}/{variable}:0"
                place = place if form == "h5" else f"layers/{group}/vars/{number}"
                file[place] = values
                if form == "named vars":
                    file[place].parent.attrs["name"] = name
        file["optimizer/vars/0"] = np.zeros((3, 3, 3, 3), np.float32)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["h5", "vars", "named vars"])
def test_keras_files_are_read(tmp_path, recorded, layers, form):
    config = {"config": {"layers": [{"config": {"batch_input_shape": [None, 75, 75, 3]}}]}}
    path = write_hdf5(tmp_path / "a.h5", layers, form, model_config=json.dumps(config))
    found = weights.read(str(path))
    expected = keras.in_timms(keras.Kinds.of(layers))
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[name], value) for name, value in expected.items())
    assert json.loads(found.metadata["data"]) == {"image_size": 75}
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.write(path, keras.WEIGHTS)
        archive.writestr(keras.CONFIG, json.dumps(config))
    again = weights.read(str(tmp_path / "a.keras"))
    assert again.remarks == found.remarks == []
    assert torch.equal(again.state["classif.weight"], expected["classif.weight"])
    assert again.metadata == found.metadata


def test_layers_of_keras_that_change_images_are_said():
    scale = {"class_name": "Rescaling", "config": {"scale": 1 / 255}}
    first = {"class_name": "InputLayer", "config": {"batch_shape": [None, 75, 75, 3]}}
    inner = {"class_name": "Functional", "config": {"layers": [scale, {"config": {}}]}}
    found = list(keras._layers({"config": {"layers": [first, inner]}}))
    assert json.loads(keras._size(found)["data"]) == {"image_size": 75}
    (line,) = keras._not_followed(found, Path("a.keras"))
    assert line.startswith("a.keras: its layers Rescaling are left out: ")
    assert keras._size([]) == {} and keras._not_followed([first], Path("a.keras")) == []


def test_keras_files_that_are_others_or_damaged_are_refused(tmp_path, layers):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    some = dict(list(layers.items())[:20])
    write_hdf5(path, some, "h5")
    with pytest.raises(WeightsError, match=r"a\.h5: not Keras' Inception-ResNet-v2"):
        weights.read(str(path))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(WeightsError, match=r"a\.h5: damaged or not Keras'"):
        weights.read(str(path))
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/dense/vars/0", (1 << 20, 1 << 10), "f4", compression="gzip")
    with pytest.raises(WeightsError, match=r"a\.h5: .*layers/dense/vars/0 is not stored plainly"):
        weights.read(str(path))
    with zipfile.ZipFile(tmp_path / "a.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(keras.WEIGHTS, bytes(1000))
    with pytest.raises(WeightsError, match=r"a\.keras: .*is compressed"):
        weights.read(str(tmp_path / "a.keras"))


def test_without_h5py_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(WeightsError, match=r"a\.h5: .*pip install -r requirements-keras\.txt"):
        weights.read(str(tmp_path / "a.h5"))


# ---------------------------------------------------------------------------------- TF-slim


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_slim(tmp_path_factory.mktemp("tensorflow") / "slim")


@pytest.mark.slow
def test_slims_checkpoint_gives_tensorflows_logits(recorded, checkpoint):
    found = weights.read(checkpoint)
    assert_same(logits(found.state, 299), recorded["slim"]["logits"])
    model = inception_resnet_v2(10, aux_logits=True, width=0.25).eval()
    model.load_state_dict(found.state)
    with torch.inference_mode():
        aux = model.aux(model._to_17x17(pixels(299)))
    assert_same(aux.numpy()[0], recorded["slim"]["aux_logits"])
    for name in (".index", ".data-00000-of-00001"):
        again = weights.read(checkpoint + name).state["classif.weight"]
        assert torch.equal(again, found.state["classif.weight"])


def test_a_checkpoint_of_version_1_is_read(recorded):
    shapes = dict(recorded["slim"]["variables"])
    found = tensorflow._version_1(str(DATA / "few.ckpt"))
    first = [name for name in shapes if name.startswith(f"{SCOPE}/Conv2d_1a_3x3/")]
    assert sorted(found) == sorted(first) and len(found) == 4  # and not the step, a whole number
    for name, values in found.items():
        assert np.array_equal(values, drawn(name, shapes[name]))
    with pytest.raises(WeightsError, match=r"few\.ckpt: not TF-slim's Inception-ResNet-v2"):
        weights.read(str(DATA / "few.ckpt"))


def test_moving_averages_are_taken_unless_raw_weights_are_asked_for(checkpoint, monkeypatch):
    raw = tensorflow._version_2(checkpoint)
    bias = f"{SCOPE}/Logits/Logits/biases"
    both = raw | {bias + tensorflow.AVERAGE: raw[bias] + 1}
    monkeypatch.setattr(tensorflow, "_version_2", lambda name: dict(both))
    for which, expected, kind in ((None, raw[bias] + 1, "ema"), ("raw", raw[bias], "raw")):
        found = weights.read(checkpoint, which)
        assert np.array_equal(found.state["classif.bias"].numpy(), expected)
        assert json.loads(found.metadata["result"]) == {"weights": kind}
        assert len(found.remarks) == 1


def test_one_flipped_bit_of_a_checkpoint_is_noticed(checkpoint, tmp_path):
    shutil.copy(checkpoint + ".index", tmp_path / "model.ckpt.index")
    values = bytearray(Path(checkpoint + ".data-00000-of-00001").read_bytes())
    values[1_000_001] ^= 1
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(values)
    with pytest.raises(WeightsError, match=r"InceptionResnetV2/.* does not match its checksum"):
        weights.read(str(tmp_path / "model.ckpt"))
    content = bytearray((DATA / "few.ckpt").read_bytes())
    content[900] ^= 1
    (tmp_path / "few.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"block \d+ does not match its checksum"):
        weights.read(str(tmp_path / "few.ckpt"))


def test_damaged_checkpoints_are_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorflow, "_check", lambda *_arguments: None)  # which anybody can write
    index = (DATA / "slim.ckpt.index").read_bytes()
    few = (DATA / "few.ckpt").read_bytes()
    rng = np.random.default_rng(0)
    for name, content in (("a.ckpt.index", index), ("few.ckpt", few)):
        path = tmp_path / name
        for _ in range(150):
            harmed = np.frombuffer(content, np.uint8).copy()
            harmed[rng.integers(len(harmed) - 8, size=rng.integers(1, 20))] = rng.integers(256)
            path.write_bytes(harmed.tobytes())
            with pytest.raises(WeightsError, match=r"few\.ckpt|a\.ckpt"):
                weights.read(str(path))


# ---------------------------------------------------------------------------------- both


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["Keras", "TF-slim"])
def test_their_networks_have_one_figure_through_every_form(origin, layers, checkpoint, tmp_path):
    theirs = write_hdf5(tmp_path / "a.h5", layers, "h5") if origin == "Keras" else checkpoint
    state = weights.read(str(theirs)).state
    count = len(state["classif.bias"])
    view = {"image_size": 75, "train": "x", "val": "y"}
    names = [f"n{i:08d}" for i in range(count)]
    photographs = programs.write_images(tmp_path / "images", names, 1)
    config = small_meta.config(data=view, model={"blocks": [10, 20, 9], "width": 0.25})
    meta = small_meta.meta(7, config=config, classes=names)
    run.save(tmp_path / "run" / "checkpoints", 7, {"ema": state, "model": state}, meta)
    told = ("--weights", theirs, "--image-size", 75)
    ours = tmp_path / "ours.safetensors"
    assert call(export, *told, "--format", "safetensors", "--out", ours).status == 0
    losses = []
    for source in (told, ("--weights", ours), ("--run", tmp_path / "run")):
        out = tmp_path / "result.json"
        status, _, error = call(validate, *source, "--data", photographs, "--json", out)
        assert status == 0, error
        losses.append(json.loads(out.read_text())["loss"])
    assert len(set(losses)) == 1 and losses[0] > 0
