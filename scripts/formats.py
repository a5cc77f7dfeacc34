"""The kinds of file that export.py writes, and how the runtime that each is for runs it."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from irv2 import imagenet_names, trained, weights
from irv2.folding import fold_batch_norm
from irv2.model import BLOCKS, NUM_FEATURES
from irv2.trained import Trained

VIEW = ("image_size", "eval_crop", "eval_interpolation", "mean", "std")
INPUT, OUTPUT, BATCH = "images", "logits", "batch"
EXTRA = "metadata.json"  # of torch.export
TIMM = "inception_resnet_v2"

Run = Callable[[Tensor], Tensor]  # float32 [B, 3, size, size], normalised -> logits [B, C]


class ExportError(ValueError):
    """What cannot be exported, or came out as something else."""


def metadata(subject: Trained) -> dict[str, str]:
    """What travels with the weights, each value as JSON; `trained.of_weights` reads it."""
    model = subject.model
    blocks = [len(part) for part in (model.repeat, model.repeat_1, model.repeat_2)]
    content: dict[str, Any] = {"blocks": blocks}
    content["data"] = {key: subject.data[key] for key in VIEW}
    content["result"] = {"weights": subject.which, "step": subject.step}
    if subject.classes is not None:
        content["classes"] = subject.classes
        content["names"] = [imagenet_names.in_words(name) for name in subject.classes]
    return {key: json.dumps(value) for key, value in content.items()}


# ------------------------------------------------------------------------- safetensors


def write_safetensors(subject: Trained, folded: bool, path: Path) -> None:
    """timm's names, as a run's best.safetensors."""
    weights.write(path, subject.model.state_dict(), metadata(subject))


def run_safetensors(path: Path, subject: Trained) -> Run:
    return trained.of_weights(str(path)).model.eval()


# ------------------------------------------------------------------------- timm


def write_timm(subject: Trained, folded: bool, path: Path) -> None:
    """A folder as timm's save_for_hf writes it: model.safetensors and config.json."""
    told = metadata(subject)
    if json.loads(told["blocks"]) != list(BLOCKS):
        raise ExportError(
            f"{subject.name}: timm's network has {list(BLOCKS)} blocks, this one {told['blocks']}"
        )
    path.mkdir()
    weights.write(path / "model.safetensors", subject.model.state_dict(), {"format": "pt"} | told)
    text = json.dumps(timm_config(subject), indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")


def timm_config(subject: Trained) -> dict[str, Any]:
    """What `timm.create_model("local-dir:FOLDER", pretrained=True)` wants to know."""
    data, outputs = subject.data, subject.model.classif.out_features
    content: dict[str, Any] = {
        "architecture": TIMM,
        "num_classes": outputs,
        "num_features": NUM_FEATURES,
        "pretrained_cfg": {
            "num_classes": outputs,
            "input_size": [3, data["image_size"], data["image_size"]],
            "pool_size": None,
            "crop_pct": data["eval_crop"],
            "interpolation": data["eval_interpolation"],
            "mean": data["mean"],
            "std": data["std"],
            "first_conv": "conv2d_1a.conv",
            "classifier": "classif",
        },
    }
    if subject.classes is not None:
        content["label_names"] = subject.classes
        content["label_descriptions"] = {
            name: imagenet_names.in_words(name) for name in subject.classes
        }
    return content


def run_timm(path: Path, subject: Trained) -> Run:
    outputs = subject.model.classif.out_features
    file = str(path / "model.safetensors")
    return timm.create_model(TIMM, num_classes=outputs, checkpoint_path=file).eval()


# ------------------------------------------------------------------------- torch.export


def example(subject: Trained) -> Tensor:
    """Two images: an example of one would fix the batch at one."""
    return torch.zeros(2, 3, subject.data["image_size"], subject.data["image_size"])


def write_torch_export(subject: Trained, folded: bool, path: Path) -> None:
    model = fold_batch_norm(subject.model) if folded else subject.model.eval()
    batch = torch.export.Dim(BATCH)
    program = torch.export.export(model, (example(subject),), dynamic_shapes=({0: batch},))
    content = io.BytesIO()  # PyTorch's own writer aborts the program on a full disk
    torch.export.save(program, content, extra_files={EXTRA: json.dumps(metadata(subject))})
    path.write_bytes(content.getbuffer())


def run_torch_export(path: Path, subject: Trained) -> Run:
    return torch.export.load(path).module()


# ------------------------------------------------------------------------- ONNX


def write_onnx(subject: Trained, folded: bool, path: Path) -> None:
    model = fold_batch_norm(subject.model) if folded else subject.model.eval()
    program = torch.onnx.export(
        model,
        (example(subject),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim(BATCH)},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        optimize=folded,  # the optimizer folds batch norm, too
        verbose=False,
    )
    program.model.metadata_props.update(metadata(subject))
    program.save(path, external_data=False)  # one file: 220 MB are well below ONNX's 2 GB


def run_onnx(path: Path, subject: Trained) -> Run:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


# ------------------------------------------------------------------------- the table


class Format(NamedTuple):
    """A kind of file.

    tolerance: largest difference of a logit allowed, as a share of the largest logit. Only the
    rounding of float32 may differ: where the same operations run, by merging and batching (measured
    1e-6), else also by folding and other algorithms for convolutions (measured 3e-6).
    """

    suffix: str
    write: Callable[[Trained, bool, Path], None]  # what, batch norm folded?, where
    run: Callable[[Path, Trained], Run]
    runtime: str
    tolerance: float
    may_fold: bool = False  # whether batch norm can be folded; folded it is no state dict of timm's
    packages: tuple[str, ...] = ()


FORMATS = {
    "safetensors": Format(
        ".safetensors", write_safetensors, run_safetensors, "safetensors", tolerance=1e-5
    ),
    "timm": Format("", write_timm, run_timm, "timm.create_model", tolerance=1e-5),
    "torch-export": Format(
        ".pt2",
        write_torch_export,
        run_torch_export,
        "torch.export.load",
        tolerance=1e-4,
        may_fold=True,
    ),
    "onnx": Format(
        ".onnx",
        write_onnx,
        run_onnx,
        "onnxruntime",
        tolerance=1e-4,
        may_fold=True,
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
}


def check_packages(name: str) -> None:
    """Raise ExportError if a format needs packages that are not installed."""
    absent = [p for p in FORMATS[name].packages if importlib.util.find_spec(p) is None]
    if absent:
        raise ExportError(
            f"--format {name} needs {', '.join(absent)}: pip install -r requirements-export.txt"
        )
