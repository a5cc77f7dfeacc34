"""timm's hub and folders: weights, and beside them how images are seen and what classes are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
import timm
from huggingface_hub.utils import EntryNotFoundError
from pydantic import BaseModel, Field, TypeAdapter

from data import strict_json
from irv2.network.forms import kinds, metadata, names, views
from irv2.network.forms.base import Weights, WeightsError, in_one_line
from irv2.network.model import InceptionResnetV2

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")  # as timm prefers them
ADVICE = (
    "the hub needs a network: download the weights where there is one, and give the file's path "
    "instead"
)
# Arguments of timm's network that change what it computes, and their values here.
FIXED = {"norm_eps": 1e-3, "norm_layer": "batchnorm2d", "act_layer": "relu", "global_pool": "avg"}

MAX_BYTES = 64 << 20  # of a config.json

ReadFile = Callable[[Path], Weights]


class HubConfig(BaseModel):
    """config.json as timm writes it."""

    architecture: str
    label_names: list[str] | dict[int, str] | None = None
    label_offset: Annotated[int, Field(ge=0)] = 0  # outputs before the first class
    global_pool: str = "avg"
    model_args: dict[str, Any] = {}
    pretrained_cfg: dict[str, Any]  # how images are seen


_CONFIG = TypeAdapter(HubConfig)


def read_registered(name: str) -> Weights:
    """Read the published weights of a network that timm has by name. Raises WeightsError."""
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise WeightsError(f"timm:{name}: not available ({in_one_line(error)}); {ADVICE}") from None
    return Weights(model.state_dict(), *views.of_config(model.pretrained_cfg, {}, f"timm:{name}"))


def read_hub(name: str, read: ReadFile) -> Weights:
    """Read a repository of Hugging Face's hub in timm's form, ORG/NAME or ORG/NAME@REVISION.

    Raises WeightsError.
    """
    repository, _, revision = name.partition("@")

    def fetch(file: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision or None))

    try:
        config = fetch(CONFIG)
        try:
            weights = fetch(FILES[0])
        except EntryNotFoundError:
            weights = fetch(FILES[1])
    except Exception as error:
        reason = in_one_line(error)
        raise WeightsError(f"hf-hub:{name}: not available ({reason}); {ADVICE}") from None
    return _with_config(config, read(weights), f"hf-hub:{name}")


def read_folder(folder: Path, read: ReadFile) -> Weights:
    """Read a folder in timm's form: config.json beside model.safetensors or pytorch_model.bin.

    Raises WeightsError.
    """
    weights = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if weights is None or not (folder / CONFIG).is_file():
        kinds.refuse_folder(folder, f"{CONFIG} and {' or '.join(FILES)}")
    return _with_config(folder / CONFIG, read(weights), str(folder))


def beside_config(weights: Weights, path: Path) -> Weights:
    """Add a remark to a file's weights where its folder has a config.json that is not followed."""
    is_of_folder = path.name in FILES and (path.parent / CONFIG).is_file()
    if not is_of_folder or "data" in weights.metadata:
        return weights
    line = (
        f"{path}: {CONFIG} beside it, which may say its view and classes, is not followed: give "
        f"the folder, {path.parent}, for that"
    )
    return Weights(weights.state, weights.metadata, [*weights.remarks, line])


def _with_config(path: Path, weights: Weights, source: str) -> Weights:
    """Add what timm's config.json says to weights; it goes before what these say themselves."""
    config = _read_config(path)
    texts, remarks = views.of_config(config.pretrained_cfg, {}, source)
    own, theirs = metadata.parsed(weights.metadata, source), metadata.parsed(texts, source)
    theirs.classes = _classes(config, source)
    differing = [key for key, value in theirs.data.items() if own.data.get(key, value) != value]
    if None not in (own.classes, theirs.classes) and own.classes != theirs.classes:
        differing.append("classes")
    if differing:
        remarks.append(
            f"{source}: {CONFIG} and the weights' own metadata differ in {', '.join(differing)}; "
            f"{CONFIG} is followed"
        )
    merged = {"data": own.data | theirs.data, "classes": theirs.classes or own.classes}
    texts = {key: json.dumps(value) for key, value in merged.items() if value is not None}
    state = weights.state
    if offset := config.label_offset:
        state = names.without_first(state, offset)
        remarks.append(f"{source}: its first {offset} outputs are left out, as label_offset says")
    return Weights(state, weights.metadata | texts, [*weights.remarks, *remarks])


def _read_config(path: Path) -> HubConfig:
    """Read config.json, also in its older form without a part of its own for the view.

    Raises WeightsError if it is damaged, or another network's.
    """
    try:
        content = strict_json.load(path, MAX_BYTES)
        nested = content.get("pretrained_cfg", content)
        entries = {"pretrained_cfg": nested, "label_names": nested.get("labels")} | nested | content
        entries = {key: value for key, value in entries.items() if value is not None}
        config = strict_json.checked(entries, _CONFIG)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        reason = in_one_line(error)
        raise WeightsError(f"{path}: damaged or not timm's ({reason})") from None
    if not config.architecture.startswith(InceptionResnetV2.timm_name):
        raise WeightsError(
            f"{path}: is for {config.architecture}, not for {InceptionResnetV2.title}"
        )
    asked = {"global_pool": config.global_pool} | config.model_args
    changed = [key for key, value in FIXED.items() if asked.get(key, value) != value]
    if changed:
        raise WeightsError(f"{path}: asks for another {', '.join(changed)} than this network has")
    return config


def _classes(config: HubConfig, source: str) -> list[str] | None:
    """Class names in the order of the outputs. Raises WeightsError where some are missing."""
    labels = config.label_names
    if not isinstance(labels, dict):
        return labels
    if sorted(labels) != list(range(len(labels))):
        raise WeightsError(f"{source}: {CONFIG} does not name every class")
    return [labels[i] for i in range(len(labels))]
