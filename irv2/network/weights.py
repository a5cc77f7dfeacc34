"""State dicts in and out, under timm's names: files of every form, timm's hub, our runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from data.files import write_atomically
from irv2.network.forms import hub, keras, kinds, names, pytorch, tensorflow, views
from irv2.network.forms.base import State, Weights, WeightsError
from irv2.network.model import FIRST_CHANNELS, InceptionResnetV2, inception_resnet_v2

CLASSIFIER = f"{names.CLASSIFIER}weight"
ENDS = {names.STEM: 4, CLASSIFIER: 2}  # tensors at the ends of the network: dimensions
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read(source: str, which: str | None = None) -> Weights:
    """Read weights as what they are: a file, a folder in timm's form, or a name on a hub.

    source: a path; "timm:NAME" for timm's own; "hf-hub:ORG/NAME" or "local-dir:PATH", as timm has
    it, also behind "timm:". which: "ema" or "raw", of a file with averaged and raw weights; None:
    the averaged ones, if there are any. Nothing in a file is run. Raises WeightsError.
    """
    kind, _, name = source.removeprefix("timm:").partition(":")
    if kind in ("hf-hub", "hf_hub"):
        stored = hub.read_hub(name, lambda path: _read_file(path, which))
    elif kind == "local-dir" or Path(source).is_dir():
        folder = Path(name if kind == "local-dir" else source)
        stored = hub.read_folder(folder, lambda path: _read_file(path, which))
    elif tensorflow.prefix(source) is not None:
        stored = tensorflow.read(source, which)
    elif source.startswith("timm:"):
        stored = hub.read_registered(source.removeprefix("timm:"))
    else:
        stored = hub.beside_config(_read_file(Path(source), which), Path(source))
    return names.without_background(stored, source)


def _read_file(path: Path, which: str | None) -> Weights:
    """Read a file by its form. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    kind = kinds.of_file(path)
    if kind == "keras":
        return keras.read(path)
    if kind == "tensorflow":
        return tensorflow.read(str(path), which)
    if kind == "safetensors":
        file = pytorch.read_safetensors(path)
        content, (texts, remarks) = file.state, (file.metadata, [])
    else:
        content = pytorch.read_torch(path)
        texts, remarks = views.of_trainer(content, str(path))
        classes, more = pytorch.named_classes(content, str(path))
        texts, remarks = texts | classes, remarks + more
    stored = pytorch.chosen(content, which, str(path))
    state = names.in_timms(stored.state)
    return Weights(state, stored.metadata | texts, [*stored.remarks, *remarks])


def write(path: Path, state: State, metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors, whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def build_model(
    state: State, source: str, blocks: Sequence[int] | None = None
) -> InceptionResnetV2:
    """Build the network of a state dict, with its weights; an auxiliary head is left out.

    blocks: repeats of its three kinds; None: the published network's.
    Raises WeightsError, naming `source`, if they are another network's, before memory is taken for
    more than is stored.
    """
    blocks = blocks or InceptionResnetV2.published[0]
    kept = {key: value for key, value in state.items() if not key.startswith("aux.")}
    for name, dimensions in ENDS.items():
        if name not in kept or kept[name].ndim != dimensions:
            what = f"no {name} of {dimensions} dimensions in it"
            raise WeightsError(f"{source}: not an {InceptionResnetV2.title} ({what})")
    if sum(blocks) > len(kept):
        raise WeightsError(f"{source}: says that it has {list(blocks)} blocks, and holds fewer")
    first_channels, in_chans = kept[names.STEM].shape[:2]
    width, num_classes = first_channels / FIRST_CHANNELS, len(kept[CLASSIFIER])
    try:
        with torch.device("meta"):
            model = inception_resnet_v2(num_classes, in_chans, blocks=blocks, width=width)
    except (ValueError, RuntimeError) as error:
        raise WeightsError(f"{source}: not an {InceptionResnetV2.title} ({error})") from None
    load_into(model, kept, source, assign=True)
    return model


def load_into(model: nn.Module, state: State, source: str, assign: bool = False) -> None:
    """Load a whole state dict in the network's own types; assign: into copies, not in place.

    Raises WeightsError, naming `source` and a tensor, if it is another network's, of another kind
    of numbers, or not finite.
    """
    kinds = {name: value.dtype for name, value in model.state_dict().items() if name in state}
    for name, kind in kinds.items():
        if fault := _fault(name, state[name], kind.is_floating_point):
            raise WeightsError(f"{source}: {name} {fault}")
    if assign:
        as_own = {"copy": True, "memory_format": torch.contiguous_format}
        state = state | {n: state[n].detach().to(kind, **as_own) for n, kind in kinds.items()}
    try:
        model.load_state_dict(state, strict=True, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1].split())[:200]
        raise WeightsError(f"{source}: does not fit this network: {reason}") from None


def _fault(name: str, value: Tensor, is_weight: bool) -> str | None:
    """Say what is wrong with a tensor that should hold a layer's weights, or else a counter."""
    if value.layout is not torch.strided or (is_weight and value.dtype not in FLOATS):
        kind = str(value.dtype).removeprefix("torch.")
        return f"holds {kind} numbers, not float32, float16, bfloat16 or float64"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"has the shape {list(value.shape)}, and fewer numbers are stored"
    is_filled = is_weight and value.numel() > 0
    if is_filled and not torch.stack(value.float().aminmax()).isfinite().all():
        return "holds numbers that are not finite"
    if name.endswith("running_var") and is_filled and value.min() < 0:  # their roots are NaN,
        return "holds variances below zero"  # of which fused convolutions on CPUs make zero
    return None
