"""compile_regions: traced by the compiler, but run by PyTorch's own operations, which is quick."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch._dynamo.utils import counters

from irv2.model import InceptionResnetV2, inception_resnet_v2


def traced(monkeypatch, blocks: tuple[int, int, int]) -> tuple[InceptionResnetV2, int]:
    """A compiled network after one step, and how many graphs were made for it."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = inception_resnet_v2(5, blocks=blocks, drop_rate=0.0).train()
    plain = copy.deepcopy(model)
    compile_module = nn.Module.compile
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
        model.compile_regions()
    x = torch.rand(4, 3, 75, 75) * 2 - 1
    for each in (model, plain):
        each(x).square().sum().backward()
    # Batch norm cancels block8.conv2d.bias: its gradient is rounding noise around 0.
    floor = 1e-4 * max(p.grad.norm() for p in plain.parameters())
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        difference = (ours.grad - theirs.grad).norm()
        assert difference <= 0.05 * theirs.grad.norm() + floor, name  # single ReLUs may switch
    statistics = zip(model.buffers(), plain.buffers())
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in statistics)
    return model, counters["stats"]["unique_graphs"]


def test_repeats_of_a_block_share_one_graph(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    _, single = traced(monkeypatch, (1, 1, 1))
    model, repeated = traced(monkeypatch, (3, 2, 2))
    assert 8 < single == repeated
    assert list(model.state_dict()) == list(
        inception_resnet_v2(5, blocks=(3, 2, 2)).state_dict()
    )  # names are as before
