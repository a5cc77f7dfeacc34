"""Training steps and inference beside timm's network, and beside the limits of this machine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.optim import RMSpropTF
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from data.errors import UserError
from irv2.network.accelerate import accelerate, fold_batch_norm
from irv2.network.model import inception_resnet_v2
from irv2.report import markdown
from irv2.training import distributed, graph, optim, prepare
from irv2.training.loss import Loss
from irv2.training.state import TrainState, running_average
from irv2.training.step import PRECISIONS, StepOptions, train_step
from scripts.benchmarks import limits
from scripts.benchmarks.alternation import alternate, best_time, rate, table_row

CLASSES = 1000
MODES = ("default", "max-autotune-no-cudagraphs", "max-autotune")  # torch.compile's
RECIPE = {"lr": 0.045, "alpha": 0.9, "eps": 1.0, "momentum": 0.9}
DECAY, CLIP, SMOOTHING, WEIGHT_DECAY = 0.9999, 2.0, 0.1, 4e-5
# Relative to the norm of what is compared; bfloat16 keeps 8 bits, and there are 245 layers.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}
# Rounding switches single ReLUs, and all that is behind them: docs/experiments.md has timm beside
# timm in another memory layout. In bfloat16, from random weights, two correct ways are 0.5 apart.
GRADIENTS = {"fp32": 0.05, "bf16": 0.8, "fp16": 0.4}
INFERENCE_TOLERANCES = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.02}


class Setting(NamedTuple):
    """Setting of a measurement: images of one size, in one precision, on one device."""

    batch: int
    image_size: int
    precision: str
    device: torch.device

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch, 3, self.image_size, self.image_size, generator=generator) * 2 - 1
        return x.to(self.device).contiguous(memory_format=torch.channels_last)

    def labels(self) -> Tensor:
        return (torch.arange(self.batch) % CLASSES).to(self.device)


class DisagreementError(UserError):
    """Our output differs from the peer's."""


