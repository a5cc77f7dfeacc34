"""Names of a network's tensors as others have them, and timm's."""

from __future__ import annotations

import torch

from data.names import shown
from irv2.network.forms.base import State, Weights
from irv2.network.model import InceptionResnetV2

# In every form of PyTorch's; what stands before it is a prefix.
STEM = f"{InceptionResnetV2.first_conv}.weight"
COMPILED = "_orig_mod."
CLASSIFIER, OTHER_CLASSIFIER = f"{InceptionResnetV2.classifier}.", "last_linear."
CLASSIFIERS = (CLASSIFIER, f"aux.{CLASSIFIER}")  # whose shapes depend on the classes
IMAGENET_WITH_BACKGROUND = 1001


def split(state: State) -> dict[str, State]:
    """Split tensors by what stands before a network's own names: prefix -> state dict.

    Wrappers leave "module." (DataParallel, averages), "_orig_mod." (torch.compile) and "model."
    (Lightning) there. Tensors of none are left out; of another network, all stay as they are.
    """
    short = {name: name.replace(COMPILED, "") for name in state}
    prefixes = {name.removesuffix(STEM) for name in short.values() if name.endswith(STEM)}
    if not prefixes:
        return {"": state}
    parts: dict[str, State] = {prefix: {} for prefix in sorted(prefixes, key=len, reverse=True)}
    for name, value in state.items():
        prefix = next((prefix for prefix in parts if short[name].startswith(prefix)), None)
        if prefix is not None:
            parts[prefix][short[name].removeprefix(prefix)] = value
    return parts


def remarks(state: State, prefix: str, left_out: int) -> list[str]:
    """Describe what `split` has done to the names of a state dict."""
    left = [prefix] if prefix else []
    if any(COMPILED in name for name in state):
        left.append(COMPILED)
    lines = [f"{shown(' and '.join(left))} is left out of its tensors' names"] if left else []
    if left_out:
        lines.append(f"{left_out} tensors that are not the network's are passed over")
    return lines


def in_timms(state: State) -> State:
    """Give timm's name to the classifier of Cadene's and timm's older files, "last_linear"."""
    return {
        CLASSIFIER + name.removeprefix(OTHER_CLASSIFIER)
        if name.startswith(OTHER_CLASSIFIER)
        else name: value
        for name, value in state.items()
    }


def without_first(state: State, count: int) -> State:
    """Leave out the first outputs of the classifiers."""
    return state | {name: v[count:] for name, v in state.items() if name.startswith(CLASSIFIERS)}


def without_background(weights: Weights, source: str) -> Weights:
    """Leave out the background, TensorFlow's class 0, where classes can only be ImageNet's.

    timm did so as it ported TF-slim's weights.
    """
    outputs = weights.state.get(CLASSIFIER + "weight", torch.empty(0)).shape[:1]
    if "classes" in weights.metadata or outputs != (IMAGENET_WITH_BACKGROUND,):
        return weights
    line = f"{source}: of its 1,001 outputs the first, TensorFlow's background, is left out"
    return Weights(without_first(weights.state, 1), weights.metadata, [*weights.remarks, line])
