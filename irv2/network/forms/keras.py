"""Keras' files: .h5 of keras-applications, .weights.h5 and .keras."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import BadZipFile

import numpy as np

from data import strict_json
from irv2.network.forms import layers
from irv2.network.forms.base import State, Weights, WeightsError, in_one_line

WEIGHTS, CONFIG = "model.weights.h5", "config.json"  # members of .keras
ENDS = [  # of residual blocks
    *(f"block35_{i}_conv" for i in range(1, 11)),
    *(f"block17_{i}_conv" for i in range(1, 21)),
    *(f"block8_{i}_conv" for i in range(1, 11)),
]
LAST = "conv2d_7b"  # the one unit that Keras gives a name
DAMAGES = (AttributeError, LookupError, TypeError, ValueError, RuntimeError, OSError, BadZipFile)
PREPROCESSING = {"Rescaling", "Normalization", "Resizing", "CenterCrop"}  # layers of a model
BATCH_NORM = ("gamma", "beta", "moving_mean", "moving_variance")

Layer = dict[str, np.ndarray]  # variable, by name or by number -> values


class Kinds(NamedTuple):
    """Layers of a file by their names there."""

    convolutions: dict[str, Layer]
    batch_norms: dict[str, Layer]
    dense: dict[str, Layer]

    @classmethod
    def of(cls, by_name: Mapping[str, Layer]) -> Kinds:
        """Sort layers by their variables' dimensions."""
        kinds = cls({}, {}, {})
        by_dimensions = {4: kinds.convolutions, 2: kinds.dense, 1: kinds.batch_norms}
        for name, layer in by_name.items():
            dimensions = max(values.ndim for values in layer.values())
            by_dimensions.get(dimensions, {})[name] = layer
        return kinds


def read(path: Path) -> Weights:
    """Read a file of Keras' Inception-ResNet-v2; of a model.save, its size of images, too.

    Raises WeightsError.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                stored, _ = _read_hdf5(io.BytesIO(_member(archive, WEIGHTS)))
                config = _member(archive, CONFIG)
        else:
            with open(path, "rb") as file:
                stored, config = _read_hdf5(file)
        layers_of_model = [] if config is None else list(_layers(strict_json.parse(config)))
        metadata = _size(layers_of_model)
    except ImportError:
        raise WeightsError(
            f"{path}: Keras' files need h5py: pip install -r requirements-keras.txt"
        ) from None
    except DAMAGES as error:
        raise WeightsError(f"{path}: damaged or not Keras' ({in_one_line(error)})") from None
    try:
        return Weights(in_timms(stored), metadata, _not_followed(layers_of_model, path))
    except (LookupError, TypeError, ValueError) as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else in_one_line(error)
        raise WeightsError(f"{path}: not Keras' Inception-ResNet-v2 ({reason})") from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a member of .keras. Raises ValueError for one that could grow."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which Keras never does")
    return archive.read(name)


def _read_hdf5(file: BinaryIO) -> tuple[Kinds, bytes | str | None]:
    """Read every layer's variables, and the model's config if it is there.

    A layer is called as its group, or as the attribute "name" has it. Raises ValueError for values
    that are not all in the file.
    """
    import h5py

    by_name: dict[str, Layer] = defaultdict(dict)

    def visit(path: str, item: Any) -> None:
        is_values = isinstance(item, h5py.Dataset) and item.dtype.kind == "f"
        if not is_values or path.startswith("optimizer"):
            return
        if item.is_virtual or item.external or item.id.get_storage_size() < item.nbytes:
            raise ValueError(f"{path} is not stored plainly")
        group, _, variable = path.rpartition("/")
        layer = group.removesuffix("/vars").rpartition("/")[2]
        by_name[str(item.parent.attrs.get("name", layer))][variable.partition(":")[0]] = item[()]

    with h5py.File(file, "r") as content:
        content.visititems(visit)
        config = content.attrs.get("model_config")
    return Kinds.of(by_name), config


def _layers(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the layers in a model's config, those of models within it, too."""
    for layer in model["config"].get("layers", ()):
        yield layer
        yield from _layers(layer)


