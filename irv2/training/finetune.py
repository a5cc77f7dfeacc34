"""Fine-tuning: a new run's first weights, which of them stay fixed, learning rates by stage."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from data.names import are_same, in_nfc, natural
from irv2.network import weights
from irv2.network.forms import metadata
from irv2.network.forms.base import State, Weights, WeightsError
from irv2.network.forms.names import CLASSIFIERS
from irv2.network.model import InceptionResnetV2
from irv2.training.distributed import World
from irv2.training.state import TrainState

# The part of the network's stages, counted from the classifier, that is not trained.
FROZEN = {"stem": slice(-1, None), "backbone": slice(1, None)}
AUX = "aux."


def lr_scales(model: InceptionResnetV2, layer_decay: float) -> dict[str, float]:
    """Share of the learning rate for each of the network's children: `layer_decay` to the power of
    its stage, counted from the classifier's 0."""
    return {child: layer_decay**i for i, stage in enumerate(model.stages()) for child in stage}


def freeze(model: InceptionResnetV2, part: str) -> None:
    """Freeze the parameters of a part of FROZEN; its batch norm then keeps its statistics, too."""
    for child in chain(*model.stages()[FROZEN[part]]):
        getattr(model, child).requires_grad_(False)


def begin(state: TrainState, source: str, classes: list[str], world: World) -> None:
    """Give a new run's network and its average the weights of a file or "timm:NAME", and say so.

    Raises WeightsError.
    """
    pretrained = _read(source, world)
    meta = metadata.parsed(pretrained.metadata, source)
    named = meta.classes
    if named is None and meta.class_order == "natural":
        named = sorted(classes, key=natural)
    outcome = load(state.model, pretrained.state, named, classes, source)
    state.ema.module.load_state_dict(state.model.state_dict())
    for line in (*pretrained.remarks, outcome):
        world.say(line)


def _read(source: str, world: World) -> Weights:
    """Read weights on every rank: first on the main one, so that the others find its
    download on the disk."""
    pretrained = error = None
    if world.is_main:
        try:
            pretrained = weights.read(source)
        except WeightsError as raised:  # below, once the others no longer wait
            error = raised
    world.any(False)
    if error is not None:
        raise error
    return weights.read(source) if pretrained is None else pretrained


def load(
    model: InceptionResnetV2,
    state: dict[str, Tensor],
    named: list[str] | None,
    classes: list[str],
    source: str,
) -> str:
    """Load a state dict except classifiers of other classes; returns what was done, in words.

    The classifier is kept if the file's classes, `named`, are `classes`, in whichever order, or if
    the file does not name them and has as many. An auxiliary head that the file lacks stays new,
    one that the model lacks is left out. Raises WeightsError, naming a tensor, where anything else
    does not fit.
    """
    weight = f"{model.classifier}.weight"
    if state.get(weight, torch.empty(0, 0)).ndim != 2:
        raise WeightsError(f"{source}: {weight} is not a matrix")
    count = f"{len(classes):,} classes"
    new: tuple[str, ...] = ()
    ordered = _in_order(state, named, classes)
    if ordered is not None:
        order = "" if are_same(named, classes) else ", its rows put into their order"
        state, outcome = ordered, f"classifier kept, of the same {count}{order}"
    elif weight not in state:
        new, outcome = CLASSIFIERS, f"new classifier for {count}, as it has none"
    elif named is None and len(state[weight]) == len(classes):
        outcome = f"classifier kept, of {count} that it does not name"
        if sorted(classes, key=natural) != classes:
            outcome += ", taken to be in alphabetical order (timm's is class2 before class10)"
    else:
        others = len(state[weight])
        new, outcome = CLASSIFIERS, f"new classifier for {count}, as its {others:,} are others"
    if model.aux is not None and not any(name.startswith(AUX) for name in state):
        new += (AUX,)
        outcome += "; new auxiliary head"
    left_out = new if model.aux is not None else (*new, AUX)
    merged = {name: value for name, value in state.items() if not name.startswith(left_out)}
    merged |= {name: v for name, v in model.state_dict().items() if name.startswith(new)}
    weights.load_into(model, merged, source)
    return f"begins from {source}: {outcome}"


def _in_order(state: State, named: list[str] | None, classes: list[str]) -> State | None:
    """Put a classifier's rows into the order of `classes`; None if it is of others."""
    place = {in_nfc(name): row for row, name in enumerate(named or ())}
    heads = {name: value for name, value in state.items() if name.startswith(CLASSIFIERS)}
    sizes = {len(classes), len(named or ()), *map(len, heads.values())}
    if len(sizes) > 1 or place.keys() != set(map(in_nfc, classes)) or not heads:
        return None
    rows = [place[in_nfc(name)] for name in classes]
    return state | {name: value[rows] for name, value in heads.items()}
