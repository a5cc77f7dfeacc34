"""Weights and an image that follow from names and places alone, so that nothing need be stored."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"


def drawn(name: str, shape: Sequence[int]) -> np.ndarray:
    """Values of a variable of TensorFlow's: float32, of a size that lets images through."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("variance"):
        return 1 + 0.3 * np.tanh(values)
    if len(shape) == 1:
        return 0.1 * values
    return values * np.float32(1.2 / np.sqrt(np.prod(shape[:-1])))


def image(size: int) -> np.ndarray:
    """Waves: float32 [1, size, size, 3] in [-1, 1]."""
    y, x, channel = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
    return np.sin(0.1 * x * (channel + 1) + 0.05 * y).astype(np.float32)[None]


def write_slim(folder: Path) -> str:
    """TF-slim's checkpoint of version 2: TensorFlow's own index, and the variables it places."""
    folder.mkdir()
    shutil.copy(DATA / "slim.ckpt.index", folder / "model.ckpt.index")
    variables = json.loads((DATA / "networks.json").read_text())["slim"]["variables"]
    content = b"".join(drawn(name, shape).tobytes() for name, shape in sorted(variables))
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(content)
    return str(folder / "model.ckpt")