def _size(layers_of_model: list[dict[str, Any]]) -> dict[str, str]:
    """The size of images that a model was made for, as metadata."""
    first = layers_of_model[0]["config"] if layers_of_model else {}
    shape = first.get("batch_shape") or first.get("batch_input_shape") or [None] * 4
    _, height, width, _ = shape
    return {"data": json.dumps({"image_size": height})} if height and height == width else {}


def _not_followed(layers_of_model: list[dict[str, Any]], path: Path) -> list[str]:
    """Say which layers of a model change images before its first convolution."""
    kinds = [layer.get("class_name") for layer in layers_of_model]
    if not (named := [kind for kind in kinds if kind in PREPROCESSING]):
        return []
    return [
        f"{path}: its layers {', '.join(named)} are left out: pixels are scaled to -1 and 1, as "
        "keras.applications does, unless --mean and --std say otherwise"
    ]


# ------------------------------------------------------------------------ names


def in_timms(stored: Kinds) -> State:
    """Give layers timm's names and PyTorch's shapes.

    Raises KeyError for a layer or variable that is missing, ValueError for another number."""
    convolutions, batch_norms = _places(stored)
    state: State = {}
    for name, place in convolutions.items():
        state |= layers.convolution(name, *_values(stored.convolutions[place], ("kernel", "bias")))
    for name, place in batch_norms.items():
        layer = stored.batch_norms[place]
        first = 0 if len(layer) == len(BATCH_NORM) else 1
        gamma = [] if first == 0 else [None]
        state |= layers.batch_norm(name, *gamma, *_values(layer, BATCH_NORM[first:]))
    if len(stored.dense) > 1:
        raise ValueError(f"{len(stored.dense)} dense layers")
    for layer in stored.dense.values():
        state |= layers.linear("classif", *_values(layer, ("kernel", "bias")))
    return state


def _values(layer: Layer, names: Sequence[str]) -> list[np.ndarray]:
    """A layer's variables in this order, by their names, or by number where these are not kept."""
    are_numbered = "0" in layer
    return [layer[str(i) if are_numbered else name] for i, name in enumerate(names[: len(layer)])]


def _places(stored: Kinds) -> tuple[dict[str, str], dict[str, str]]:
    """timm's names of convolutions and of batch norms -> the layers' names in the file.

    With Keras' own names, layers without one of their author's are counted as they were created.
    In .weights.h5 of older versions all of a class are counted, in the order of `Model.layers`.
    """
    units, ends = layers.layers()
    convolutions = _counted(stored.convolutions, "conv2d")
    batch_norms = _counted(stored.batch_norms, "batch_normalization")
    if ENDS[0] not in stored.convolutions:
        order = list(_in_model_layers())
        bare = [name for name in order if name not in ends]
        return layers.paired(order, convolutions), layers.paired(bare, batch_norms)
    unnamed = [name for name in units if name != LAST]
    convolutions = (
        layers.paired(unnamed, convolutions) | layers.paired(ends, ENDS) | {LAST: "conv_7b"}
    )
    batch_norms = layers.paired(unnamed, batch_norms) | {LAST: "conv_7b_bn"}
    return convolutions, batch_norms


def _counted(names: Iterable[str], kind: str) -> list[str]:
    """Names such as conv2d, conv2d_1, …, in the order of their numbers."""
    matches = [
        match for name in names if (match := re.fullmatch(rf"{kind}(?:_(\d{{1,9}}))?", name))
    ]
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]


def _in_model_layers() -> Iterator[str]:
    """Names of convolutions as Keras' `Model.layers` has them.

    It sorts by the distance from the output, which in a block is that from its end, and layers of
    one distance by branch.
    """
    ends = set(layers.layers().ends)
    for block, branches in layers.layers().by_block():
        apart = [
            (len(branch) - place, name) for branch in branches for place, name in enumerate(branch)
        ]
        yield from (name for _, name in sorted(apart, key=lambda pair: -pair[0]))
        if f"{block}.conv2d" in ends:
            yield f"{block}.conv2d"
