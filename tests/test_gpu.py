"""Promises that only a GPU can show; skipped aloud where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import programs
import pytest
import small_meta
import torch
import torch.distributed as dist
from same_run import checkpoint_of, differing
from small_network import evaluate, everything, numbered
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import augment, loader, sources, stream, transforms
from data.to_input import ToInput
from data.workers import Workers
from irv2.network import regions
from irv2.network.accelerate import accelerate
from irv2.network.model import inception_resnet_v2
from irv2.network.pooling import FastMaxPool
from irv2.run import checkpoint
from irv2.run.saving import BackgroundSaver
from irv2.scoring import EvalOptions
from irv2.training import distributed, exchange, graph, metrics, optim, prepare
from irv2.training.distributed import World
from irv2.training.graph import Run
from irv2.training.state import TrainState, running_average
from irv2.training.step import (
    RUNNING,
    StepOptions,
    begin,
    forward_backward,
    train_step,
    update,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("compiler", [None, regions.compiled], ids=["plain", "compiled"])
@pytest.mark.parametrize("colour", [False, True])
def test_batches_on_the_device_are_those_of_the_cpu(
    colour: bool, compiler: Callable[[Callable], Callable] | None
) -> None:
    """Many of them while the device is busy, so that their memory is used again meanwhile."""
    source = sources.open_source("synthetic:240x3")
    view = transforms.TrainView(75, seed=0, colour=colour)
    order = stream.Stream(240, seed=0)
    keys = [order[first : first + 12] for first in range(0, 240, 12)]
    ours, expected = (
        loader.load(source, view, keys, ToInput([0.5] * 3, [0.5] * 3, device, compiler), Workers(2))
        for device in (CUDA, torch.device("cpu"))
    )
    matrix, kept = torch.rand(4096, 4096, device=CUDA), []
    for batch in ours:
        kept.append((batch.images.clone(), batch.labels.clone()))
        matrix = matrix @ matrix / matrix.norm()
    for (images, labels), right in zip(kept, expected, strict=True):
        assert torch.equal(labels.cpu(), right.labels)
        if colour:
            assert torch.allclose(images.cpu(), right.images, atol=1e-5)
        else:
            assert torch.equal(images.cpu(), right.images)


def test_pairs_are_mixed_on_the_device_as_on_the_cpu() -> None:
    images, labels = torch.rand(8, 3, 75, 75), torch.arange(8) % 3
    mix = augment.Mix(0.4, 1.0, 3, seed=0)
    keys = [(0, index) for index in range(8)]
    expected = mix(images, labels, keys)
    for ours, right in zip(mix(images.to(CUDA), labels.to(CUDA), keys), expected):
        assert torch.allclose(ours.cpu(), right, atol=1e-6)


def test_a_wait_counts_only_if_the_device_ran_out_of_work() -> None:
    pace, matrix = metrics.Pace(), torch.rand(8192, 8192, device=CUDA)
    torch.cuda.synchronize()
    for _ in range(200):
        matrix = matrix @ matrix
    with pace.waiting(CUDA):
        pass
    assert pace.waited_s == 0
    torch.cuda.synchronize()
    with pace.waiting(CUDA):
        time.sleep(0.1)
    assert pace.waited_s >= 0.1


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 75, 75, generator=generator) * 2 - 1
    return images.to(device, memory_format=torch.channels_last), torch.arange(8, device=device) % 3


def state_on(device: torch.device, drop_rate: float = 0.0) -> TrainState:
    torch.manual_seed(0)
    model = accelerate(inception_resnet_v2(3, drop_rate=drop_rate, blocks=(1, 1, 1)))
    return state_of(model.to(device), device)


def state_of(model: nn.Module, device: torch.device) -> TrainState:
    return TrainState(
        model,
        running_average(model, 0.9),
        optim.RMSpropTF(optim.parameter_groups(model, 4e-5), lr=0.045),
        torch.amp.GradScaler(device.type, enabled=False),
    )


def step(state: TrainState, device: torch.device, precision: str) -> tuple[Tensor, Tensor]:
    options = StepOptions(clip_norm=2.0, precision=precision)
    batches = iter([batch(device)])
    return train_step(state, state.model, batches, 0.045, options, World(0, 1, device))


def smooth(model: nn.Module) -> nn.Module:
    """Without ReLU and maximum, which rounding can switch: two ways then differ by rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, stride=2))
    return model


