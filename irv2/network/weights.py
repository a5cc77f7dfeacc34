"""State dicts in and out, under timm's names: .pth and .safetensors files, timm's hub, our runs."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from data.errors import UserError
from data.files import write_atomically
from irv2.network.model import BLOCKS, InceptionResnetV2, inception_resnet_v2

FIRST_CHANNELS = 32  # of the first convolution at width 1


class WeightsError(UserError):
    """Weights that cannot be read, or belong to another network."""


def read(source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights file or "timm:NAME" -> (state dict, metadata of a safetensors file, else empty).

    A state dict nested under "state_dict" or "model" is unwrapped. Nothing in the
    file is executed. Raises WeightsError.
    """
    if source.startswith("timm:"):
        return _from_timm(source.removeprefix("timm:")), {}
    path = Path(source)
    if not path.is_file():
        raise WeightsError(f"{source}: no such weights file")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    content = _from_torch(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not (isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())):
        raise WeightsError(f"{source}: holds no state dict")
    return content, {}


def _from_torch(path: Path) -> Any:
    """Load what `torch.save` wrote, onto the CPU, without executing anything in the file."""
    try:
        if zipfile.is_zipfile(path):  # torch.load compares no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: not a file of tensors and numbers only; nothing in it was run"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path}: damaged or not a PyTorch file ({reason})") from None


def _from_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:
        raise WeightsError(f"{path}: damaged or not a safetensors file ({error})") from None


def _from_timm(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(
            f"timm:{name}: not available ({reason}); the hub needs a network: "
            "download the weights where there is one, and give the file's path instead"
        ) from None


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors, whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    content = safetensors.torch.save(tensors, metadata)
    write_atomically(path, lambda file: file.write(content))


def build_model(
    state: dict[str, Tensor], source: str, blocks: tuple[int, int, int] = BLOCKS
) -> InceptionResnetV2:
    """Build the network of a state dict, with its weights; an auxiliary head is left out.

    Raises WeightsError, naming `source`, if they are another network's.
    """
    kept = {key: value for key, value in state.items() if not key.startswith("aux.")}
    try:
        num_classes = kept["classif.weight"].shape[0]
        first_channels, in_chans = kept["conv2d_1a.conv.weight"].shape[:2]
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{source}: not an Inception-ResNet-v2 (no {error} in it)") from None
    try:
        model = inception_resnet_v2(
            num_classes, in_chans, blocks=blocks, width=first_channels / FIRST_CHANNELS
        )
    except ValueError as error:
        raise WeightsError(f"{source}: not an Inception-ResNet-v2 ({error})") from None
    load_into(model, kept, source)
    return model


def load_into(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a whole state dict. Raises WeightsError, naming `source` and a tensor, if it is
    another network's."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1].split())[:200]
        raise WeightsError(f"{source}: does not fit this network: {reason}") from None
