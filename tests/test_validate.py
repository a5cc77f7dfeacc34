"""validate.py from the outside: exact counts against timm's own, and what it says of mistakes."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import programs
import pytest
import safetensors.torch
import timm
import torch
from calling import call
from PIL import Image
from sklearn.datasets import load_sample_images
from small_weights import SYNSETS, write_small_weights

import validate
from data.protocols import PROTOCOLS
from data.sources import FolderSource
from data.transforms import EvalView, decode
from data.workers import Workers
from irv2 import evaluation, result_files, results, scoring
from irv2.network import imagenet_names, weights
from irv2.network.model import inception_resnet_v2
from irv2.report import reference
from irv2.run import checkpoint, trained
from irv2.training.distributed import World
from irv2.training.metrics import Predictions, Scored

pytestmark = pytest.mark.slow

ALONE = World(0, 1, torch.device("cpu"))
CLASSES = 8


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of the two photographs scikit-learn ships, in eight classes, of many sizes."""
    root = tmp_path_factory.mktemp("photographs")
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for k in range(17):
        image = images[k % 2].crop((10 * k, 7 * k, 250 + 20 * k, 400 - 10 * k))
        folder = root / f"class{k % CLASSES}"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{k}.jpg", quality=90)
    return root


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
    model = timm.create_model("inception_resnet_v2", num_classes=CLASSES)
    model.classif.weight.data *= 30  # logits of random weights are close together
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
    batch = torch.stack(images)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(batch)  # takes these images' statistics, so that they look different to the network
        logits = model.eval()(batch)
    return Peer(model, logits, torch.tensor(labels))


def validated(folder: Path, *arguments: object) -> tuple[dict, str]:
    """The result that validate.py leaves with --json in a folder, and its output."""
    status, stdout, stderr = call(validate, *arguments, "--json", folder / "result.json")
    assert status == 0, stderr
    return json.loads((folder / "result.json").read_text()), stdout


def test_storage_that_hangs_is_told_with_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(FolderSource, "read", lambda *_: time.sleep(600))
    data = programs.write_images(tmp_path / "data", SYNSETS, 1)
    options = ("--weights", write_small_weights(tmp_path), "--data", data, "--workers", 1)
    status, _, told = call(validate, *options)
    assert status == 1
    assert f"timed out after 1 seconds at {data / SYNSETS[0] / '0.png'};" in told


