"""A GPU's step as far as it can be known without one: each operation and its bytes, no number."""

from __future__ import annotations

from collections import Counter

import no_gpu
import pytest
import torch
from no_gpu import CUDA, Generated, StaysThere
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from irv2.network.accelerate import accelerate
from irv2.network.blocks import BLOCK35, Block, Conv, ConvNormAct, NormOptions
from irv2.network.model import inception_resnet_v2
from irv2.network.pooling import FastMaxPool, Gathered
from irv2.training import flat, optim, prepare
from irv2.training.distributed import World
from irv2.training.loss import Loss
from irv2.training.state import TrainState, running_average
from irv2.training.step import StepOptions, train_step

NORM = NormOptions(0.1, 1e-3, True)
NO_KERNEL = {"prim::device", "aten::empty_like", "aten::detach", "aten::as_strided"}


def built() -> tuple[nn.Module, nn.Module]:
    model = accelerate(inception_resnet_v2(5, blocks=(1, 1, 1), width=1 / 16))
    model = model.to(memory_format=torch.channels_last)
    return model, running_average(model, 0.9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_a_gpu_asks_it_for_no_number(monkeypatch, precision):
    """Forward, loss, the update and its masks; autograd's own work needs the device, so gradients
    are given. test_graph.py has backward."""
    model, average = built()

    def backward(_loss: Tensor) -> None:
        for p in model.parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(Tensor, "backward", backward)
    with FakeTensorMode():
        for module in (model, average.module):
            no_gpu.move(module)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        groups = optim.parameter_groups(model, 4e-5)
        state = TrainState(model, average, optim.RMSpropTF(groups, lr=0.045), scaler)
        images = torch.empty(2, 3, 75, 75, device=CUDA).to(memory_format=torch.channels_last)
        labels = torch.zeros(2, dtype=torch.int64, device=CUDA)
        loss = Loss(class_weights=torch.ones(5, device=CUDA))
        options = StepOptions(loss, clip_norm=2.0, precision=precision)
        prepare.network(state, 2, 75, options, World(0, 1, CUDA))
        assert state.flat is not None  # before an evaluation that may be recorded
        for name in ("is_available", "is_bf16_supported"):  # autocast asks
            monkeypatch.setattr(torch.cuda, name, lambda *_: True)
        with StaysThere() as operations:
            train_step(state, model, iter([(images, labels)]), 0.1, options, World(0, 1, CUDA))
        with pytest.raises(AssertionError, match="waits for the device"), StaysThere():
            labels.cpu()
    after = operations.names[operations.names.index("aten::nll_loss_forward") :]
    launched = [name for name in after if name not in NO_KERNEL]
    assert len(launched) < 100, Counter(launched)  # tensor by tensor it would be thousands


@pytest.mark.slow
def test_the_update_is_one_kernel_for_each_group_that_moves_each_number_once():
    """Five arrays read and four written: 36 bytes a parameter."""
    count = 1 << 16
    arrays, generated = [torch.rand(count) for _ in range(5)], Generated()
    torch._dynamo.reset()
    update = torch.compile(flat.rmsprop_, dynamic=False, backend=generated)
    scale, lr, share = torch.ones(3).unbind()
    update(*arrays, scale, torch.tensor(True), lr, share, 4e-5, 0.9, 1.0, 0.9)
    (code,), (moved,) = generated.code, generated.moved
    assert code.count("@triton.jit") == 1
    assert 36 * count <= moved <= 36 * count + 64


@pytest.mark.slow
def test_a_maximum_is_one_kernel_each_way_that_moves_each_number_once():
    """Inductor's own has three in backward and moves 6.4 times the input."""
    generated = Generated()
    torch._dynamo.reset()
    pool = torch.compile(Gathered.apply, backend=generated, dynamic=False)
    x = torch.randn(8, 64, 147, 147, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = pool(x)
    y.float().sum().backward()
    assert [code.count("@triton.jit") for code in generated.code] == [1, 1]
    once = x.nbytes + y.nbytes + y.numel()  # with the place of each maximum, a byte
    assert generated.moved == [once, once]
    as_it_lies = "(8, 147, 147, 64), (1382976, 9408, 64, 1)"
    assert f"empty_strided_cuda({as_it_lies}, torch.bfloat16)" in generated.code[1]


def test_a_maximum_is_compiled_its_own_way_where_a_gpu_trains(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        for device in (CUDA, torch.device("cpu")):
            x = torch.empty(1, 4, 9, 9, device=device, requires_grad=True)
            pools = (FastMaxPool(3, stride=2, padding=padding) for padding in (0, 1))
            own, other = (type(pool(x).grad_fn).__name__ for pool in pools)
            assert ("Gathered" in own) == (device == CUDA)
            assert "Gathered" not in other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("region", "channels", "side", "maps"),
    [
        (ConvNormAct(32, Conv(32, 3, padding=1), NORM), 32, 35, 14.8),
        (accelerate(Block(BLOCK35, NORM)), 320, 35, 28.4),
    ],
    ids=["layer", "block35"],
)
def test_a_region_moves_no_more_bytes_an_image_than_it_did(region, channels, side, maps):
    """Forward and backward in bf16, as many times the bytes of the region's input: a fusion that is
    lost, or a size that becomes a symbol, is seen here."""
    generated = Generated()
    torch._dynamo.reset()
    region.train().to(memory_format=torch.channels_last).compile(backend=generated, dynamic=False)
    x = torch.randn(64, channels, side, side, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        y = region(x)
    y.float().sum().backward()
    assert len(generated.code) == 2 and not any("ks0" in code for code in generated.code)
    assert sum(generated.moved) / x.nbytes <= maps
