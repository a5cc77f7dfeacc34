"""Weights of a small network that know three classes and how they see images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from small_network import randomised

from irv2.network import weights
from irv2.network.model import inception_resnet_v2

VIEW = {
    "image_size": 75,
    "eval_crop": 0.8,
    "eval_interpolation": "bilinear",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
}
SYNSETS = ["n01440764", "n02123045", "n02504458"]
WORDS = ["tench", "tabby", "African elephant"]
BLOCKS = [1, 1, 1]


def write_small_weights(folder: Path) -> Path:
    """small.safetensors, random but for what its metadata say."""
    torch.manual_seed(0)
    model = randomised(inception_resnet_v2(3, blocks=tuple(BLOCKS), width=0.25))
    metadata = {"blocks": BLOCKS, "classes": SYNSETS, "data": VIEW}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    weights.write(folder / "small.safetensors", model.state_dict(), texts)
    return folder / "small.safetensors"