def gradients(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of each parameter of the same network on the same images, in float64."""
    torch.manual_seed(0)
    model = smooth(inception_resnet_v2(3, drop_rate=0.0, blocks=(1, 1, 1))).to(device, dtype)
    accelerate(model)
    state, (images, labels) = state_of(model, device), batch(device)
    before, world = begin(state, StepOptions()), World(0, 1, device)
    assert before.statistics
    forward_backward(state, model, images.to(dtype), labels, 0, StepOptions(), world)
    if state.flat is None:
        return {name: p.grad.double() for name, p in model.named_parameters()}
    owners = {id(p): name for name, p in model.named_parameters()}
    return {
        owners[id(p)]: gradient.cpu().double()
        for group in state.flat.groups
        for p, gradient in zip(group.parameters, group.gradients)
    }


def test_float32_gradients_are_as_near_to_float64_as_the_cpus() -> None:
    """Each layer's; the judge is neither's rounding."""
    cpu = torch.device("cpu")
    exact, host, there = (
        gradients(device, dtype)
        for device, dtype in ((cpu, torch.float64), (cpu, torch.float32), (CUDA, torch.float32))
    )
    whole = torch.stack([g.norm() for g in exact.values()]).norm()
    assert exact.keys() == there.keys()
    for name, expected in exact.items():
        own, theirs = ((g[name] - expected).norm() for g in (there, host))
        assert own <= 10 * theirs + 1e-5 * expected.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_maximum_is_the_plain_one(dtype: torch.dtype) -> None:
    pool = FastMaxPool(3, stride=2)
    x = torch.randn(4, 16, 35, 35, device=CUDA, dtype=dtype).to(memory_format=torch.channels_last)
    plain, compiled = (x.clone().requires_grad_() for _ in range(2))
    ways = ((plain, pool), (compiled, torch.compile(pool, dynamic=False)))
    outputs = [way(each) for each, way in ways]
    assert torch.equal(*outputs)
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    assert torch.allclose(plain.grad, compiled.grad, rtol=2**-7, atol=1e-6)


def recorded(state: TrainState, count: int, precision: str, run: Run) -> None:
    """Steps on other images and at another rate each, the sixth on one that is no number."""
    for number in range(count):
        images, labels = batch(CUDA)
        images = images.roll(number, 0)
        if number == 5:
            images[3] = float("nan")
        options = StepOptions(clip_norm=2.0, precision=precision, run=run)
        lr = 0.045 * 0.9**number
        world = World(0, 1, CUDA)
        train_step(state, state.model, iter([(images, labels)]), lr, options, world)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_equal_plain_ones_to_the_bit(precision: str) -> None:
    """With dropout, and one bad step; replaying them waits for nothing."""
    distributed.set_up(CUDA, deterministic=True)
    try:
        plain, replayed = (state_on(CUDA, drop_rate=0.2) for _ in range(2))
        recorded(plain, graph.WARM_UP + 5, precision, graph.plainly)
        run = graph.Recorder(graph.CudaGraphs())
        recorded(replayed, graph.WARM_UP + 5, precision, run)
    finally:
        torch.use_deterministic_algorithms(False)
    expected, found = everything(plain), everything(replayed)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert plain.read_bad_steps() == replayed.read_bad_steps() == ([6], 1)
    prepared = iter([batch(CUDA)])
    options = StepOptions(clip_norm=2.0, precision=precision, run=run)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(replayed, replayed.model, prepared, 0.045, options, World(0, 1, CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("begins", [False, True], ids=["after steps", "before the first step"])
def test_recorded_evaluations_beside_training_equal_plain_ones(begins: bool) -> None:
    """Raw and averaged weights, in turn with recorded steps, the last batch a smaller one."""

    def results(record: bool) -> list:
        run = graph.Recorder(graph.CudaGraphs()) if record else graph.plainly
        state, world = state_on(CUDA, drop_rate=0.2), World(0, 1, CUDA)
        options = StepOptions(clip_norm=2.0, precision="bf16", run=run)
        network = prepare.network(state, 8, 75, options, world)
        generator = torch.Generator(CUDA).manual_seed(1)
        x = torch.randn(8 * (graph.WARM_UP + 2) + 3, 3, 75, 75, device=CUDA, generator=generator)
        x, labels = x.to(memory_format=torch.channels_last), torch.arange(len(x), device=CUDA) % 3
        found = []
        for turn in range(3):
            if turn > 0 or not begins:
                for number in range(graph.WARM_UP + 2):
                    images, answers = batch(CUDA)
                    one = iter([(images.roll(number, 0), answers)])
                    train_step(state, network, one, 0.01, options, world)
            for model in (state.ema.module, state.model):
                batches = numbered(zip(x.split(8), labels.split(8)))
                scores = evaluate(model, batches, world, EvalOptions("bf16", run=run))
                found += [scores.top.tolist(), scores.loss.tolist()]
        return found

    distributed.set_up(CUDA, deterministic=True)
    try:
        assert results(record=True) == results(record=False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_group_of_one_rank_accumulates_as_no_group_does(tmp_path: Path) -> None:
    """NCCL, DistributedDataParallel and no_sync: the same weights as without them."""
    distributed.set_up(CUDA, deterministic=True)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=CUDA)
    try:
        ends = []
        for wrapped in (False, True):
            state, world = state_on(CUDA), World(0, 1, CUDA)
            network = exchange.wrapped(state.model, world)
            if wrapped:
                network = DistributedDataParallel(state.model, gradient_as_bucket_view=True)
            options = StepOptions(accumulation=2, clip_norm=2.0)
            for _ in range(2):
                images, labels = batch(CUDA)
                halves = zip(images.split(4), labels.split(4))
                train_step(state, network, halves, 0.045, options, world)
            ends.append(everything(state))
    finally:
        dist.destroy_process_group()
        torch.use_deterministic_algorithms(False)
    for name, value in ends[0].items():
        assert torch.allclose(ends[1][name], value, rtol=1e-5, atol=1e-6), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_on_two_gpus_train_alike_recorded_or_not(tmp_path: Path) -> None:
    """To the bit: a sum of two has one order."""
    config, steps = programs.write_project(tmp_path), graph.WARM_UP + 3
    ends = []
    for mode in ("graph", "regions"):
        overrides = (f"run.dir={tmp_path / mode}", f"train.compile={mode}")
        overrides += ("run.device=cuda", "run.deterministic=true", f"train.max_steps={steps}")
        trained = programs.run("train.py", "--config", config, *overrides, ranks=2)
        assert trained.returncode == 0, trained.stderr
        assert "train.compile=graph" not in trained.stdout  # it was recorded
        ends.append(checkpoint_of(tmp_path / mode, steps).parts)
    assert differing(*ends) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(precision: str) -> None:
    state = state_on(CUDA)
    step(state, CUDA, precision)  # allocations and autotuning may wait
    prepared = iter([batch(CUDA)])
    options = StepOptions(clip_norm=2.0, precision=precision)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, state.model, prepared, 0.045, options, World(0, 1, CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_bad_step_changes_nothing_and_waits_for_nothing() -> None:
    state = state_on(CUDA)
    step(state, CUDA, "fp32")
    before = everything(state)
    images, labels = batch(CUDA)
    images[3] = float("nan")
    options = StepOptions(clip_norm=2.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = iter([(images, labels)])
        train_step(state, state.model, batches, 0.045, options, World(0, 1, CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = everything(state)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert state.read_bad_steps() == ([2], 1)


def test_a_background_save_is_of_the_moment_it_began(tmp_path: Path) -> None:
    state = state_on(CUDA)
    step(state, CUDA, "fp32")
    state.read_bad_steps()
    before = {name: tensor.cpu() for name, tensor in everything(state).items()}
    options = StepOptions(clip_norm=2.0)
    with BackgroundSaver(tmp_path, 2, 0, print, RUNNING) as saver:
        saver.begin(1, state.tensors(), small_meta.meta(1))
        before_step, world = begin(state, options), World(0, 1, CUDA)
        loss = forward_backward(state, state.model, *batch(CUDA), 0, options, world)
        saver.wait_for_copy()
        update(state, loss, before_step, 0.045, options, world)
    saved = checkpoint.load(tmp_path / "step-000000001").parts
    for part, tensors in saved.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[f"{part}.{name}"]), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_train_and_validate_on_the_device(tmp_path: Path, precision: str) -> None:
    config = programs.write_project(tmp_path)
    trained = programs.run(
        "train.py", "--config", config, "run.device=cuda", f"train.precision={precision}"
    )
    assert trained.returncode == 0, trained.stderr
    validated = programs.run("validate.py", "--run", tmp_path / "run", "--device", "cuda")
    assert validated.returncode == 0, validated.stderr
    assert "12 of" in validated.stdout


def test_a_deterministic_run_repeats_itself_and_continues_to_the_bit(tmp_path: Path) -> None:
    """Twice in one go, and once stopped after its second step, each in processes of its own."""
    config = programs.write_project(tmp_path)
    common = (
        "--config",
        config,
        "run.device=cuda",
        "run.deterministic=true",
        "train.precision=bf16",
    )
    ends = []
    for name, lengths in (("once", [6]), ("again", [6]), ("continued", [2, 6])):
        for steps in lengths:
            place = f"run.dir={tmp_path / name}"
            result = programs.run("train.py", *common, place, f"train.max_steps={steps}")
            assert result.returncode == 0, result.stderr
        ends.append(checkpoint_of(tmp_path / name, 6).parts)
    assert differing(ends[0], ends[1]) == differing(ends[0], ends[2]) == []
