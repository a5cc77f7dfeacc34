"""Which engine runs a network: the one asked for or the fastest, if its logits are PyTorch's."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from data import user_cache
from data.errors import UserError
from data.files import read_text, write_atomically
from data.optional import is_installed
from irv2.engines.graph import onnx_graph
from irv2.engines.onnxruntime import ONNXRuntime
from irv2.engines.openvino import OpenVINO

TORCH, AUTO = "torch", "auto"
ENGINES = {"openvino": OpenVINO, "onnxruntime": ONNXRuntime}
NAMES = (TORCH, *ENGINES, AUTO)
# Most that a logit may differ from PyTorch's in float32, as a share of the largest. Measured on the
# whole network: 8e-7 in fp32, 4e-3 in bf16, 6e-4 in fp16.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}
TIMED = 8  # images of the first batch on which engines are checked and timed
ROUNDS = 3
LONGEST_NAME = 100  # bytes


class EngineError(UserError):
    """An engine that is not installed, or does not compute what was asked for."""


def check(name: str, precision: str, device: torch.device) -> None:
    """Raise EngineError for an engine that cannot run here."""
    if name != TORCH and precision == "fast":
        raise EngineError("--fast is PyTorch's: --engine goes with --precision bf16")
    if name in (TORCH, AUTO):
        return
    if device.type != "cpu":
        raise EngineError(f"--engine {name} computes on CPUs: add --device cpu, or leave it out")
    if not is_installed(name):
        raise EngineError(
            f"--engine {name} is not installed: pip install -r requirements-inference.txt"
        )
    if precision not in (able := ENGINES[name].precisions):
        raise EngineError(f"--engine {name} computes in {', '.join(able)} on CPUs")


def runner(name: str, model: nn.Module, precision: str, say: Callable[[str], None]) -> nn.Module:
    """Return what runs a network: the model as it is for "torch" and on GPUs, else `Checked`.

    model: in evaluation, as PyTorch is to run it. say: called with the choice, or why not.
    """
    if name == TORCH or next(model.parameters()).device.type != "cpu":
        return model
    return Checked(name, model, precision, say)


def named(precision: str, run: nn.Module) -> str:
    """Name a precision, with the engine that computed in it if it was not PyTorch."""
    by = run.name if isinstance(run, Checked) and run.name != TORCH else None
    return precision if by is None else f"{precision} by {by}"


class Checked(nn.Module):
    """Runs a network by an engine whose logits of the first images are PyTorch's, else by PyTorch.

    [B, 3, H, W] -> [B, C]. Images of the first call decide, and `name` says what runs after it.
    """

    def __init__(
        self, name: str, model: nn.Module, precision: str, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.name, self.precision, self.say = name, precision, say
        self.model, self.run = model, None

    def forward(self, images: Tensor) -> Tensor:
        if self.run is None:
            self.name, self.run = self._chosen(images[:TIMED])
            self.model = None
        return self.run(images)

    def _chosen(self, images: Tensor) -> tuple[str, nn.Module]:
        """Return the engine asked for, or the fastest, and its name."""
        if self.name != AUTO:
            return self._sound([self.name], images)[-1]
        place = self._note(images.shape)
        known = _remembered(place)
        if known == TORCH:
            return TORCH, self.model
        if known is not None:
            return self._sound([known], images)[-1]
        able = [name for name in ENGINES if self.precision in ENGINES[name].precisions]
        sound = self._sound(list(filter(is_installed, able)), images)
        rates = {name: _images_per_s(run, images) for name, run in sound}
        best = max(rates, key=rates.get)
        shown = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        self.say(
            f"engine: {best} (images/s in {self.precision}, {len(images)} at once: {shown}), and "
            "so from now on on this machine for networks of this kind"
        )
        _remember(place, best)
        return best, dict(sound)[best]

    def _sound(self, names: list[str], images: Tensor) -> list[tuple[str, nn.Module]]:
        """List PyTorch and the engines of these names that compute the same."""
        with torch.autocast("cpu", enabled=False):  # the caller's; a graph would have its casts
            expected = self.model(images)
            graph = onnx_graph(self.model, images.shape[-1]) if names else b""
        sound: list[tuple[str, nn.Module]] = [(TORCH, self.model)]
        for name in names:
            try:
                run = ENGINES[name](graph, self.precision)
                difference = (run(images) - expected).abs().max() / expected.abs().max()
            except Exception as error:  # whatever it is, PyTorch can do it
                reason = " ".join(str(error).split())[:200]
                self.say(f"{name}: cannot run this network ({reason}); PyTorch runs it")
                continue
            most = TOLERANCES[self.precision]
            if difference <= most:  # NaN is not
                sound.append((name, run))
            else:
                self.say(
                    f"{name}: its logits of the first images differ from PyTorch's in fp32 by "
                    f"{difference:.1g} of the largest, allowed: {most:g}; PyTorch runs this network"
                )
        return sound

    def _note(self, batch: torch.Size) -> Path | None:
        """Name the file that remembers the fastest engine for networks of this kind here."""
        shapes = [(name, list(value.shape)) for name, value in self.model.state_dict().items()]
        machine = (platform.node(), platform.machine(), torch.get_num_threads())
        kind = (shapes, self.precision, list(batch), machine, _versions())
        digest = hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:32]
        folder = user_cache.folder("engines")
        return None if folder is None else folder / digest


def _versions() -> list[str]:
    """Versions of PyTorch and of the engines that are installed."""
    return [importlib.metadata.version(name) for name in (TORCH, *filter(is_installed, ENGINES))]


def _images_per_s(run: nn.Module, images: Tensor) -> float:
    """Rate in the best of some rounds, of which the first has warmed it."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - started)
    return len(images) / min(times)


def _remembered(place: Path | None) -> str | None:
    """The engine that was fastest here, if it is known and still installed."""
    try:
        name = read_text(place, LONGEST_NAME) if place is not None else ""
    except (OSError, UnicodeDecodeError):
        return None
    return name if name == TORCH or (name in ENGINES and is_installed(name)) else None


def _remember(place: Path | None, name: str) -> None:
    if place is not None:
        with suppress(OSError):  # it is timed again, then
            write_atomically(place, name)
