"""validate.py from the outside: exact counts against timm's own, and what it says of mistakes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import programs
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import validate
from irv2 import weights
from irv2.model import inception_resnet_v2


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of the two photographs scikit-learn ships, in three classes, of many sizes."""
    root = tmp_path_factory.mktemp("photographs")
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for k in range(9):
        image = images[k % 2].crop((10 * k, 7 * k, 250 + 40 * k, 400 - 20 * k))
        folder = root / f"class{k % 3}"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{k}.jpg", quality=90)
    return root


def call(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: object):
    """validate.py's main in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr("sys.argv", ["validate.py", *map(str, arguments)])
    status = validate.main()
    return status, *capsys.readouterr()


@dataclass(frozen=True)
class Peer:
    """timm's network with random weights, and what it makes of the photographs."""

    model: torch.nn.Module
    logits: torch.Tensor
    labels: torch.Tensor


@pytest.fixture(scope="module")
def peer(photographs: Path) -> Peer:
    """Logits and labels by timm's model and transform alone."""
    torch.manual_seed(0)
    model = timm.create_model("inception_resnet_v2", num_classes=3).eval()
    transform = timm.data.create_transform(
        (3, 299, 299),
        interpolation="bicubic",
        crop_pct=0.8975,
        mean=timm.data.IMAGENET_INCEPTION_MEAN,
        std=timm.data.IMAGENET_INCEPTION_STD,
    )
    images, labels = [], []
    for label, folder in enumerate(sorted(photographs.iterdir())):
        for path in sorted(folder.iterdir()):
            images.append(transform(Image.open(path).convert("RGB")))
            labels.append(label)
    with torch.inference_mode():
        return Peer(model, model(torch.stack(images)), torch.tensor(labels))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timms_weights_give_timms_counts_and_loss(
    photographs, peer, tmp_path, capsys, monkeypatch, suffix
) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(peer.model.state_dict(), path)
    else:
        safetensors.torch.save_file(peer.model.state_dict(), path)

    out = tmp_path / "result.json"
    status, stdout, stderr = call(
        capsys, monkeypatch, "--weights", path, "--data", photographs, "--json", out
    )
    assert status == 0, stderr
    result = json.loads(out.read_text())
    correct = int((peer.logits.argmax(1) == peer.labels).sum())
    assert 0 < correct < 9  # weights that are always right or wrong would show nothing
    assert result["top1_correct"] == correct
    assert result["top5_correct"] == result["images"] == 9
    loss = torch.nn.functional.cross_entropy(peer.logits, peer.labels).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert f"({correct} correct)" in stdout


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    programs.write_project(folder)
    config = ("--config", folder / "small.yaml", "train.max_steps=2")
    result = programs.run("train.py", *config)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_run_is_evaluated_as_train_did_on_any_number_of_ranks(run_directory, tmp_path) -> None:
    last = {e["weights"]: e for e in programs.log_lines(run_directory, "eval")}
    results = {}
    for which, ranks in (("ema", 1), ("ema", 2), ("raw", 1)):
        out = tmp_path / f"{which}{ranks}.json"
        done = programs.run(
            "validate.py", "--run", run_directory, "--which", which, "--json", out, ranks=ranks
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1") == 1
        results[which, ranks] = json.loads(out.read_text())
    one, two = results["ema", 1], results["ema", 2]
    for key in ("top1", "top5", "top1_correct", "top5_correct", "images", "weights"):
        assert one[key] == two[key]
    assert one["images"] == 12 and one["weights"] == "ema"
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert one["loss"] == pytest.approx(last["ema"]["loss"], rel=1e-6)
    assert results["raw", 1]["loss"] == pytest.approx(last["raw"]["loss"], rel=1e-6)


def test_best_weights_know_their_classes_and_view(run_directory, capsys, monkeypatch) -> None:
    best = run_directory / "best.safetensors"
    status, stdout, stderr = call(capsys, monkeypatch, "--weights", best)
    assert status == 0, stderr
    assert "75 px" in stdout and "12 of" in stdout


@pytest.fixture
def small_weights(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    state = inception_resnet_v2(3, blocks=(1, 1, 1)).state_dict()
    weights.write(path, state, {"blocks": "[1, 1, 1]"})
    return path


def test_mistakes_are_one_line_and_leave_no_result(
    photographs, small_weights, run_directory, tmp_path, capsys, monkeypatch
) -> None:
    out = tmp_path / "result.json"
    resnet = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet18").state_dict(), resnet)
    programs.write_images(tmp_path / "two", ["a", "b"], 1)
    programs.write_images(tmp_path / "bad", ["a", "b", "c"], 1)
    (tmp_path / "bad" / "b" / "0.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("--run", tmp_path / "nowhere"), "no checkpoint in it"),
        (("--run", run_directory, "--data", photographs), "3 unknown (class0, class1, class2)"),
        (("--weights", tmp_path / "nowhere.pth"), "no such weights file"),
        (("--weights", resnet), "not an Inception-ResNet-v2"),
        (("--weights", small_weights), "--data DIR is needed"),
        (("--weights", small_weights, "--data", tmp_path / "two"), "tells apart 3"),
        (("--weights", small_weights, "--data", tmp_path / "empty"), "no class folders"),
        (("--weights", small_weights, "--data", tmp_path / "bad"), "cannot be decoded"),
    ):
        status, _, error = call(capsys, monkeypatch, *arguments, "--json", out)
        assert status == 1 and message in error and error.count("\n") == 1, error
        assert not out.exists()
