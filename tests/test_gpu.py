"""What only a GPU can show; skipped aloud where there is none."""

from __future__ import annotations

from pathlib import Path

import programs
import pytest
import torch
from torch import Tensor

from data import loader, sources, stream, transforms
from irv2 import engine, optim
from irv2.distributed import World
from irv2.model import inception_resnet_v2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
NORMALISATION = loader.Normalisation([0.5] * 3, [0.5] * 3)


def test_batches_on_the_device_are_those_of_the_cpu() -> None:
    source = sources.open_source("synthetic:12x3")
    view = transforms.TrainView(75, seed=0)
    keys = [stream.Stream(12, seed=0)[0:12]]
    (images, labels, *_), (expected, expected_labels, *_) = (
        next(loader.load(source, view, keys, NORMALISATION, loader.Workers(2), device))
        for device in (CUDA, torch.device("cpu"))
    )
    assert images.device == labels.device == CUDA
    assert torch.equal(labels.cpu(), expected_labels)
    assert torch.allclose(images.cpu(), expected, atol=1e-5)


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 75, 75, generator=generator) * 2 - 1
    return images.to(device, memory_format=torch.channels_last), torch.arange(8, device=device) % 3


def state_on(device: torch.device) -> engine.TrainState:
    torch.manual_seed(0)
    model = inception_resnet_v2(3, drop_rate=0.0, blocks=(1, 1, 1)).to(device)
    return engine.TrainState(
        model,
        engine.running_average(model, 0.9),
        optim.RMSpropTF(optim.parameter_groups(model, 4e-5), lr=0.045),
        torch.amp.GradScaler(device.type, enabled=False),
    )


def step(state: engine.TrainState, device: torch.device, precision: str) -> tuple[Tensor, Tensor]:
    options = engine.StepOptions(clip_norm=2.0, precision=precision)
    batches = iter([batch(device)])
    return engine.train_step(state, state.model, batches, 0.045, options, World(0, 1, device))


def test_a_float32_step_is_that_of_the_cpu() -> None:
    torch.backends.cudnn.allow_tf32 = False
    results = []
    for device in (CUDA, torch.device("cpu")):
        state = state_on(device)
        loss, norm = step(state, device, "fp32")
        results.append((loss.item(), norm.item(), state.model.classif.weight.detach().cpu()))
    (loss, norm, weight), (expected_loss, expected_norm, expected_weight) = results
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert norm == pytest.approx(expected_norm, rel=1e-2)
    assert torch.allclose(weight, expected_weight, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(precision: str) -> None:
    state = state_on(CUDA)
    step(state, CUDA, precision)  # allocations and autotuning may wait
    prepared = iter([batch(CUDA)])
    options = engine.StepOptions(clip_norm=2.0, precision=precision)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(state, state.model, prepared, 0.045, options, World(0, 1, CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
