"""The CPU's fused functions and compiled loops against PyTorch's plain operations in float64."""

from __future__ import annotations

import copy
import ctypes
import os
from pathlib import Path

import pytest
import torch
from small_network import randomised, relative
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from irv2.network.accelerate import accelerate, fold_batch_norm
from irv2.network.blocks import (
    BLOCK8,
    BLOCK17,
    BLOCK35,
    MIXED_6A,
    Block,
    Conv,
    ConvNormAct,
    NormOptions,
)
from irv2.network.cpu import fused, threads
from irv2.network.cpu import norm as native
from irv2.network.model import InceptionResnetV2, inception_resnet_v2

NORM = NormOptions(momentum=0.1, eps=1e-3, scale=True)
RESIDUAL = [BLOCK35, BLOCK17, BLOCK8, BLOCK8._replace(scale=1.0, relu=False)]

pytestmark = pytest.mark.skipif(not threads.available(), reason="PyTorch's threads: none we know")


def images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def in_training(module: nn.Module) -> nn.Module:
    return randomised(accelerate(module)).to(memory_format=torch.channels_last).train()


def norm_of(channels: int) -> nn.BatchNorm2d:
    return in_training(ConvNormAct(channels, Conv(channels), NORM)).bn


def results(module: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one forward and backward, in float64."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.backward(images(*y.shape, seed=2).to(y.dtype))
    found = {"output": y, "input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    found |= {name: b for name, b in module.named_buffers() if b.ndim}
    return {name: value.detach().double() for name, value in found.items()}


def errors(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == expected.keys()
    return {name: relative(ours[name], value) for name, value in expected.items()}


def count_calls(monkeypatch, owner: object, name: str) -> list[int]:
    calls, function = [], getattr(owner, name)

    def counted(*arguments):
        calls.append(1)
        return function(*arguments)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("spec", [*RESIDUAL, MIXED_6A], ids=lambda s: f"{s.in_channels}-{s.relu}")
def test_a_block_equals_plain_operations_in_float64(monkeypatch, spec):
    module = in_training(Block(spec, NORM))
    x = images(3, spec.in_channels, 5, 7)
    calls = count_calls(monkeypatch, native, "backward")
    ours = results(module, x)
    assert calls, "the fused way was not taken"
    found = errors(ours, results(module.double(), x.double()))
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 on this processor"
)
@pytest.mark.parametrize("spec", RESIDUAL, ids=lambda s: f"{s.in_channels}-{s.relu}")
def test_in_bfloat16_a_block_is_as_near_to_float64_as_plain_operations_are(monkeypatch, spec):
    module = in_training(Block(spec, NORM))
    # Rounding may move a ReLU across zero in one of them alone: images where it does not.
    x = images(3, spec.in_channels, 5, 7, seed=3).bfloat16()
    expected = results(copy.deepcopy(module).double(), x.double())
    calls = count_calls(monkeypatch, native, "backward")
    found = errors(results(module, x, autocast=True), expected)
    assert calls, "the fused way was not taken"
    monkeypatch.setattr(fused, "trains", lambda x, norms: False)
    plain = errors(results(module, x, autocast=True), expected)
    assert all(found[name] < 1.2 * plain[name] + 1e-4 for name in found), (found, plain)


class Apply(nn.Module):
    """Batch norm and ReLU as `fused` does them."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return fused.norm_relu(x, self.norm)[0]


@pytest.mark.parametrize("shape", [(2, 20, 5, 7), (1, 3, 1, 200), (300, 5, 1, 1), (1, 33, 9, 8)])
def test_a_layer_equals_plain_operations_in_float64(shape):
    """Also where the mean is far from 0, so that sums of squares would cancel."""
    norm = norm_of(shape[1])
    layer = nn.Sequential(Apply(norm))
    plain = nn.Sequential(copy.deepcopy(norm), nn.ReLU()).double()
    for offset, limit in ((0.0, 1e-5), (100.0, 1e-3)):
        x = images(*shape) + offset
        ours, expected = results(layer, x), results(plain, x.double())
        found = errors(ours, dict(zip(ours, expected.values())))
        assert max(found.values()) < limit, (offset, found)


def test_loops_run_on_pytorchs_own_threads_whatever_else_is_loaded():
    """scikit-learn brings an OpenMP library of its own; two pools would fight for the cores."""
    import sklearn.cluster._k_means_lloyd  # noqa: F401

    torch.mm(*torch.ones(2, 500, 500))  # PyTorch's threads exist from here on
    layer, x = Apply(norm_of(64)), images(4, 64, 40, 40)
    layer(x)
    before = len(os.listdir("/proc/self/task"))
    layer(x)
    assert len(os.listdir("/proc/self/task")) == before
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in mapped.splitlines() if "gomp" in line}) > 1
    address = ctypes.cast(threads._openmp().omp_get_thread_num, ctypes.c_void_p).value
    owner = next(
        line.split()[-1]
        for line in mapped.splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
    )
    assert "torch" in owner


def test_fewer_threads_than_asked_for_are_not_trusted():
    """Where OpenMP may make a team smaller, a share of the rows would be left out."""
    assert threads.available()
    library = threads._openmp()
    levels = library.omp_get_max_active_levels()
    for setting, value, before in (
        (library.omp_set_dynamic, 1, 0),
        (library.omp_set_max_active_levels, 0, levels),
    ):
        setting(value)
        try:
            assert not threads.available()
        finally:
            setting(before)


def test_tensors_that_loops_would_misread_are_left_to_plain_modules():
    x = images(2, 8, 5, 5)
    for name in ("weight", "bias", "running_mean", "running_var"):
        norm = norm_of(8)
        assert fused.trains(x, [norm])
        value = getattr(norm, name).detach()
        for other in (value.double(), value.bfloat16(), torch.ones(16)[::2]):
            setattr(norm, name, nn.Parameter(other) if name in ("weight", "bias") else other)
            assert not fused.trains(x, [norm]), name
    with FakeTensorMode():
        assert not fused.trains(torch.empty(2, 8, 5, 5), [])
    assert not fused.trains(x[:0], [])


def test_one_value_a_channel_is_an_error_as_in_pytorch():
    layer = in_training(ConvNormAct(3, Conv(8, 3), NORM))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(images(1, 3, 3, 3))


def test_what_is_not_a_number_stays_so():
    x = images(2, 4, 3, 3)
    x[0, 1, 0, 0] = float("nan")
    y = Apply(norm_of(4))(x)
    assert y[:, 1].isnan().all() and not y[:, [0, 2, 3]].isnan().any()
    grad, total = native.relu_backward(x, torch.ones_like(x))
    assert grad.isnan().nonzero().tolist() == [[0, 1, 0, 0]]
    assert total.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_relu_backward_is_threshold_backward_with_its_sum(dtype):
    grad, y = images(3, 70, 4, 5).to(dtype), images(3, 70, 4, 5, seed=1).to(dtype)
    masked, total = native.relu_backward(grad, y)
    assert torch.equal(masked, torch.ops.aten.threshold_backward(grad, y, 0))
    torch.testing.assert_close(total, masked.float().sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_rounded_as_pytorch_does():
    """Every upper half of a float32, with lower halves at and beside the ties."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | low).view(torch.float32).view(1, 256, 16, 16)
        values = values.contiguous(memory_format=torch.channels_last)
        kept = values.bfloat16()
        # Gradients of 1 where y > 0 pass unchanged, so what is stored is what was loaded.
        through, _ = native.relu_backward(kept, torch.ones_like(kept))
        same = (through == kept) | (through.isnan() & kept.isnan())
        assert same.all()


def test_rows_are_told_from_other_layouts():
    x = images(2, 12, 3, 4)
    for view, stride in (
        (x, 12),
        (x[:, 3:7], 12),
        (x.contiguous(), None),
        (x[:, :, 1:], None),
        (x[:1, :, :1, :1], 12),
        (x[:, ::2], None),
    ):
        found = native.row_stride(view)
        assert found == stride or (view.shape[2:] == (1, 1) and found >= view.shape[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.eval(),
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: [m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)],
    ],
    ids=["evaluation", "float64", "bfloat16 weights", "frozen"],
)
def test_where_it_does_not_fit_plain_modules_run(monkeypatch, change):
    model = accelerate(inception_resnet_v2(3, blocks=(1, 1, 1), width=0.25))
    change(model)
    calls = count_calls(monkeypatch, native, "forward")
    dtype = next(model.parameters()).dtype
    model(images(2, 3, 75, 75).to(dtype)).sum().backward()
    assert not calls


def test_frozen_weights_get_no_gradient_and_let_it_through():
    module, x = in_training(Block(BLOCK35, NORM)), images(2, 320, 5, 5)
    expected = results(module, x)["input"]
    x.requires_grad_()
    y = module.requires_grad_(False)(x)
    y.backward(images(*y.shape, seed=2))
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(x.grad.double(), expected)


def test_an_image_size_of_one_position_works():
    module = in_training(Block(BLOCK8, NORM))
    x = images(6, 2080, 1, 1)
    found = errors(results(module, x), results(module.double(), x.double()))
    assert max(found.values()) < 1e-4, found


# ------------------------------------------------------------------------------------- inference


@torch.no_grad()
def test_a_map_of_one_position_is_added_to_whatever_the_version(monkeypatch):
    def fail(*_arguments: object) -> None:
        raise RuntimeError("could not create a memory")  # PyTorch 2.10's and 2.11's words

    monkeypatch.setattr(torch.ops.mkldnn._convolution_pointwise, "binary", fail)
    conv, x, y = nn.Conv2d(8, 16, 1), images(2, 16, 1, 1), images(2, 8, 1, 1, seed=1)
    before, expected = x.clone(), (x + 0.5 * conv(y)).relu()
    torch.testing.assert_close(fused.add_conv_relu(x, y, conv, 0.5, True), expected)
    assert torch.equal(x, before)


@pytest.fixture(scope="module")
def folded() -> InceptionResnetV2:
    model = in_training(inception_resnet_v2(7, blocks=(1, 1, 1), width=0.25))
    return fold_batch_norm(model)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_folded_network_equals_itself_in_float64(monkeypatch, folded, batch):
    calls = count_calls(monkeypatch, fused, "conv_relu")
    x = images(batch, 3, 75, 83)
    ours = folded(x)
    assert len(calls) == sum(isinstance(m, ConvNormAct) for m in folded.modules())
    expected = copy.deepcopy(folded).double()(x.double())
    assert relative(ours, expected) < 1e-5
    assert torch.equal(folded(x.contiguous()), ours)


@torch.no_grad()
def test_weights_that_change_are_packed_again(folded):
    folded, x = copy.deepcopy(folded), images(2, 3, 75, 75)
    before = folded(x)
    folded.conv2d_4a.conv.weight.mul_(2)
    folded.block8.conv2d.bias.add_(1)
    after = folded(x)
    expected = copy.deepcopy(folded).double()(x.double())
    assert not torch.allclose(before, after, rtol=1e-3)
    assert relative(after, expected) < 1e-5


@torch.no_grad()
def test_blocks_write_over_each_others_results_unless_somebody_watches(monkeypatch):
    folded = fold_batch_norm(in_training(inception_resnet_v2(7, blocks=(3, 2, 2), width=0.25)))
    calls = count_calls(monkeypatch, fused, "_conv_add")
    wrote = count_calls(monkeypatch, torch.ops.mkldnn._convolution_pointwise_, "binary")
    x = images(2, 3, 107, 107)  # whose smallest maps are of 2x2 positions
    alone = folded(x)
    assert (len(calls), len(wrote)) == (8, 4)

    seen = []  # views of what hooks have been given, and copies of it

    def see(_module: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
        seen.extend((t.detach(), t.clone()) for t in (*given, made))

    for module in (folded.repeat[1], folded.repeat[2].heads, folded.repeat_1, folded.repeat_2[1]):
        module.register_forward_hook(see)
    assert torch.equal(folded(x), alone)
    assert len(seen) == 8 and all(torch.equal(view, copy) for view, copy in seen)
    assert len(wrote) == 4 + 1  # in repeat_1: nothing overwrites what a stack is given or returns


@torch.no_grad()
def test_what_watches_or_transforms_operations_finds_plain_ones(folded):
    plain = copy.deepcopy(folded).double()  # for which there are no fused operations
    x = images(2, 3, 75, 83)
    counts = []
    for model in (folded, plain):
        with FlopCounterMode(display=False) as counter:
            model(x.to(next(model.parameters()).dtype))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    mapped = torch.vmap(folded)(x[:, None])
    assert torch.allclose(mapped[:, 0], folded(x), rtol=1e-4, atol=1e-5)


def test_with_gradients_wanted_a_folded_network_has_them(folded):
    x = images(1, 3, 75, 75).requires_grad_()
    folded(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_what_is_computed_is_rounded_to_bfloat16_as_pytorch_does():
    """Every upper half of a float32, with lower halves at and beside the ties, out of a bias."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    x = torch.zeros(2, len(upper), 1, 1, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    nothing, result = torch.zeros(len(upper)), torch.empty_like(x)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | low).view(torch.float32)
        running = torch.zeros(len(upper)), torch.ones(len(upper))
        part = native.Part(0, len(upper), result)
        native.forward(x, (nothing, values), running, 0.0, 1e-3, [part])
        expected = values.relu().bfloat16()
        for rounded in result.flatten(1):
            assert ((rounded == expected) | (rounded.isnan() & expected.isnan())).all(), hex(low)
