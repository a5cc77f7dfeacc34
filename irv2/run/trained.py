"""A trained network and its metadata: from a run, a weights file or timm's hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from irv2.data_section import Data
from irv2.network import imagenet_names, weights
from irv2.network.accelerate import accelerate
from irv2.network.forms import metadata
from irv2.network.forms.base import WeightsError
from irv2.network.forms.pytorch import check_which
from irv2.network.model import InceptionResnetV2
from irv2.run import checkpoint
from irv2.run.checkpoint import Checkpoint, CheckpointError
from irv2.run.directory import checkpoints
from irv2.run.resume import load_newest

IMAGENET_CLASSES = 1000
SEEN = (
    *("val", "classes", "allow_resized", "cache_dir", "cache_gb"),
    *("image_size", "mean", "std", "eval_crop", "eval_interpolation"),
)  # keys of section "data" that bear on an evaluation


@dataclass(frozen=True)
class Trained:
    """A network with its weights."""

    model: InceptionResnetV2
    name: str  # its origin, for people
    which: str  # "ema", "raw" or "as published"
    step: int | None
    classes: list[str] | None  # class names in the order of its outputs, if known
    data: Data  # how images are preprocessed
    images: str | None  # its validation images, if known
    remarks: tuple[str, ...] = ()  # what was chosen or changed as it was read
    class_order: str | None = None  # "natural" or "alphabetical", of class folders in training


def load_run(directory: Path, which: str, say: Callable[[str], None]) -> Trained:
    """Load the averaged ("ema") or "raw" weights of a run's newest usable checkpoint.

    Raises CheckpointError, or WeightsError.
    """
    return from_checkpoint(load_newest(directory, say, only=[part(which)]), which)


def from_checkpoint(loaded: Checkpoint, which: str) -> Trained:
    """Build the network of a checkpoint of which `part(which)` was read. Raises WeightsError."""
    cfg, meta, source = loaded.meta["config"], loaded.meta, str(loaded.path)
    model = _network(loaded.parts[part(which)], source, cfg["model"]["blocks"])
    _check_classes(meta["classes"], model, source)
    data = _data(cfg["data"], f"{source}: its metadata is damaged")
    return Trained(model, source, which, meta["step"], meta["classes"], data, data.val)


def _check_classes(classes: list[str], model: InceptionResnetV2, source: str) -> None:
    """Raise WeightsError unless each output of a network has a name."""
    if len(classes) != model.num_classes:
        raise WeightsError(
            f"{source}: has {model.num_classes} outputs, but names for {len(classes)}"
        )


def _network(
    state: dict[str, Tensor], source: str, blocks: Sequence[int] | None
) -> InceptionResnetV2:
    """Build the network of a state dict, in its fast form. Raises WeightsError."""
    return accelerate(weights.build_model(state, source, blocks)).eval()


def load_checkpoints(
    directory: Path, which: str, say: Callable[[str], None], most: int | None = None
) -> list[Trained]:
    """Load a run's usable checkpoints, its newest `most` or all, oldest first; says which it passes
    over. Raises CheckpointError if there is none."""
    networks: list[Trained] = []
    for path in reversed(checkpoints(directory)):
        if len(networks) == most:
            break
        try:
            networks.append(from_checkpoint(checkpoint.load(path, [part(which)]), which))
        except CheckpointError as error:
            say(f"passed over: {error}")
    if not networks:
        raise CheckpointError(f"{directory}: no checkpoint in it that can be read")
    return networks[::-1]


def average(networks: list[Trained], needed: int = 1) -> Trained:
    """Average several checkpoints' weights and batch-norm statistics, oldest first.

    The newest network receives the mean. Raises CheckpointError if there are fewer than `needed`,
    WeightsError if they are of different networks.
    """
    newest = networks[-1]
    if len(networks) < needed:
        raise CheckpointError(
            f"{Path(newest.name).parents[1]}: --average {needed} needs as many checkpoints, and it "
            f"has {len(networks)}; train with a larger checkpoint.keep"
        )
    states = [network.model.state_dict() for network in networks]
    mean = {}
    for name, value in states[-1].items():
        values = [state.get(name) for state in states]
        if any(v is None or v.shape != value.shape for v in values):
            raise WeightsError(
                f"{newest.name}: {name} is missing or of another shape in an older checkpoint"
            )
        if value.is_floating_point():
            value = torch.stack([v.double() for v in values]).mean(0).to(value.dtype)
        mean[name] = value
    newest.model.load_state_dict(mean)
    steps = f"steps {networks[0].step} to {newest.step}"
    return replace(newest, name=f"{newest.name}, mean of {len(networks)} ({steps})")


def seen_as(network: Trained, stated: dict[str, Any]) -> Trained:
    """Return a network whose images are seen otherwise; stated: keys of section "data".

    Raises WeightsError for a view that cannot be.
    """
    return replace(network, data=_data(network.data.model_dump() | stated, "not possible"))


def part(which: str) -> str:
    """The part of a checkpoint that holds "ema" or "raw" weights."""
    return "ema" if which == "ema" else "model"


def load_weights(source: str, which: str | None = None) -> Trained:
    """Load a weights file, or "timm:NAME"; which: as of `weights.read`. Raises WeightsError.

    Without metadata the published settings apply: 299 px, crop 0.8975, bicubic, mean = std = 0.5,
    and 1,000 classes are ImageNet's.
    """
    read = weights.read(source, which)
    meta = metadata.parsed(read.metadata, source)
    check_which(which, meta.result.weights, source)
    model = _network(read.state, source, meta.blocks)
    outputs, classes = model.num_classes, meta.classes
    if model.in_chans != 3:
        raise WeightsError(f"{source}: is for images of {model.in_chans} channels, not for RGB")
    if classes is None and outputs == IMAGENET_CLASSES:
        classes = imagenet_names.synsets()
    if classes is not None:
        _check_classes(classes, model, source)
    stored = meta.data | {"cache_dir": None}  # it may come from another machine
    data = _data(stored, f"{source}: its metadata is damaged")
    images = None if stored.get("val") is None else data.val
    return Trained(
        model,
        source,
        meta.result.weights or "as published",
        meta.result.step,
        classes,
        data,
        images,
        tuple(read.remarks),
        meta.class_order,
    )


def _data(stored: dict[str, Any], fault: str) -> Data:
    """Section "data" from what is stored of `SEEN`, the rest by default.

    Other keys, of training, may be of another version. Raises WeightsError, beginning with `fault`.
    """
    known = {key: stored[key] for key in SEEN if key in stored}
    known = {key: value for key, value in known.items() if value is not None or key != "val"}
    try:
        return Data(**{"train": "unknown", "val": "unknown"} | known)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("data", *first["loc"])))
        reason = first["msg"].removeprefix("Value error, ")
        raise WeightsError(f"{fault} ({key}: {reason})") from None
