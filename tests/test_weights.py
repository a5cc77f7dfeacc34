"""Weights files in and out: timm's own files, ours, what they say of themselves, and refusals."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from irv2.network import imagenet_names, weights
from irv2.network.forms.base import Weights, WeightsError
from irv2.network.model import inception_resnet_v2
from irv2.run import trained

BLOCKS = (1, 1, 1)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def timm_state() -> State:
    """The state of timm's network, shortened to one block a stack to keep the files small."""
    torch.manual_seed(0)
    peer = timm.create_model("inception_resnet_v2", num_classes=10)
    for name in ("repeat", "repeat_1", "repeat_2"):
        setattr(peer, name, getattr(peer, name)[:1])
    for buffer in peer.buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return dict(peer.state_dict())


def same(state: State, expected: State) -> bool:
    return state.keys() == expected.keys() and all(
        state[name].dtype == value.dtype and torch.equal(state[name], value)
        for name, value in expected.items()
    )


# ---------------------------------------------------------------------- files that load


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("timm.pth", torch.save),
        ("old.pth", partial(torch.save, _use_new_zipfile_serialization=False)),
        ("timm.safetensors", safetensors.torch.save_file),
    ],
)
def test_timm_files_load(tmp_path, timm_state, name, save):
    path = tmp_path / name
    save(timm_state, path)
    state, metadata, _ = weights.read(str(path))
    assert metadata == {}
    model = weights.build_model(state, str(path), BLOCKS)
    assert same(model.state_dict(), timm_state)


def test_what_write_stores_read_returns(tmp_path):
    """Also views of one storage (merged heads), counters and half precision."""
    whole = torch.randn(6, 4)
    state = {
        "head.0": whole[:2],
        "head.1": whole[2:],
        "transposed": whole.t(),
        "again": whole,
        "half": whole.bfloat16(),
        "counter": torch.tensor(2**40),
    }
    metadata = {"image_size": "299", "classes": '["tench", "goldfish"]'}
    path = tmp_path / "model.safetensors"
    weights.write(path, state, metadata)
    read, read_metadata, _ = weights.read(str(path))
    assert same(read, state)
    assert read_metadata == metadata
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_write_stores_a_model_under_timm_names(tmp_path, timm_state):
    model = inception_resnet_v2(num_classes=10, blocks=BLOCKS)
    model.load_state_dict(timm_state)
    path = tmp_path / "model.safetensors"
    weights.write(path, model.state_dict(), {})
    assert same(safetensors.torch.load_file(path), timm_state)


def test_nested_state_dict_is_unwrapped(tmp_path):
    state = {"conv2d_1a.conv.weight": torch.randn(3)}
    path = tmp_path / "nested.pth"
    for key in ("state_dict", "model"):
        torch.save({key: state, "epoch": 3, "arch": "inception_resnet_v2"}, path)
        assert same(weights.read(str(path))[0], state), key


def test_model_is_built_for_the_classes_and_channels_of_a_state():
    trained = inception_resnet_v2(num_classes=7, in_chans=1, blocks=(2, 1, 1), width=0.25)
    model = weights.build_model(trained.state_dict(), "file", (2, 1, 1))
    assert same(model.state_dict(), trained.state_dict())
    assert model.eval()(torch.zeros(1, 1, 75, 75)).shape == (1, 7)


def test_auxiliary_head_of_a_state_is_left_out():
    state = inception_resnet_v2(
        num_classes=10, aux_logits=True, blocks=BLOCKS, width=0.25
    ).state_dict()
    assert any(name.startswith("aux.") for name in state)
    expected = {name: value for name, value in state.items() if not name.startswith("aux.")}
    assert same(weights.build_model(state, "file", BLOCKS).state_dict(), expected)


# ---------------------------------------------------------------------- files that are refused


