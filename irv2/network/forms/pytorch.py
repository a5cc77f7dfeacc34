"""Files of PyTorch and safetensors, and the sets of weights in a trainer's checkpoint."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from data.errors import enumeration, panics_as_errors
from data.files import check_torch_zip
from irv2.network.forms import names
from irv2.network.forms.base import State, Weights, WeightsError, in_one_line
from irv2.network.forms.kinds import STATE_DICT

AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?)(?![a-z])", re.IGNORECASE)
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
CLASSES = ("class_to_idx", "idx_to_class", "class_names", "classes")  # beside weights
DEEPEST = 2  # keys above a state dict, as in content["state_dict"]["model"]


def read_safetensors(path: Path) -> Weights:
    """Read tensors and metadata of a safetensors file. Raises WeightsError."""
    try:
        with panics_as_errors(), safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Weights(state, file.metadata() or {})
    except Exception as error:
        reason = in_one_line(error)
        raise WeightsError(f"{path}: damaged or not a safetensors file ({reason})") from None


def read_torch(path: Path) -> Any:
    """Load what `torch.save` wrote onto the CPU; nothing in the file is run.

    Beside tensors, numbers and texts it may hold the argparse.Namespace of a trainer's arguments.
    Raises WeightsError.
    """
    try:
        check_torch_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(f"{path}: {_unwanted(path)}; nothing in it was run") from None
    except Exception as error:
        reason = in_one_line(error)
        raise WeightsError(f"{path}: damaged or not a PyTorch file ({reason})") from None


def _unwanted(path: Path) -> str:
    """Describe what a pickle holds beside tensors and numbers, and what to do."""
    try:
        classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # an older form, or a damaged one
        classes = []
    if any(name.startswith("torch.nn.modules.") for name in classes):
        return f"a whole pickled module, whose classes would be run: {STATE_DICT}"
    what = f", but also {enumeration(classes)}" if classes else ""
    return f"not a file of tensors and numbers only{what}: {STATE_DICT}"


def named_classes(content: Any, source: str) -> tuple[dict[str, str], list[str]]:
    """Find the classes that a checkpoint names beside its weights: metadata and remarks.

    They are a list in the order of the outputs, or say the output of each name, or the other way.
    """
    for key in CLASSES if isinstance(content, dict) else ():
        named = content.get(key)
        if isinstance(named, dict):
            output_of = {output: name for name, output in named.items() if type(output) is int}
            by_output = output_of or named
            named = [by_output.get(output) for output in range(len(named))]
        if not isinstance(named, list):
            continue
        if named and all(isinstance(name, str) for name in named):
            return {"classes": json.dumps(named)}, []
        return {}, [f"{source}: its {key} does not name every output, and is passed over"]
    return {}, []


# ------------------------------------------------------------------------ sets of weights


class Set(NamedTuple):
    """One of the sets of weights in a file."""

    place: str  # the keys and the prefix that it stands under
    is_averaged: bool
    state: State
    remarks: list[str]  # on its names


def chosen(content: Any, which: str | None, source: str) -> Weights:
    """Choose among the sets of weights of a file: "raw" ones, or averaged ones if there are any.

    Raises WeightsError if there are none, several of a kind, or not those asked for.
    """
    every = list(_sets(content))
    if not every:
        raise WeightsError(f"{source}: holds no state dict: {STATE_DICT}")
    sets = [each for each in every if names.STEM in each.state]
    if not sets:
        return Weights(every[0].state, {})  # of another network
    averaged = [each for each in sets if each.is_averaged]
    raw = [each for each in sets if not each.is_averaged]
    taken, left = (raw, averaged) if which == "raw" else (averaged, raw)
    if which is None and not averaged:
        taken, left = raw, []
    check_which(which, "raw" if not averaged else None if raw else "ema", source)
    if len(taken) > 1:
        places = enumeration([each.place for each in taken])
        raise WeightsError(f"{source}: holds several sets of weights ({places}): keep one in it")
    (one,) = taken
    remarks = [f"{source}: {line}" for line in one.remarks]
    if left:
        kinds = ("averaged", "raw") if one.is_averaged else ("raw", "averaged")
        others = enumeration([each.place for each in left])
        remarks.append(
            f"{source}: its {kinds[0]} weights are taken ({one.place}), not the {kinds[1]} ones "
            f"beside them ({others})"
        )
    is_known = averaged or which
    kind = json.dumps({"weights": "ema" if one.is_averaged else "raw"})
    return Weights(one.state, {"result": kind} if is_known else {}, remarks)


def check_which(asked: str | None, there: str | None, source: str) -> None:
    """Raise WeightsError if a file holds only the other kind of weights: "ema" or "raw"."""
    kinds = {"ema": "averaged", "raw": "raw"}
    if there in kinds and asked not in (None, there):
        raise WeightsError(f"{source}: holds {kinds[there]} weights alone, no {kinds[asked]} ones")


def _sets(content: Any, place: str = "", depth: int = DEEPEST) -> Iterator[Set]:
    """Find the state dicts in a file's content, those of other networks among them."""
    if not isinstance(content, dict):
        return
    if _is_state(content):
        parts = names.split(content)
        left_out = len(content) - sum(map(len, parts.values())) - (COUNTER in content)
        for prefix, state in parts.items():
            where = ": ".join(part for part in (place, prefix) if part)
            is_averaged = COUNTER in content or AVERAGED.search(where) is not None
            yield Set(where, is_averaged, state, names.remarks(content, prefix, left_out))
    elif depth:
        for key, value in content.items():
            yield from _sets(value, f"{place}.{key}" if place else str(key), depth - 1)


def _is_state(content: dict[Any, Any]) -> bool:
    return bool(content) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