def networks(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, with the same weights, in channels-last memory."""
    torch.manual_seed(0)
    peer = timm.create_model("inception_resnet_v2", drop_rate=0.2)
    ours = accelerate(inception_resnet_v2())
    ours.load_state_dict(peer.state_dict())
    ours, peer = (m.to(device, memory_format=torch.channels_last) for m in (ours, peer))
    return ours, peer


def parameter_groups(model: nn.Module) -> list[dict]:
    """The recipe's groups for timm's optimizer."""
    groups = optim.parameter_groups(model, WEIGHT_DECAY)
    return [{key: group[key] for key in ("params", "weight_decay")} for group in groups]


class Trainer(NamedTuple):
    """A network in training: the whole step, and only forward and backward; our state."""

    step: Callable[[], Tensor]
    forward_backward: Callable[[], Tensor]
    state: TrainState | None = None


def our_state(model: nn.Module, device: torch.device, precision: str = "fp32") -> TrainState:
    """The model with the recipe's optimizer and average, as train.py has them."""
    return TrainState(
        model,
        running_average(model, DECAY),
        optim.RMSpropTF(optim.parameter_groups(model, WEIGHT_DECAY), **RECIPE),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
    )


def our_trainer(model: nn.Module, case: Setting, mode: graph.Mode = False) -> Trainer:
    """Make steps as train.py does with this `train.compile`."""
    world = distributed.World(0, 1, case.device)
    compiled, run = graph.chosen(mode, case.precision, world)
    state = our_state(model, case.device, case.precision)
    options = StepOptions(
        Loss(SMOOTHING), clip_norm=CLIP, precision=case.precision, compiled=compiled, run=run
    )
    model = prepare.network(state, case.batch, case.image_size, options, world)
    batch = case.images(), case.labels()

    def step() -> Tensor:
        loss, _ = train_step(state, model, iter([batch]), 0.045, options, world)
        state.unread.clear()
        return loss

    return Trainer(step, _forward_backward(model, case), state)


def timms_trainer(model: nn.Module, case: Setting) -> Trainer:
    """Make steps with everything taken from timm and PyTorch."""
    optimizer = RMSpropTF(parameter_groups(model), **RECIPE)
    average = ModelEmaV3(model, DECAY, use_warmup=True)
    forward_backward = _forward_backward(model, case, keep=True)

    def step() -> Tensor:
        loss = forward_backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        average.update(model, step=1)
        optimizer.zero_grad()
        return loss

    return Trainer(step, _forward_backward(model, case))


def _forward_backward(model: nn.Module, case: Setting, keep: bool = False) -> Callable[[], Tensor]:
    """Forward, loss and backward; gradients are dropped unless `keep` is set."""
    x, labels = case.images(), case.labels()
    dtype = PRECISIONS[case.precision]

    def work() -> Tensor:
        model.train()
        with torch.autocast(case.device.type, dtype, enabled=dtype is not None):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        loss.backward()
        if not keep:
            model.zero_grad(set_to_none=True)
        return loss.detach()

    return work


def measure_training(case: Setting, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measure whole steps, forward and backward alone, and the limits; `compiled`: both sides."""
    ours, peer = networks(case.device)
    own = our_trainer(ours, case, "graph" if compiled else False)
    if compiled:
        peer = fastest_compiled(peer, lambda model: _forward_backward(model, case))
    other = timms_trainer(peer, case)
    rows = {}
    for name in ("step", "forward_backward"):
        ways = (rate(case.batch, getattr(way, name), case.device) for way in (own, other))
        rows[name] = alternate(*ways, rounds)
    del own, other, ours, peer
    figures = {"rows": rows, "memory": peak_memory(case, compiled)}
    return figures | {"limits": _limits(case), **_described(case, rounds, compiled)}


def measure_inference(case: Setting, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measure forward in evaluation mode, our batch norm folded, and the limits."""
    ours, peer = networks(case.device)
    ours, peer = fold_batch_norm(ours), peer.eval()
    if compiled:
        ours, peer = (fastest_compiled(m, lambda m: _inference(m, case)) for m in (ours, peer))
    ways = (rate(case.batch, _inference(m, case), case.device) for m in (ours, peer))
    rows = {"inference": alternate(*ways, rounds)}
    return {"rows": rows, "limits": _limits(case), **_described(case, rounds, compiled)}


def fastest_compiled(
    model: nn.Module, work: Callable[[nn.Module], Callable[[], Tensor]]
) -> nn.Module:
    """Compile the model in the mode of torch.compile in which `work` takes least time."""
    device = next(model.parameters()).device
    times = {}
    for mode in MODES if device.type == "cuda" else MODES[:1]:
        compiled = torch.compile(model, mode=mode)
        times[mode] = best_time(work(compiled), device, 3), compiled
    return min(times.values(), key=lambda pair: pair[0])[1]


def _inference(model: nn.Module, case: Setting) -> Callable[[], Tensor]:
    x, dtype = case.images(), PRECISIONS[case.precision]

    def work() -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(case.device.type, dtype, enabled=dtype is not None),
        ):
            return model(x)

    return work


def peak_memory(case: Setting, compiled: bool) -> dict[str, int]:
    """Most bytes that each side reserves on a GPU, alone there; nothing on a CPU.

    The compiled peer is in its default mode: memory of CUDA graphs would not be its network's.
    """
    peaks: dict[str, int] = {}
    for side in ("ours", "peer") if case.device.type == "cuda" else ():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_reserved(case.device)
        ours, peer = networks(torch.device("cpu"))
        model = (ours if side == "ours" else peer).to(case.device)
        if side == "ours":
            trainer = our_trainer(model, case, "graph" if compiled else False)
        else:
            trainer = timms_trainer(torch.compile(model) if compiled else model, case)
        for _ in range(graph.WARM_UP + 1):
            trainer.step()
        peaks[side] = torch.cuda.max_memory_reserved(case.device) - before
        del trainer, model, ours, peer
        gc.collect()
    return peaks


def _limits(case: Setting) -> dict[str, float]:
    dtype = PRECISIONS[case.precision] or torch.float32
    return limits.measure(case.batch, case.image_size, dtype, case.device)


def _described(case: Setting, rounds: int, compiled: bool) -> dict[str, Any]:
    shape = {"batch": case.batch, "image_size": case.image_size, "precision": case.precision}
    return {**shape, "device_type": case.device.type, "compiled": compiled, "rounds": rounds}


# ----------------------------------------------------------------------------- the same results


def check_training(case: Setting) -> None:
    """Raise DisagreementError unless one step gives timm's loss and gradients."""
    results = []
    for model in networks(case.device):
        for layer in model.modules():  # dropout differs by its seed, not by its mathematics
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        loss = _forward_backward(model, case, keep=True)()
        for p in model.parameters():
            p.data = p.grad
        results.append((loss, weights_in_a_row(model)))  # the gradients, in the weights' place
    for what, tolerances, *values in zip(("loss", "gradients"), (TOLERANCES, GRADIENTS), *results):
        agree(f"{what} of a training step", *values, tolerances[case.precision])


def weights_in_a_row(model: nn.Module) -> Tensor:
    """All weights and biases, in the order of timm's names."""
    state = model.state_dict()
    names = sorted(name for name in state if name.endswith(("weight", "bias")))
    return torch.cat([state[name].flatten() for name in names])


def check_inference(case: Setting) -> None:
    """Raise DisagreementError unless logits are timm's."""
    ours, peer = networks(case.device)
    ours, peer = fold_batch_norm(ours), peer.eval()
    logits = (_inference(model, case)().float() for model in (ours, peer))
    agree("logits", *logits, INFERENCE_TOLERANCES[case.precision])


def agree(what: str, ours: Tensor, peer: Tensor, tolerance: float) -> None:
    """Raise DisagreementError if the two differ by more than a share of the peer's norm."""
    difference = ((ours - peer).norm() / peer.norm()).item()
    if not difference <= tolerance:
        raise DisagreementError(
            f"{what}: ours differ from timm's by {difference:.2g} of them, more than {tolerance:g}"
        )


# --------------------------------------------------------------------------------------- tables

NAMES = {
    "step": "training step",
    "forward_backward": "of it, forward and backward",
    "inference": "inference",
}
# Goals: on a CPU by precision, on a GPU without and with the compiler on both sides.
GOALS = {
    ("step", "cpu", "bf16"): "≥ 1.15",
    ("inference", "cpu", "fp32"): "≥ 1.25",
    ("step", "cuda", "eager"): "≥ 2.0",
    ("step", "cuda", "compiled"): "≥ 1.3",
    ("inference", "cuda", "compiled"): "≥ 1.3",
    ("train, limit", "cpu", "bf16"): "≥ 0.87",
    ("forward, limit", "cpu", "fp32"): "≥ 0.95",
    ("train, limit", "cuda", "eager"): "≥ 0.6",
    ("train, limit", "cuda", "compiled"): "≥ 0.6",
}


def _goal(figures: dict[str, Any], what: str) -> str:
    kind = "compiled" if figures["compiled"] else "eager"
    if figures["device_type"] == "cpu":
        kind = figures["precision"]
    return GOALS.get((what, figures["device_type"], kind), "-")


def table(figures: dict[str, Any]) -> str:
    """Format a row for each comparison, and for the share of each limit that is reached."""
    peer = "timm, compiled" if figures["compiled"] else "timm"
    shape = f"{figures['precision']}, {figures['image_size']} px, batch {figures['batch']}"
    rows = [
        table_row(NAMES[name], row, _goal(figures, name)) for name, row in figures["rows"].items()
    ]
    what, of = ("forward", "inference")
    if "forward_backward" in figures["rows"]:
        what, of = ("train", "forward_backward")
    reached = figures["rows"][of]["ours_per_s"]
    bounds = limits.images_per_s(figures["limits"], figures["batch"], what)
    for letter, name in (("a", "matrix rate"), ("b", "convolutions alone")):
        goal = _goal(figures, f"{what}, limit") if letter == "b" else "-"
        share = reached / bounds[letter]
        rows.append(
            f"limit ({letter}), {name} | {reached:.4g} | {bounds[letter]:.4g} | **{share:.2f}** | "
            f"{goal}"
        )
    if figures.get("memory"):
        ours, other = (figures["memory"][side] / 2**30 for side in ("ours", "peer"))
        goal = "≤ 0.8" if figures["compiled"] else "-"
        rows.append(
            f"most memory, GiB | {ours:.2f} | {other:.2f} | **{ours / other:.2f}** | {goal}"
        )
    return markdown.table(f"{shape} | ours, images/s | {peer} | ratio (range) | goal", rows)


def profile(case: Setting, training: bool) -> str:
    """Profile our step or forward by operation, after one that is discarded."""
    ours, _ = networks(case.device)
    work = our_trainer(ours, case).step if training else _inference(fold_batch_norm(ours), case)
    work()
    with torch.profiler.profile() as profiler:
        work()
    by = "self_cuda_time_total" if case.device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40)
