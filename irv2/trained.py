"""A trained network and what it says of itself: from a run, a weights file or timm's hub."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from irv2 import checkpoint, config, imagenet_names, rundir, weights
from irv2.checkpoint import Checkpoint, CheckpointError
from irv2.model import BLOCKS, InceptionResnetV2
from irv2.weights import WeightsError

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Trained:
    """A network with its weights."""

    model: InceptionResnetV2
    name: str  # where it comes from, for people
    which: str  # "ema", "raw" or "as published"
    step: int | None
    classes: list[str] | None  # class names in the order of its outputs, if it knows them
    data: dict[str, Any]  # how it sees images: the keys of the config's section "data"


def of_run(directory: Path, which: str, say: Callable[[str], None]) -> Trained:
    """A run's newest usable checkpoint, its averaged ("ema") or "raw" weights.

    Raises CheckpointError, or WeightsError.
    """
    return of_checkpoint(rundir.load_newest(directory, say, only=[part(which)]), which)


def of_checkpoint(found: Checkpoint, which: str) -> Trained:
    """One checkpoint of a run, of which `part(which)` has been read. Raises WeightsError."""
    cfg = found.meta["config"]
    blocks = tuple(cfg["model"]["blocks"])
    model = weights.build_model(found.parts[part(which)], str(found.path), blocks)
    meta = found.meta
    return Trained(model, str(found.path), which, meta["step"], meta["classes"], cfg["data"])


def of_checkpoints(
    directory: Path, which: str, say: Callable[[str], None], most: int | None = None
) -> list[Trained]:
    """A run's usable checkpoints, its newest `most` or all, oldest first; says which it passes
    over. Raises CheckpointError if there is none."""
    found: list[Trained] = []
    for path in reversed(rundir.checkpoints(directory)):
        if len(found) == most:
            break
        try:
            found.append(of_checkpoint(checkpoint.load(path, [part(which)]), which))
        except CheckpointError as error:
            say(f"passed over: {error}")
    if not found:
        raise CheckpointError(f"{directory}: no checkpoint in it that can be read")
    return found[::-1]


def averaged(networks: list[Trained]) -> Trained:
    """The mean of several checkpoints' weights and batch-norm statistics, oldest first.

    The newest network takes it on. Raises WeightsError if they are of different networks.
    """
    newest = networks[-1]
    states = [network.model.state_dict() for network in networks]
    mean = {}
    for name, value in states[-1].items():
        values = [state.get(name) for state in states]
        if any(v is None or v.shape != value.shape for v in values):
            raise WeightsError(f"{newest.name}: {name} is another in an older checkpoint")
        if value.is_floating_point():
            value = torch.stack([v.double() for v in values]).mean(0).to(value.dtype)
        mean[name] = value
    newest.model.load_state_dict(mean)
    steps = f"steps {networks[0].step} to {newest.step}"
    return replace(newest, name=f"{newest.name}, mean of {len(networks)} ({steps})")


def part(which: str) -> str:
    """The part of a checkpoint that holds "ema" or "raw" weights."""
    return "ema" if which == "ema" else "model"


def of_weights(source: str) -> Trained:
    """A weights file, or "timm:NAME". Raises WeightsError.

    What no metadata tells is as published: 299 px, crop 0.8975, bicubic, mean = std = 0.5, and of
    1,000 classes that they are ImageNet's.
    """
    state, texts = weights.read(source)
    metadata = _parsed(texts, source)
    blocks = tuple(metadata.get("blocks", BLOCKS))
    model = weights.build_model(state, source, blocks)
    channels, outputs = model.conv2d_1a.conv.in_channels, model.classif.out_features
    if channels != 3:
        raise WeightsError(f"{source}: is for images of {channels} channels, not for RGB")
    classes = metadata.get("classes")
    if classes is None and outputs == IMAGENET_CLASSES:
        classes = imagenet_names.synsets()
    if classes is not None and len(classes) != outputs:
        raise WeightsError(f"{source}: has {outputs} outputs, but names for {len(classes)}")
    data = _data(metadata.get("data", {}), source)
    result = metadata.get("result", {})
    which = result.get("weights", "as published")
    return Trained(model, source, which, result.get("step"), classes, data)


def _data(told: dict[str, Any], source: str) -> dict[str, Any]:
    """The keys of section "data", those that are not told by default; "val" may be None."""
    known = {key: value for key, value in told.items() if key in config.Data.model_fields}
    try:
        data = config.Data(**{"train": "unknown", "val": "unknown"} | known).model_dump()
    except ValueError:
        raise WeightsError(f"{source}: its metadata is damaged (data)") from None
    return data | {"val": told.get("val")}


def _parsed(metadata: dict[str, str], source: str) -> dict[str, Any]:
    """The entries of a weights file's metadata that are this project's. Raises WeightsError."""
    is_sound: dict[str, Callable[[Any], bool]] = {
        "blocks": lambda value: _is_list_of(int, value) and len(value) == 3 and min(value) > 0,
        "classes": lambda value: _is_list_of(str, value),
        "data": lambda value: isinstance(value, dict),
        "result": lambda value: (
            isinstance(value, dict)
            and isinstance(value.get("weights", ""), str)
            and isinstance(value.get("step"), int | None)
        ),
    }
    found = {}
    for key in is_sound.keys() & metadata.keys():
        try:
            found[key] = json.loads(metadata[key])
        except ValueError:
            found[key] = math.nan
        if not is_sound[key](found[key]):
            raise WeightsError(f"{source}: its metadata is damaged ({key})")
    return found


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
