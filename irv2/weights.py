"""State dicts in and out, under timm's names: .pth and .safetensors files, timm's hub, our runs."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from irv2 import checkpoint


class WeightsError(ValueError):
    """Weights that cannot be read, or belong to another network."""


def read(source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights file or "timm:NAME" -> (state dict, metadata of a safetensors file, else empty).

    A TensorFlow-style state dict nested under "state_dict" or "model" is unwrapped. Nothing in the
    file is executed. Raises WeightsError.
    """
    if source.startswith("timm:"):
        return _from_timm(source.removeprefix("timm:")), {}
    path = Path(source)
    if not path.is_file():
        raise WeightsError(f"{source}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{source}: damaged or not a weights file ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not (isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())):
        raise WeightsError(f"{source}: holds no state dict")
    return content, {}


def _from_timm(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"timm:{name}: not available ({reason}); the hub needs a network, "
            "or give the downloaded file as --weights FILE"
        ) from None


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors, whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    content = safetensors.torch.save(tensors, metadata)
    checkpoint.write_atomically(path, lambda file: file.write(content))


def num_classes(state: dict[str, Tensor], source: str) -> int:
    """Classes a state dict was trained for. Raises WeightsError for another network's."""
    if "classif.weight" not in state or "conv2d_1a.conv.weight" not in state:
        raise WeightsError(f"{source}: not the weights of an Inception-ResNet-v2 (timm's names)")
    return state["classif.weight"].shape[0]


def load_into(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Strictly load a state dict, the auxiliary head aside. Raises WeightsError on any mismatch."""
    kept = {key: value for key, value in state.items() if not key.startswith("aux.")}
    try:
        model.load_state_dict(kept, strict=True)
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines()][1]
        raise WeightsError(f"{source}: does not fit this network: {first[:200]}") from None
