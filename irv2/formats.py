"""The file formats that export.py writes, and how the runtime of each runs it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from data.errors import UserError
from data.optional import is_installed
from irv2.engines.graph import BATCH, INPUT, OUTPUT, onnx_graph
from irv2.engines.openvino import OpenVINO, read_graph
from irv2.network import imagenet_names, weights
from irv2.network.accelerate import fold_batch_norm
from irv2.run import trained
from irv2.run.trained import Trained

VIEW = ("image_size", "eval_crop", "eval_interpolation", "mean", "std")
EXTRA = "metadata.json"  # of torch.export
OPENVINO = "openvino_model.xml"

Forward = Callable[[Tensor], Tensor]  # float32 [B, 3, size, size], normalised -> logits [B, C]


class ExportError(UserError):
    """A network that cannot be exported, or whose export computes something else."""


def metadata(network: Trained) -> dict[str, str]:
    """Metadata stored with the weights, each value as JSON; `trained.load_weights` reads it."""
    content: dict[str, Any] = {"blocks": list(network.model.blocks)}
    content["data"] = {key: getattr(network.data, key) for key in VIEW}
    if network.data.classes is not None:
        content["data"]["classes"] = Path(network.data.classes).name
    content["result"] = {"weights": network.which, "step": network.step}
    if network.class_order is not None:
        content["class_order"] = network.class_order
    if network.classes is not None:
        content["classes"] = network.classes
        content["names"] = imagenet_names.in_words(network.classes)
    return {key: json.dumps(value) for key, value in content.items()}


# ------------------------------------------------------------------------- safetensors


def write_safetensors(network: Trained, folded: bool, path: Path) -> None:
    """Write a file with timm's names, like a run's best.safetensors."""
    weights.write(path, network.model.state_dict(), metadata(network))


def run_safetensors(path: Path, network: Trained) -> Forward:
    return trained.load_weights(str(path)).model.eval()


# ------------------------------------------------------------------------- timm


def write_timm(network: Trained, folded: bool, path: Path) -> None:
    """Write a folder like timm's save_for_hf: model.safetensors and config.json."""
    texts = metadata(network)
    own, theirs = (network.model.blocks, network.model.width), network.model.published
    if own != theirs:
        raise ExportError(
            f"{network.name}: timm's network has {theirs[0]} blocks of width {theirs[1]:g}, "
            f"this one {own[0]} of width {own[1]:g}"
        )
    path.mkdir()
    weights.write(path / "model.safetensors", network.model.state_dict(), {"format": "pt"} | texts)
    text = json.dumps(timm_config(network), indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")


def timm_config(network: Trained) -> dict[str, Any]:
    """Return config.json as `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it."""
    data, model = network.data, network.model
    content: dict[str, Any] = {
        "architecture": model.timm_name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, data.image_size, data.image_size],
            "pool_size": None,
            "crop_pct": data.eval_crop,
            "interpolation": data.eval_interpolation,
            "mean": data.mean,
            "std": data.std,
            "first_conv": model.first_conv,
            "classifier": model.classifier,
        },
    }
    if network.classes is not None:
        content["label_names"] = network.classes
        words = imagenet_names.in_words(network.classes)
        content["label_descriptions"] = dict(zip(network.classes, words))
    return content


def run_timm(path: Path, network: Trained) -> Forward:
    name, outputs = network.model.timm_name, network.model.num_classes
    file = str(path / "model.safetensors")
    return timm.create_model(name, num_classes=outputs, checkpoint_path=file).eval()


# ------------------------------------------------------------------------- torch.export


def example(network: Trained) -> Tensor:
    """Return two images: an example of one would fix the batch size at one."""
    return torch.zeros(2, 3, network.data.image_size, network.data.image_size)


def write_torch_export(network: Trained, folded: bool, path: Path) -> None:
    model = fold_batch_norm(network.model) if folded else network.model.eval()
    batch = torch.export.Dim(BATCH)
    program = torch.export.export(model, (example(network),), dynamic_shapes=({0: batch},))
    content = io.BytesIO()  # PyTorch's own writer aborts the program on a full disk
    torch.export.save(program, content, extra_files={EXTRA: json.dumps(metadata(network))})
    path.write_bytes(content.getbuffer())


def run_torch_export(path: Path, network: Trained) -> Forward:
    return torch.export.load(path).module()


# ------------------------------------------------------------------------- ONNX


def write_onnx(network: Trained, folded: bool, path: Path) -> None:
    model = fold_batch_norm(network.model) if folded else network.model.eval()
    program = torch.onnx.export(
        model,
        (example(network),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim(BATCH)},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        optimize=folded,  # the optimizer folds batch norm, too
        verbose=False,
    )
    program.model.metadata_props.update(metadata(network))
    program.save(path, external_data=False)  # one file: 220 MB are well below ONNX's 2 GB


def run_onnx(path: Path, network: Trained) -> Forward:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def save_onnx(content: bytes, path: Path, texts: dict[str, str]) -> None:
    """Write the content of an ONNX file with metadata."""
    import onnx

    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, str(path))


# ------------------------------------------------------------------------- OpenVINO


def write_openvino(network: Trained, folded: bool, path: Path) -> None:
    """Write a folder with openvino_model.xml and .bin, as Optimum names them."""
    graph = read_graph(onnx_graph(network.model, network.data.image_size))
    save_openvino(graph, path, metadata(network))


def save_openvino(model: Any, path: Path, texts: dict[str, str]) -> None:
    """Write a model of OpenVINO's with metadata, which are its rt_info "irv2"."""
    import openvino as ov

    for key, text in texts.items():
        model.set_rt_info(text, ["irv2", key])
    path.mkdir()
    ov.save_model(model, path / OPENVINO, compress_to_fp16=False)


def run_openvino(path: Path, network: Trained) -> Forward:
    import openvino as ov

    return OpenVINO(ov.Core().read_model(path / OPENVINO), "fp32")


# ------------------------------------------------------------------------- the table


class Format(NamedTuple):
    """A kind of file.

    tolerance: largest difference of a logit allowed, as a share of the largest logit. Only the
    rounding of float32 may differ: where the same operations run, by merging and batching (measured
    1e-6), else also by folding and other algorithms for convolutions (measured 3e-6).
    """

    suffix: str
    write: Callable[[Trained, bool, Path], None]  # network, batch norm folded?, path
    run: Callable[[Path, Trained], Forward]
    runtime: str
    tolerance: float
    may_fold: bool = False  # batch norm can be folded, which makes it no state dict of timm's
    packages: tuple[str, ...] = ()
    requirements: str = "requirements-export.txt"


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
    "openvino": Format(
        "",
        write_openvino,
        run_openvino,
        "openvino",
        tolerance=1e-4,
        packages=("onnx", "openvino"),
        requirements="requirements-inference.txt",
    ),
}
QUANTIZERS = {"openvino": ("nncf",), "onnx": ()}  # formats that can be int8: packages besides


def check_packages(name: str, int8: bool = False) -> None:
    """Raise ExportError if a format needs packages that are not installed."""
    kind, more = FORMATS[name], QUANTIZERS[name] if int8 else ()
    absent = [p for p in (*kind.packages, *more) if not is_installed(p)]
    if absent:
        raise ExportError(
            f"--format {name} needs {', '.join(absent)}: pip install -r {kind.requirements}"
        )