class CreatesFile:
    """A pickle that creates a file when it is loaded as pickles usually are."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    created = tmp_path / "created"
    for name in ("evil.pth", "evil.pt", "evil.bin"):
        torch.save({"a.weight": torch.zeros(1), "b": CreatesFile(created)}, tmp_path / name)
        with pytest.raises(WeightsError, match=name):
            weights.read(str(tmp_path / name))
        assert not created.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert created.exists(), "the pickle was harmless: the test proves nothing"


def test_missing_file_is_named(tmp_path):
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(WeightsError, match=f"{name}: no such weights file"):
            weights.read(str(tmp_path / name))


def test_directory_is_no_weights_file(tmp_path):
    with pytest.raises(WeightsError, match=r"a folder without config\.json and model\.safetensors"):
        weights.read(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "save"),
    [("cut.pth", torch.save), ("cut.safetensors", safetensors.torch.save_file)],
)
def test_truncated_file_is_named(tmp_path, name, save):
    path = tmp_path / name
    save({"a.weight": torch.randn(1000), "b.weight": torch.randn(1000)}, path)
    content = path.read_bytes()
    for kept in (0.0, 0.1, 0.5, 0.99):
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(WeightsError, match=name):
            weights.read(str(path))


def test_a_flipped_bit_in_pytorchs_own_file_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(2000)) + 1000] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["weight"].any()  # PyTorch takes it as it is
    with pytest.raises(WeightsError, match=r"a\.pth: .* does not match its checksum"):
        weights.read(str(path))


def test_file_without_a_state_dict_is_named(tmp_path):
    path = tmp_path / "other.pth"
    for content in ([torch.zeros(1)], {"epoch": 3}, {"state_dict": {"lr": 0.1}}, torch.zeros(2), 5):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=r"other\.pth: holds no state dict"):
            weights.read(str(path))


def test_error_without_a_message_still_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    path.write_bytes(b"x")

    def fail(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(WeightsError, match=r"model\.pth"):
        weights.read(str(path))


def test_another_architecture_is_refused():
    state = timm.create_model("resnet18").state_dict()
    with pytest.raises(WeightsError, match=r"resnet18\.pth: not an Inception-ResNet-v2"):
        weights.build_model(state, "resnet18.pth")


def test_entry_of_another_shape_is_refused_by_name(timm_state):
    for name, shape in (("classif.bias", (11,)), ("mixed_5b.branch0.conv.weight", (96, 192, 3, 3))):
        state = {**timm_state, name: torch.zeros(shape)}
        with pytest.raises(WeightsError, match=rf"model\.pth: .*size mismatch.*{name}"):
            weights.build_model(state, "model.pth", BLOCKS)


def test_incomplete_state_is_refused_by_name(timm_state):
    for name in ("conv2d_1a.bn.weight", "repeat.0.branch1.0.conv.weight"):
        state = {key: value for key, value in timm_state.items() if key != name}
        with pytest.raises(WeightsError, match=rf'model\.pth: .*Missing key.*"{name}"'):
            weights.build_model(state, "model.pth", BLOCKS)


def test_state_that_lost_its_last_block_is_no_smaller_network(timm_state):
    with pytest.raises(WeightsError, match=r"Missing key.*repeat\.1\."):
        weights.build_model(timm_state, "model.pth", (2, 1, 1))


def test_unknown_entry_is_refused_by_name(timm_state):
    state = {**timm_state, "stem.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r'model\.pth: .*Unexpected key.*"stem\.weight"'):
        weights.build_model(state, "model.pth", BLOCKS)


# ---------------------------------------------------------------------- timm's hub


def test_timm_source_asks_for_pretrained_weights(monkeypatch):
    asked, model = [], torch.nn.Linear(2, 3)
    model.pretrained_cfg = {"input_size": (3, 331, 331), "mean": (0.1, 0.2, 0.3)}

    def create_model(name, **options):
        asked.append((name, options.get("pretrained")))
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    state, metadata, _ = weights.read("timm:inception_resnet_v2.tf_in1k")
    assert asked == [("inception_resnet_v2.tf_in1k", True)]
    assert same(state, dict(model.state_dict()))
    view = json.loads(metadata["data"])
    assert (view["image_size"], view["mean"]) == (331, [0.1, 0.2, 0.3])


ADVICE = "give the file's path instead"


@pytest.mark.parametrize("error", [OSError("no route to host\nretried 5 times"), TimeoutError()])
def test_timm_source_without_a_network_gives_advice(monkeypatch, error):
    def create_model(*_args, **_options):
        raise error

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(WeightsError, match=rf"^timm:some_name: .*{ADVICE}") as raised:
        weights.read("timm:some_name")
    assert "\n" not in str(raised.value)
    assert "()" not in str(raised.value), "an error without a message is told by its name"


def test_unknown_timm_name_gives_advice():
    """timm refuses the name before it would reach for the network."""
    with pytest.raises(WeightsError, match=rf"^timm:no_such_network: .*{ADVICE}"):
        weights.read("timm:no_such_network")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "best.safetensors"
    weights.write(path, {"weight": torch.zeros(3)}, {})

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        weights.write(path, {"weight": torch.ones(3)}, {})
    assert not weights.read(str(path))[0]["weight"].any()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------------- what a file says of itself


def opened(path: Path, state: State, **metadata: str) -> trained.Trained:
    """Load a file that holds this small network and metadata."""
    weights.write(path, state, {"blocks": "[1, 1, 1]"} | metadata)
    return trained.load_weights(str(path))


def test_what_metadata_leaves_open_is_as_published(tmp_path, timm_state):
    path = tmp_path / "a.safetensors"
    found = opened(path, inception_resnet_v2(1000, blocks=BLOCKS, width=0.25).state_dict())
    assert found.classes == imagenet_names.synsets()
    assert found.classes[0] == "n01440764" and imagenet_names.in_words(["n01440764"]) == ["tench"]
    assert (found.which, found.step) == ("as published", None)
    assert found.images is None
    keys = ("image_size", "eval_crop", "eval_interpolation", "mean", "std")
    view = [299, 0.8975, "bicubic", [0.5] * 3, [0.5] * 3]
    assert [getattr(found.data, key) for key in keys] == view
    assert opened(path, timm_state).classes is None


def test_metadata_go_before_that(tmp_path, timm_state):
    classes = list("abcdefghij")
    told = {
        "classes": classes,
        "data": {"image_size": 75, "cache_dir": "/scratch"},
        "result": {"weights": "raw", "step": 3},
    }
    texts = {key: json.dumps(value) for key, value in told.items()}
    found = opened(tmp_path / "a.safetensors", timm_state, **texts)
    assert (found.classes, found.which, found.step) == (classes, "raw", 3)
    assert (found.data.image_size, found.data.eval_crop) == (75, 0.8975)
    assert found.data.cache_dir is None  # of the machine that wrote the file


def test_files_that_contradict_themselves_are_refused(monkeypatch, timm_state):
    grey = inception_resnet_v2(2, in_chans=1, blocks=BLOCKS, width=0.25).state_dict()
    for state, told, message in (
        (grey, {}, "is for images of 1 channels, not for RGB"),
        (timm_state, {"classes": '["a"]'}, "has 10 outputs, but names for 1"),
        (timm_state, {"classes": '["a", '}, r"metadata is damaged \(classes"),
        (timm_state, {"data": "[1]"}, r"metadata is damaged \(data"),
        (timm_state, {"data": '{"image_size": "x"}'}, r"metadata is damaged \(data\.image_size"),
        (timm_state, {"data": '{"eval_crop": 0}'}, r"metadata is damaged \(data\.eval_crop"),
        (timm_state, {"classes": "[0, 1]"}, r"metadata is damaged \(classes"),
        (timm_state, {"blocks": '["1", 1, 1]'}, r"metadata is damaged \(blocks"),
        (timm_state, {"blocks": "[1, 1]"}, r"metadata is damaged \(blocks"),
        (timm_state, {"result": '{"weights": 3}'}, r"metadata is damaged \(result"),
    ):
        read = Weights(state, {"blocks": "[1, 1, 1]"} | told)
        monkeypatch.setattr(weights, "read", lambda *_asked, read=read: read)
        with pytest.raises(WeightsError, match=rf"^a\.safetensors: .*{message}"):
            trained.load_weights("a.safetensors")
