"""Fine-tuning: the weights that a new run begins with, what of them stays, and rates by stage."""

from __future__ import annotations

import json
from itertools import chain

from torch import Tensor

from irv2 import weights
from irv2.distributed import World
from irv2.engine import TrainState
from irv2.model import InceptionResnetV2
from irv2.weights import WeightsError

# The network's children, stage by stage from the classifier to the image.
STAGES = (
    ("classif", "aux"),
    ("conv2d_7b", "block8"),
    ("repeat_2",),
    ("mixed_7a",),
    ("repeat_1",),
    ("mixed_6a",),
    ("repeat",),
    ("mixed_5b",),
    ("conv2d_4a", "conv2d_3b", "conv2d_2b", "conv2d_2a", "conv2d_1a"),
)
FROZEN = {"stem": STAGES[-1:], "backbone": STAGES[1:]}
CLASSIFIERS = ("classif.", "aux.classif.")  # whose shapes depend on the classes
AUX = "aux."


def lr_scales(layer_decay: float) -> dict[str, float]:
    """Share of the learning rate of each of the network's children: `layer_decay` to the power of
    its stage, counted from the classifier's 0."""
    return {child: layer_decay**i for i, stage in enumerate(STAGES) for child in stage}


def freeze(model: InceptionResnetV2, part: str) -> None:
    """Train no parameter of a part of FROZEN; its batch norm then keeps its statistics, too."""
    for child in chain(*FROZEN[part]):
        getattr(model, child).requires_grad_(False)


def begin(state: TrainState, source: str, classes: list[str], world: World) -> None:
    """Give a new run's network and its average the weights of a file or "timm:NAME", and say so.

    Raises WeightsError.
    """
    found, metadata = _read(source, world)
    told = load(state.model, found, _class_names(metadata, source), classes, source)
    state.ema.module.load_state_dict(state.model.state_dict())
    world.say(told)


def _read(source: str, world: World) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata on every rank: first on the main one, so that the others find on the
    disk what it fetched from a hub."""
    found = error = None
    if world.is_main:
        try:
            found = weights.read(source)
        except WeightsError as raised:  # not before the others have stopped waiting
            error = raised
    world.any(False)
    if error is not None:
        raise error
    return weights.read(source) if found is None else found


def _class_names(metadata: dict[str, str], source: str) -> list[str] | None:
    """The names of a file's classes, if it knows them."""
    try:
        return json.loads(metadata.get("classes", "null"))
    except ValueError:
        raise WeightsError(f"{source}: its metadata is damaged (classes)") from None


def load(
    model: InceptionResnetV2,
    state: dict[str, Tensor],
    named: list[str] | None,
    classes: list[str],
    source: str,
) -> str:
    """Load a state dict but for classifiers of other classes; returns what was done, in words.

    The classifier is kept if the file's classes, `named`, are `classes`, or if the file does not
    name them and has as many. An auxiliary head that the file lacks stays new, one that the model
    lacks is left out. Raises WeightsError, naming a tensor, where anything else does not fit.
    """
    count = f"{len(classes):,} classes"
    new: tuple[str, ...] = ()
    if named == classes:
        told = f"classifier kept, of the same {count}"
    elif "classif.weight" not in state:
        new, told = CLASSIFIERS, f"new classifier for {count}, as it has none"
    elif named is None and len(state["classif.weight"]) == len(classes):
        told = f"classifier kept, of {count} that it does not name"
    else:
        others = len(state["classif.weight"])
        new, told = CLASSIFIERS, f"new classifier for {count}, as its {others:,} are others"
    if model.aux is not None and not any(name.startswith(AUX) for name in state):
        new += (AUX,)
        told += "; new auxiliary head"
    left_out = new if model.aux is not None else (*new, AUX)
    merged = {name: value for name, value in state.items() if not name.startswith(left_out)}
    merged |= {name: v for name, v in model.state_dict().items() if name.startswith(new)}
    weights.load_into(model, merged, source)
    return f"begins from {source}: {told}"
