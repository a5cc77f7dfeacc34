"""What a weights file says of itself, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irv2 import imagenet_names, trained, weights
from irv2.model import inception_resnet_v2
from irv2.weights import WeightsError


def written(path: Path, outputs: int, in_chans: int = 3, **metadata: str) -> str:
    model = inception_resnet_v2(outputs, in_chans, blocks=(1, 1, 1))
    weights.write(path, model.state_dict(), {"blocks": "[1, 1, 1]"} | metadata)
    return str(path)


def test_what_metadata_leaves_open_is_as_published(tmp_path) -> None:
    found = trained.of_weights(written(tmp_path / "a.safetensors", 1000))
    assert found.classes == imagenet_names.synsets()
    assert found.classes[0] == "n01440764" and imagenet_names.in_words("n01440764") == "tench"
    assert (found.which, found.step) == ("as published", None)
    keys = ("val", "image_size", "eval_crop", "eval_interpolation", "mean", "std")
    view = [None, 299, 0.8975, "bicubic", [0.5] * 3, [0.5] * 3]
    assert [found.data[key] for key in keys] == view
    assert trained.of_weights(written(tmp_path / "b.safetensors", 7)).classes is None


def test_metadata_go_before_that(tmp_path) -> None:
    told = {
        "classes": ["a", "b"],
        "data": {"image_size": 75},
        "result": {"weights": "raw", "step": 3},
    }
    texts = {key: json.dumps(value) for key, value in told.items()}
    found = trained.of_weights(written(tmp_path / "a.safetensors", 2, **texts))
    assert (found.classes, found.which, found.step) == (["a", "b"], "raw", 3)
    assert (found.data["image_size"], found.data["eval_crop"]) == (75, 0.8975)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 1}, "is for images of 1 channels, not for RGB"),
        ({"classes": '["a"]'}, "has 2 outputs, but names for 1"),
        ({"classes": '["a", '}, r"metadata is damaged \(classes\)"),
        ({"data": "[1]"}, r"metadata is damaged \(data\)"),
        ({"data": '{"image_size": "x"}'}, r"metadata is damaged \(data\)"),
        ({"data": '{"eval_crop": 0}'}, r"metadata is damaged \(data\)"),
        ({"classes": "[0, 1]"}, r"metadata is damaged \(classes\)"),
        ({"blocks": "[1, 1]"}, r"metadata is damaged \(blocks\)"),
        ({"result": '{"weights": 3}'}, r"metadata is damaged \(result\)"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, options, message) -> None:
    with pytest.raises(WeightsError, match=message):
        trained.of_weights(written(tmp_path / "a.safetensors", 2, **options))