def test_timms_weights_give_timms_counts_and_loss(photographs, peer, tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(peer.model.state_dict(), path)
    result, stdout = validated(tmp_path, "--weights", path, "--data", photographs)
    shares = timm.utils.accuracy(peer.logits, peer.labels, topk=(1, 5))
    correct = [round(share.item() * 17 / 100) for share in shares]
    assert 0 < correct[0] < correct[1] < 17  # weights always right or wrong would show nothing
    assert [result["top1_correct"], result["top5_correct"]] == correct
    assert result["images"] == 17
    loss = torch.nn.functional.cross_entropy(peer.logits, peer.labels).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert f"({correct[0]} correct; 95 % interval" in stdout


def test_every_images_logits_are_timms(photographs, peer, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(peer.model.state_dict(), path)
    network = trained.load_weights(str(path))
    asked = evaluation.prepare(network, {"val": str(photographs)}, evaluation.LabelFiles())
    batches = asked.batches(5, Workers(0), ALONE)
    scored = list(scoring.scored(network.model, batches, scoring.EvalOptions()))
    ours = torch.cat([batch.scores for batch in scored])
    assert [index for batch in scored for index in batch.indices] == list(range(17))
    error = (ours - peer.logits).abs().amax(1) / peer.logits.abs().amax(1)
    assert error.max() <= 1e-5
    assert peer.logits.std(0).min() > 0.01  # images differ


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    programs.write_project(folder)
    config = ("--config", folder / "small.yaml", "train.max_steps=2")
    result = programs.run("train.py", *config)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_run_is_evaluated_as_train_did(run_directory, tmp_path) -> None:
    last = {e["weights"]: e for e in programs.log_lines(run_directory, "eval")}
    for which in ("ema", "raw"):
        out = tmp_path / f"{which}.json"
        asked = ("--run", run_directory, "--which", which, "--json", out)
        done = programs.run("validate.py", *asked, as_user=which == "ema")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1 ") == 1
        result = json.loads(out.read_text())
        assert result["images"] == 12 and result["weights"] == which
        assert result["loss"] == pytest.approx(last[which]["loss"], rel=1e-6)


def test_best_weights_know_their_classes_and_view(run_directory, tmp_path) -> None:
    best = run_directory / "best.safetensors"
    _, stdout = validated(tmp_path, "--weights", best)
    assert "75 px" in stdout and "12 of" in stdout


def patches() -> list[np.ndarray]:
    """Sixteen parts of the photographs, as a network sees images."""
    return [
        pixels[y : y + 225 : 3, x : x + 225 : 3].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        for pixels in load_sample_images().images
        for y in (0, 200)
        for x in (0, 100, 200, 400)
    ]


def write_small(path: Path, classes: list[str], seed: int = 0) -> Path:
    """A small network of random weights that tells images apart, with its classes and view."""
    torch.manual_seed(seed)
    model = inception_resnet_v2(len(classes), blocks=(1, 1, 1), width=0.25, bn_momentum=1.0)
    with torch.no_grad():
        model.train()(torch.stack([torch.from_numpy(part) for part in patches()]))
        model.classif.weight *= 30
    view = {"image_size": 75, "eval_crop": 1.0}
    metadata = {"blocks": [1, 1, 1], "classes": classes, "data": view}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    weights.write(path, model.state_dict(), texts)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small networks for the photographs."""
    folder = tmp_path_factory.mktemp("small")
    classes = [f"class{i}" for i in range(CLASSES)]
    return [write_small(folder / f"{seed}.safetensors", classes, seed) for seed in range(3)]


def test_counts_do_not_depend_on_ranks_batches_or_workers(photographs, small, tmp_path) -> None:
    results = []
    for ranks, batch, workers in ((1, 64, 0), (2, 4, 1), (3, 1, 0)):
        out = tmp_path / f"{len(results)}.json"
        options = ("--batch", batch, "--workers", workers, "--json", out, "--report", tmp_path)
        place = ("--weights", small[0], "--data", photographs)
        done = programs.run("validate.py", *place, *options, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1 ") == 1
        results.append(json.loads(out.read_text()))
        with gzip.open(tmp_path / "predictions.csv.gz", "rt") as file:
            rows = list(csv.DictReader(file))
        assert [Path(row["image"]).name for row in rows] == image_names(photographs)
        results[-1]["first"] = [row["class_1"] for row in rows]
    losses = [result.pop("loss") for result in results]
    assert all(result == results[0] for result in results)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert 0 < results[0]["top1_correct"] < results[0]["images"] == 17
    assert len(set(results[0]["first"])) > 1


def image_names(folder: Path) -> list[str]:
    return [path.name for sub in sorted(folder.iterdir()) for path in sorted(sub.iterdir())]


def scores_of(path: Path, folder: Path) -> torch.Tensor:
    """Probabilities by plain means: [17, 8]."""
    network = trained.load_weights(str(path)).model.eval()
    view = EvalView(75, 1.0, "bicubic")
    rows = []
    source = FolderSource(folder)
    for index in range(len(source)):
        out = np.empty((75, 75, 3), np.uint8)
        view(decode(source.read(index)[0]), 0, index, out)
        x = torch.from_numpy(out).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            rows.append(network(x).softmax(1))
    return torch.cat(rows)


def test_several_networks_their_ensemble_and_comparisons(photographs, small, tmp_path) -> None:
    pages, place = tmp_path / "pages", ("--weights", *small, "--data", photographs)
    found, stdout = validated(tmp_path, *place, "--compare", "--ensemble", "--report", pages)
    each = [scores_of(path, photographs) for path in small]
    labels = torch.tensor([FolderSource(photographs).read(i)[1] for i in range(17)])
    right = [p.argmax(1) == labels for p in (*each, torch.stack(each).mean(0))]
    assert [r["top1_correct"] for r in found["results"]] == [int(r.sum()) for r in right]
    assert [r["weights"] for r in found["results"]][3:] == ["mean softmax"]
    assert len(found["comparisons"]) == 6
    second = found["comparisons"][1]  # the first network against the third
    assert (second["first"], second["second"]) == (str(small[0]), str(small[2]))
    assert second["only_first"] == int((right[0] & ~right[2]).sum())
    assert second["only_second"] == int((right[2] & ~right[0]).sum())
    assert stdout.count("McNemar's p") == 6 and "ensemble of 3" in stdout
    assert [(pages / str(n) / "index.html").exists() for n in (1, 2, 3, 4)] == [True] * 4


@pytest.mark.parametrize("protocol", ["flip", "paper-12"])
def test_the_softmax_is_averaged_over_views(photographs, small, protocol, tmp_path) -> None:
    network = trained.load_weights(str(small[1])).model.eval()
    view = PROTOCOLS[protocol].view(75, 1.0, "bicubic")
    source = FolderSource(photographs)
    losses = []
    for index in range(len(source)):
        encoded, label = source.read(index)
        out = np.empty(view.shape, np.uint8)
        view(decode(encoded), 0, index, out)
        views = torch.from_numpy(out.reshape(-1, 75, 75, 3)).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            shares = network(torch.cat([views, views.flip(3)])).softmax(1)
        losses.append(-shares.mean(0)[label].log().item())
    for batch in (5, 64):
        options = ("--protocol", protocol, "--batch", batch)
        place = ("--weights", small[1], "--data", photographs)
        result, _ = validated(tmp_path, *place, *options)
        assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_networks_may_have_images_and_views_of_their_own(photographs, small, tmp_path) -> None:
    few = tmp_path / "few"
    for k, folder in enumerate(sorted(photographs.iterdir())):
        (few / folder.name).mkdir(parents=True)
        shutil.copy(sorted(folder.iterdir())[0], few / folder.name / f"{k}.jpg")
    state, metadata, _ = weights.read(str(small[0]))
    paths = []
    for name, val, size in (("a", photographs, 75), ("b", few, 79)):
        data = json.dumps({"val": str(val), "image_size": size, "eval_crop": 1.0})
        paths.append(tmp_path / f"{name}.safetensors")
        weights.write(paths[-1], state, {**metadata, "data": data})
    pages = tmp_path / "pages"
    found, stdout = validated(tmp_path, "--weights", *paths, "--report", pages)
    assert [r["images"] for r in found["results"]] == [17, 8]
    assert f"{paths[1]}: 8 of {few}" in stdout and f"{paths[1]}: timm, 79 px" in stdout
    assert (pages / "2" / "index.html").exists()
    status, _, stderr = call(validate, "--weights", *paths, "--compare")
    assert status == 1 and "have other images or classes" in stderr


def test_where_results_cannot_go_is_told_before_the_first_image(
    photographs, small, tmp_path, monkeypatch
) -> None:
    def batches(*_arguments: object) -> None:
        pytest.fail("an image is asked for")

    monkeypatch.setattr(evaluation.Evaluation, "batches", batches)
    file = tmp_path / "file"
    file.touch()
    for options, message in (
        (("--json", tmp_path), "is a folder; --json wants the name of a file"),
        (("--report", file), "cannot be written to"),
        (("--json", file / "out.json"), "cannot be written to"),
    ):
        place = ("--weights", small[0], "--data", photographs)
        status, _, stderr = call(validate, *place, *options)
        assert status == 1 and message in stderr and stderr.count("\n") == 1, stderr


def test_all_checkpoints_of_a_run_and_their_average(run_directory, tmp_path) -> None:
    state = checkpoint.load(run_directory / "checkpoints" / "step-000000002")
    other = tmp_path / "run"
    shutil.copytree(run_directory, other)
    moved = {
        part: {name: value + 1 if name == "classif.bias" else value for name, value in t.items()}
        for part, t in state.parts.items()
    }
    checkpoint.save(
        other / "checkpoints",
        4,
        moved,
        {**state.meta, "step": 4, "images_seen": 2 * state.meta["images_seen"]},
    )
    found, _ = validated(tmp_path, "--run", other, "--all")
    assert [r["step"] for r in found["results"]] == [2, 4]
    networks = trained.load_checkpoints(other, "ema", print)
    mean = trained.average(networks)
    expected = (state.parts["ema"]["classif.bias"] + moved["ema"]["classif.bias"]) / 2
    assert torch.equal(mean.model.state_dict()["classif.bias"], expected)
    status, stdout, _ = call(validate, "--run", other, "--average", "2")
    assert status == 0 and "mean of 2 (steps 2 to 4)" in stdout
    status, _, stderr = call(validate, "--run", other, "--average", "3")
    assert status == 1 and "it has 2; train with a larger checkpoint.keep" in stderr


def test_published_results_stand_beside_those_of_the_same_images(tmp_path, monkeypatch) -> None:
    """As if ImageNet had 40 classes, each with a validation image, of which the network knows."""
    synsets = imagenet_names.synsets()[:40]
    monkeypatch.setattr(imagenet_names, "synsets", lambda: synsets)
    rng = np.random.default_rng(0)
    for i, synset in enumerate(synsets):
        (tmp_path / "val" / synset).mkdir(parents=True)
        pixels = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        pixels.save(tmp_path / "val" / synset / f"ILSVRC2012_val_{40 - i:08d}.png")
    network = write_small(tmp_path / "net.safetensors", synsets)
    entry = {"protocol": "timm", "top1": 50.0, "top5": 0.5, "source": "a paper"}
    published = [
        {"name": "all", "labels": "imagenet", "images": 40, **entry},
        {"name": "other", "labels": "imagenet", "images": 39, **entry},
        {"name": "listed", "labels": "imagenet", "images": 37, **entry},
        {"name": "real", "labels": "real", "images": 2, **entry},
        {"name": "few", "labels": "imagenet", "images": 40, "classes": "few.txt", **entry},
        {"name": "others", "labels": "imagenet", "images": 40, "classes": "others.txt", **entry},
    ]
    few = synsets[3:33]
    (tmp_path / "few.txt").write_text("".join(f"{name}\n" for name in ["# a paper", *few[::-1]]))
    (tmp_path / "others.txt").write_text("\n".join(synsets[4:34]))
    for i in range(40):  # 40 images in 30 folders, as ImageNet-A has 200
        folder = tmp_path / "few" / few[i % 30]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(next((tmp_path / "val" / synsets[i]).iterdir()), folder / f"{i}.png")
    (tmp_path / "reference.yaml").write_text(json.dumps(published))
    (tmp_path / "list").write_text("1\n5\n40\n")
    listed = [[] for _ in range(40)]
    listed[0], listed[4] = [39, 3], [17]
    (tmp_path / "real.json").write_text(json.dumps(listed))
    place = ("--weights", network, "--data", tmp_path / "val")
    for options, name, images in (
        ((), "all", 40),
        (("--exclude", tmp_path / "list"), "listed", 37),
        (("--real", tmp_path / "real.json"), "real", 2),
        (("--subset", tmp_path / "list"), None, 3),
        (("--data", tmp_path / "few", "--class-index", tmp_path / "few.txt"), "few", 40),
    ):
        options = (*options, "--reference", tmp_path / "reference.yaml")
        result, stdout = validated(tmp_path, *place, *options)
        assert result["images"] == images
        assert [r["name"] for r in result["references"]] == ([name] if name else [])
        if name:
            (reference,) = result["references"]
            difference = result["top1_correct"] - images // 2
            assert reference["top1_difference"] == difference
            low, high = result["top1_interval"]
            assert reference["top1_within"] == (low <= 50 <= high)
            assert f"{name}: top-1 50 %: {difference:+,} images" in stdout


REFERENCE = {
    **{"name": "a", "labels": "imagenet", "protocol": "timm", "images": 50, "top1": 80.0},
    **{"top5": 95, "source": "a paper"},
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: 1", "valid list"),
        ("- &a [*a]", "no anchors"),
        ("[" * 30_000, "nested too deep"),
        ("- " * 40_000, "longer than 32,000 characters"),
        (json.dumps([{**REFERENCE, "top1": "80"}]), "0: top1: "),
        (json.dumps([{**REFERENCE, "top5": 101}]), "0: top5: "),
        (json.dumps([{**REFERENCE, "images": True}]), "0: images: "),
        (json.dumps([REFERENCE, {"name": "b"}]), "1: labels: "),
        (json.dumps([{**REFERENCE, "more": 1}]), "0: more: "),
    ],
)
def test_a_list_of_references_of_wrong_values_is_refused(tmp_path, content, words) -> None:
    path = tmp_path / "reference.yaml"
    path.write_text(json.dumps([REFERENCE]))
    assert reference.read(path)[0].top5 == 95
    path.write_text(content)
    with pytest.raises(reference.PublishedError, match=f"{path}: not a list .*{words}") as caught:
        reference.read(path)
    assert "\n" not in str(caught.value)


def test_the_projects_own_references_are_readable() -> None:
    found = reference.read(programs.ROOT / "configs" / "reference.yaml")
    assert {each.protocol for each in found} <= set(PROTOCOLS)
    published = {(r.labels, r.name): (r.top1, r.top5) for r in found}
    assert published["imagenet", "timm, inception_resnet_v2.tf_in1k"] == (80.434, 95.312)
    errors = [(round(100 - r.top1, 1), round(100 - r.top5, 1)) for r in found if "paper" in r.name]
    few = {r.name[-10:]: (len(r.classes), r.images, r.top1, r.top5) for r in found if r.classes}
    assert few == {"ImageNet-A": (200, 7500, 16.467, 44.680),
                   "ImageNet-R": (200, 30_000, 44.067, 57.987)}  # fmt: skip
    assert errors == [(19.9, 4.9), (18.7, 4.1), (17.8, 3.7), (16.4, 3.1)]


def test_fast_is_close(photographs, small, tmp_path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler for torch.compile")
    place = ("--weights", small[0], "--data", photographs)
    (record, _), (fast, _) = (validated(tmp_path, *place, *speed) for speed in ((), ("--fast",)))
    assert (record["precision"], fast["precision"]) == ("fp32", "fast")
    assert abs(fast["top1_correct"] - record["top1_correct"]) <= 1
    assert fast["loss"] == pytest.approx(record["loss"], rel=0.05)
    assert fast["loss"] != record["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--run", "r", "--all", "--average", "2"), "one of them"),
        (("--weights", "w", "--all"), "--run DIR"),
        (("--weights", "w", "--ensemble"), "want several networks"),
        (
            ("--weights", "w", "--protocol", "slim", "--crop", "0.9"),
            "do not go with --protocol slim",
        ),
        (("--run", "r", "--average", "1"), "at least 2"),
        (("--weights", "w", "--protocol", "best"), "invalid choice"),
    ],
)
def test_options_that_do_not_go_together(options, message) -> None:
    status, _, stderr = call(validate, *options)
    assert status == 2 and message in stderr


@pytest.fixture
def small_weights(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    state = inception_resnet_v2(3, blocks=(1, 1, 1), width=0.25).state_dict()
    weights.write(path, state, {"blocks": "[1, 1, 1]"})
    return path


def test_mistakes_are_one_line_and_leave_no_result(
    photographs, small_weights, run_directory, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "result.json"
    resnet = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet18").state_dict(), resnet)

    def be_offline(*_arguments: object, **_options: object) -> None:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(timm, "create_model", be_offline)
    programs.write_images(tmp_path / "two", ["a", "b"], 1)
    programs.write_images(tmp_path / "bad", ["a", "b", "c"], 1)
    (tmp_path / "bad" / "b" / "0.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "ILSVRC2012_val_00000001.JPEG").touch()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(small_weights.read_bytes()[:-100])
    (tmp_path / "list").write_text("7\n")
    for arguments, message in (
        (("--run", tmp_path / "nowhere"), "no checkpoint in it"),
        (("--run", run_directory, "--data", photographs), "8 unknown (class0, class1, class2, …)"),
        (("--weights", tmp_path / "nowhere.pth"), "no such weights file"),
        (("--weights", resnet), "not an Inception-ResNet-v2"),
        (("--weights", small_weights), "--data DIR is needed"),
        (("--weights", small_weights, "--data", tmp_path / "two"), "distinguishes 3"),
        (("--weights", small_weights, "--data", tmp_path / "empty"), "no class folders"),
        (("--weights", small_weights, "--data", tmp_path / "bad"), "cannot be decoded"),
        (("--weights", small_weights, "--data", tmp_path / "flat"), "prepare_imagenet.py"),
        (("--weights", cut, "--data", tmp_path / "two"), "damaged or not a safetensors file"),
        (("--weights", small_weights, resnet, "--data", tmp_path / "bad"), "not an Inception"),
        (("--run", run_directory, "--subset", tmp_path / "list"), "such as 7"),
        (("--run", run_directory, "--exclude", tmp_path / "none"), "cannot be read"),
        (("--run", run_directory, "--real", tmp_path / "list"), "list of lists"),
        (
            ("--run", run_directory, "--reference", tmp_path / "list"),
            "not a list of published results",
        ),
        (
            ("--weights", "timm:inception_resnet_v2", "--data", "x"),
            "not available (no route to the hub); the hub needs a network",
        ),
    ):
        status, _, error = call(validate, *arguments, "--json", out)
        assert status == 1 and message in error and error.count("\n") == 1, error
        assert not out.exists()


def test_an_ensemble_is_the_mean_of_its_networks_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 7, CLASSES, generator=generator)  # of three networks
    ensemble, nothing = scoring.Ensemble(), np.zeros((0, 2), np.int32)
    for own in logits:
        cuts = (own[:4], own[4:])
        parts = [Scored(cut, torch.zeros(len(cut)), [], nothing) for cut in cuts]
        assert list(ensemble.adding(parts)) == parts
    found = torch.cat([batch.scores for batch in ensemble.mean()])
    torch.testing.assert_close(found.exp(), logits.softmax(2).mean(0))


def test_a_list_decides_which_images_are_shown(photographs, small, tmp_path) -> None:
    source, listed = FolderSource(photographs), [2, 3, 11, 16]
    names = [Path(source.name(i)).relative_to(source.root) for i in listed]
    (tmp_path / "list").write_text("".join(f"{name}\n" for name in names))
    network = trained.load_weights(str(small[1]))
    stated = {"val": str(photographs)}

    def shown(**files: Path) -> tuple[torch.Tensor, list[int], list[int]]:
        asked = evaluation.prepare(network, stated, evaluation.LabelFiles(**files))
        batches, answers = zip(*asked.batches(3, Workers(0), ALONE))
        numbers = [index for batch in batches for _, index in batch.keys]
        return torch.cat([b.images for b in batches]), torch.cat(answers).tolist(), numbers

    views, _, _ = shown()
    others = [i for i in range(17) if i not in listed]
    for option, expected in (("subset", listed), ("exclude", others)):
        found, answers, numbers = shown(**{option: tmp_path / "list"})
        assert torch.equal(found, views[expected])
        assert (answers, numbers) == ([source.read(i)[1] for i in expected], expected)


def test_images_in_one_folder_are_evaluated_by_a_file_of_labels(
    photographs, small, tmp_path
) -> None:
    (tmp_path / "flat").mkdir()
    lines = []
    for path in photographs.glob("*/*.jpg"):
        shutil.copy(path, tmp_path / "flat")
        lines.append(f"{path.name} {path.parent.name}\n")
    (tmp_path / "labels").write_text("".join(lines))
    of_folders, _ = validated(tmp_path, "--weights", small[1], "--data", photographs)
    arguments = ("--data", tmp_path / "flat", "--labels", tmp_path / "labels")
    found, told = validated(tmp_path, "--weights", small[1], *arguments)
    same = ("images", "top1_correct", "top5_correct", "loss", "mean_per_class", "classes")
    assert {key: found.get(key) for key in same} == {key: of_folders.get(key) for key in same}
    assert f"labels   of each image, by name; --labels {tmp_path / 'labels'}; 8 classes" in told
    status, _, error = call(validate, "--weights", small[1], "--data", tmp_path / "flat")
    assert status == 1 and "holds no class folders" in error


def test_each_rate_is_held_against_its_own_interval(photographs, small) -> None:
    rank = np.repeat([0, 3, 9], [60, 30, 10])  # 60 % and 90 %: 50.2 to 69.1 and 82.6 to 94.5
    nothing = np.zeros((100, 5))
    predictions = Predictions(
        np.arange(100), nothing[:, 0], rank, nothing[:, 0], nothing, nothing, nothing
    )
    facts = {"labels": "imagenet", "protocol": "slim", "images": 100, "source": "a paper"}
    references = [
        reference.Reference("near", top1=62.0, top5=88.0, **facts),
        reference.Reference("far", top1=92.0, top5=65.0, **facts),
    ]
    network = trained.load_weights(str(small[1]))
    asked = evaluation.prepare(network, {"val": str(photographs)}, evaluation.LabelFiles())
    outcome = results.Result(asked, "a", "raw", 1, predictions, 1.0, "fp32", references)
    near, far = result_files.as_json(outcome)["references"]
    assert (near["top1_difference"], near["top5_difference"]) == (-2, 2)
    assert (far["top1_difference"], far["top5_difference"]) == (-32, 25)
    for entry, is_within in ((near, True), (far, False)):
        assert (entry["top1_within"], entry["top5_within"]) == (is_within, is_within)
    told = [line for name, line in results.rows(outcome) if name == "compare"]
    assert [line.count("within the interval") for line in told] == [2, 0]
