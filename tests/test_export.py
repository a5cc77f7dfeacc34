"""scripts/export.py: what other runtimes compute and read in the files, and what is not kept."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import calling
import onnx
import onnxruntime
import programs
import pytest
import small_meta
import timm
import torch
from small_network import copied, randomised, relative
from small_weights import BLOCKS, SYNSETS, VIEW, WORDS
from torch import Tensor

from irv2 import formats
from irv2.network import weights
from irv2.network.model import inception_resnet_v2
from irv2.run import checkpoint, trained
from scripts import export
from scripts.exporting import card

pytestmark = pytest.mark.slow

METADATA = {
    "classes": SYNSETS,
    "names": WORDS,
    "blocks": BLOCKS,
    "data": VIEW,
    "result": {"weights": "as published", "step": None},
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Five of what the network takes; export.py has checked with others."""
    torch.manual_seed(3)
    return torch.rand(5, 3, 75, 75) * 2 - 1


@pytest.fixture(scope="module")
def expected(small_weights: Path, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return trained.load_weights(str(small_weights)).model.eval()(images)


def call(source: Path | tuple, kind: str, out: Path, *options: object) -> calling.Called:
    """Export weights; `source` may also be other options that say what to export."""
    source = ("--weights", source) if isinstance(source, Path) else source
    return calling.call(export, *source, "--format", kind, "--out", out, *options)


def assert_one_line(error: str, message: str) -> None:
    assert message in error and error.count("\n") == 1, error


def decoded(metadata: dict[str, str]) -> dict:
    return {key: json.loads(value) for key, value in metadata.items()}


def assert_same_in_any_batch(run: formats.Forward, images: Tensor, expected: Tensor) -> None:
    with torch.inference_mode():
        for size in (1, 2, 5):
            assert relative(run(images[:size]), expected[:size]) < 1e-5


def of_onnx(path: Path) -> formats.Forward:
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def exported(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the real program made: small.onnx."""
    folder = tmp_path_factory.mktemp("exported")
    photographs = programs.write_images(folder.parent / "images", ["a"], 2)
    arguments = ("--weights", small_weights, "--format", "onnx", "--out", folder / "small.onnx")
    done = programs.run(
        "scripts/export.py", *arguments, "--check-images", photographs, as_user=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["checked"] == "by onnxruntime, on the images named, in batches of 1 and 3"
    assert 0 < float(rows["difference"].split()[0]) < 1e-5
    return folder


def test_onnx_is_one_file_with_its_metadata_and_the_same_logits(exported, images, expected):
    assert os.listdir(exported) == ["small.onnx"]
    model = onnx.load(exported / "small.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert decoded({prop.key: prop.value for prop in model.metadata_props}) == METADATA
    assert_same_in_any_batch(of_onnx(exported / "small.onnx"), images, expected)


def test_onnx_keeps_batch_norm_if_asked(small_weights, tmp_path, images, expected):
    path = tmp_path / "kept.onnx"
    status, _, error = call(small_weights, "onnx", path, "--not-folded")
    assert status == 0, error
    assert "BatchNormalization" in {node.op_type for node in onnx.load(path).graph.node}
    assert_same_in_any_batch(of_onnx(path), images, expected)


def test_openvino_has_its_metadata_and_the_same_logits(small_weights, tmp_path, images, expected):
    ov = pytest.importorskip("openvino")
    status, _, error = call(small_weights, "openvino", tmp_path / "small")
    assert status == 0, error
    assert sorted(os.listdir(tmp_path / "small")) == ["openvino_model.bin", "openvino_model.xml"]
    model = ov.Core().read_model(tmp_path / "small" / "openvino_model.xml")
    found = {key: model.get_rt_info(["irv2", key]).value for key in METADATA}
    assert decoded(found) == METADATA
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run = lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())  # noqa: E731
    assert_same_in_any_batch(run, images, expected)


@pytest.mark.parametrize("kind, name", [("onnx", "a.onnx"), ("openvino", "a")])
def test_int8_is_kept_if_accuracy_allows_it(small_weights, tmp_path, kind, name):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "nncf"}[kind])
    val = programs.write_images(tmp_path / "val", SYNSETS, 4)
    options = ("--int8", "--calibrate", val, "--data", val, "--most-loss")
    status, said, error = call(small_weights, kind, tmp_path / name, *options, -101)
    assert status == 1 and not (tmp_path / name).exists()
    assert "points of top-1, more than --most-loss -101; nothing was kept" in error
    status, said, error = call(small_weights, kind, tmp_path / name, *options, 100)
    assert status == 0, error
    rows = dict(line.split(maxsplit=1) for line in said.splitlines() if "Statistics" not in line)
    assert f"of 12 images of {val})" in rows["before"] and "points lost" in rows["int8"]
    if kind == "onnx":
        model = onnx.load(tmp_path / name)
        assert "QuantizeLinear" in {node.op_type for node in model.graph.node}
        found = {prop.key: prop.value for prop in model.metadata_props}
        note = decoded(found)["int8"]
        assert (note["images"], note["validated_on"]) == (12, "val")
        assert rows["int8"].startswith(f"top-1 {note['top1']:.2f} %")
        assert rows["before"].startswith(f"top-1 {note['top1_before']:.2f} %")


@pytest.mark.parametrize("options", [(), ("--not-folded",)])
def test_torch_export_has_its_metadata_and_the_same_logits(
    small_weights, tmp_path, images, expected, options
):
    path = tmp_path / "small.pt2"
    status, out, error = call(small_weights, "torch-export", path, *options)
    assert status == 0, error
    assert "scikit-learn's photographs" in out
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert decoded(json.loads(extra["metadata.json"])) == METADATA
    assert any("running_mean" in name for name in program.state_dict) == bool(options)
    assert_same_in_any_batch(program.module(), images, expected)


def test_safetensors_are_the_weights_and_say_how_to_use_them(small_weights, tmp_path):
    path = tmp_path / "copy.safetensors"
    status, _, error = call(small_weights, "safetensors", path)
    assert status == 0, error
    state, found, _ = weights.read(str(path))
    original, *_ = weights.read(str(small_weights))
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
    assert decoded(found) == METADATA
    opened = trained.load_weights(str(path))
    assert opened.classes == SYNSETS
    assert {key: getattr(opened.data, key) for key in VIEW} == VIEW


def test_timm_opens_its_export_in_both_ways(tmp_path, images):
    theirs = randomised(timm.create_model("inception_resnet_v2", num_classes=3))
    metadata = {"classes": json.dumps(SYNSETS), "data": json.dumps(VIEW)}
    weights.write(tmp_path / "weights.safetensors", theirs.state_dict(), metadata)
    out = tmp_path / "for_timm"
    status, said, error = call(tmp_path / "weights.safetensors", "timm", out)
    assert status == 0, error
    assert "checked     by timm.create_model" in said
    file = str(out / "model.safetensors")
    with torch.inference_mode():
        expected = theirs(images)
        for model in (
            timm.create_model("inception_resnet_v2", num_classes=3, checkpoint_path=file),
            timm.create_model(f"local-dir:{out}", pretrained=True),
        ):
            assert torch.equal(model.eval()(images), expected)
    found = timm.data.resolve_model_data_config(model)
    assert tuple(found["input_size"]) == (3, 75, 75)
    assert (found["crop_pct"], found["interpolation"]) == (0.8, "bilinear")
    assert [list(found["mean"]), list(found["std"])] == [VIEW["mean"], VIEW["std"]]
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == SYNSETS
    assert config["label_descriptions"] == dict(zip(SYNSETS, WORDS))
    ours = trained.load_weights(str(out))
    assert ours.classes == SYNSETS and ours.remarks == ()
    assert {key: getattr(ours.data, key) for key in VIEW} == VIEW


def test_a_run_is_checked_on_its_own_validation_images(tmp_path):
    network = inception_resnet_v2(2, blocks=(1, 1, 1), width=0.25)
    state = copied(network.state_dict())
    val = programs.write_images(tmp_path / "val", ["a", "b"], 3)
    data = {**VIEW, "val": str(val), "train": "private"}
    meta = small_meta.meta(7, config=small_meta.config(data=data))
    checkpoint.save(tmp_path / "run" / "checkpoints", 7, {"ema": state, "model": state}, meta)
    out = tmp_path / "a.safetensors"
    source = ("--run", tmp_path / "run", "--which", "raw")
    status, said, error = call(source, "safetensors", out)
    assert status == 0, error
    assert f"on images of {val}, in batches of 1 and 3" in said
    found = decoded(weights.read(str(out))[1])
    assert found["result"] == {"weights": "raw", "step": 7}
    assert found["data"] == VIEW  # and no paths of this machine

    (val / "b" / "2.png").write_bytes(b"no image")
    (val / "b" / "0.png").write_bytes(b"no image")
    status, _, error = call(source, "safetensors", tmp_path / "b.safetensors")
    assert status == 1
    assert_one_line(error, "cannot be decoded")
    shutil.rmtree(val)
    status, said, _ = call(source, "safetensors", tmp_path / "b.safetensors")
    assert status == 0 and "on scikit-learn's photographs" in said


class FakeHub:
    """Keeps what is uploaded, or refuses."""

    refuses = False
    uploaded: ClassVar[dict[str, str]] = {}

    def create_repo(self, name: str, exist_ok: bool) -> str:
        if self.refuses:
            raise OSError("no such owner")
        return f"https://huggingface.co/{name}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.uploaded[repo_id] = sorted(os.listdir(folder_path))


def test_a_card_is_written_from_the_run_and_pushed_with_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(card.huggingface_hub, "HfApi", FakeHub)
    network = inception_resnet_v2(2, blocks=(1, 1, 1), width=0.25)
    monkeypatch.setattr(type(network), "published", (network.blocks, network.width))
    monkeypatch.setitem(
        formats.FORMATS, "timm", formats.FORMATS["timm"]._replace(run=run_safetensors_of_folder)
    )
    run, state = tmp_path / "private" / "run", copied(network.state_dict())
    config = small_meta.config(data={**VIEW, "val": "/private/val", "train": "/private/train"})
    meta = small_meta.meta(7, config=config)
    checkpoint.save(run / "checkpoints", 7, {"ema": state, "model": state}, meta)
    (run / "config.yaml").write_text(
        json.dumps(
            {
                "run": {"seed": 3, "dir": "/private"},
                "train": {"epochs": 2},
                "optim": {"lr": 0.1},
                "schedule": {"kind": "cosine"},
                "loss": {},
                "ema": {},
            }
        )
    )
    lines = [
        {
            "kind": "eval",
            "step": step,
            "epoch": step / 7,
            "weights": which,
            "top1": top1,
            "top5": 100.0,
            "loss": 0.5,
            "images": 200,
        }
        for step, which, top1 in [(3, "ema", 50.0), (7, "ema", 75.0), (7, "raw", 60.0)]
    ]
    (run / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out = tmp_path / "out"
    status, said, error = call(("--run", run), "timm", out, "--push", "me/birds")
    assert status == 0, error
    assert "pushed      https://huggingface.co/me/birds" in said
    assert FakeHub.uploaded["me/birds"] == ["README.md", "config.json", "model.safetensors"]
    text = (out / "README.md").read_text()
    assert "| top-1 | 75.00 % | 68.57 to 80.49 | 200 |" in text  # Wilson's interval
    assert "| 3 | 0.4 | 0.5000 | 50.00 |" in text and "60.00" not in text
    assert 'optim: {"lr": 0.1}' in text and "seed: 3" in text and "/private" not in text
    assert 'timm.create_model("hf-hub:me/birds", pretrained=True)' in text

    monkeypatch.setattr(FakeHub, "refuses", True)
    status, _, error = call(("--run", run), "timm", tmp_path / "b", "--push", "me/birds")
    assert status == 1 and (tmp_path / "b" / "README.md").exists()
    assert_one_line(error, "me/birds: cannot be pushed to (no such owner); log in with")


def run_safetensors_of_folder(path: Path, network: trained.Trained) -> formats.Forward:
    return formats.run_safetensors(path / "model.safetensors", network)


def test_what_computes_something_else_is_not_kept(small_weights, tmp_path, monkeypatch):
    def write_another(subject: trained.Trained, folded: bool, path: Path) -> None:
        subject.model.classif.bias.data[0] += 0.1  # after its own logits were computed
        formats.write_safetensors(subject, folded, path)

    kind = formats.FORMATS["safetensors"]._replace(write=write_another)
    monkeypatch.setitem(formats.FORMATS, "safetensors", kind)
    status, said, error = call(small_weights, "safetensors", tmp_path / "a.safetensors")
    assert status == 1
    assert_one_line(error, "computes something else")
    assert "written" not in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "name"), [("safetensors", "a.safetensors"), ("torch-export", "a.pt2")]
)
def test_a_full_disk_leaves_nothing_behind(small_weights, tmp_path, kind, name):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        status, _, error = call(small_weights, kind, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert_one_line(error, f"{name}: cannot be written (File too large)")
    assert os.listdir(tmp_path) == []


def test_mistakes_are_one_line_and_leave_nothing(small_weights, tmp_path, monkeypatch):
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(small_weights.read_bytes()[:100_000])
    taken = tmp_path / "taken.onnx"
    taken.write_text("precious")
    before = sorted(os.listdir(tmp_path))
    good = small_weights
    find_spec: Callable = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    for source, kind, out, message in (
        (good, "onnx", "taken.onnx", "is there already"),
        (good, "torch-export", "a.onnx", "must end in .pt2"),
        (good, "safetensors", "nowhere/a.safetensors", "no such folder"),
        (good, "safetensors", "taken.onnx/a.safetensors", "no such folder"),
        (good, "onnx", "a.onnx", "needs onnxscript: pip install -r requirements-export.txt"),
        (good, "timm", "folder", "this one (1, 1, 1)"),
        (truncated, "torch-export", "a.pt2", "damaged or not a safetensors file"),
        (("--run", tmp_path), "torch-export", "a.pt2", "no checkpoint in it"),
        (
            ("--weights", good, "--check-images", tmp_path / "none.jpg"),
            *("safetensors", "a.safetensors", "none"),
        ),
    ):
        status, _, error = call(source, kind, tmp_path / out)
        assert status == 1
        assert_one_line(error, message)
        assert sorted(os.listdir(tmp_path)) == before
    assert taken.read_text() == "precious"


def test_an_export_reaches_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync = [], os.fsync

    def spy(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert not (tmp_path / "out").exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    (tmp_path / "made").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "made" / name).write_bytes(b"x")
    export.keep(tmp_path / "made", tmp_path / "out")
    assert events == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == events


def test_what_computes_no_numbers_is_not_kept(small_weights, tmp_path, monkeypatch):
    def run_another(path: Path, subject: trained.Trained) -> formats.Forward:
        return lambda images: torch.full((len(images), len(SYNSETS)), float("nan"))

    kind = formats.FORMATS["safetensors"]._replace(run=run_another)
    monkeypatch.setitem(formats.FORMATS, "safetensors", kind)
    out = tmp_path / "a.safetensors"
    status, _, error = call(small_weights, "safetensors", out)
    assert status == 1 and "computes something else" in error
    assert os.listdir(tmp_path) == []
