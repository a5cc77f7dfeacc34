"""Engines: PyTorch's logits or PyTorch itself, the fastest remembered, through both programs."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calling import call
from programs import write_images
from small_network import relative
from small_weights import SYNSETS
from torch import Tensor, nn

import validate
from irv2.engines import choose, openvino
from irv2.engines.graph import onnx_graph
from irv2.run import trained
from scripts import predict

INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name} here"),
    )
    for name in choose.ENGINES
]


@pytest.fixture(scope="module")
def network(small_weights: Path) -> nn.Module:
    return trained.load_weights(str(small_weights)).model.eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures") / "val", SYNSETS, 3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "irv2" / "engines"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> Callable[..., None]:
    """Put functions of logits in the place of engines that are installed."""

    def put(**functions: Callable[[Tensor], Tensor]) -> None:
        class Other(nn.Module):
            def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
                super().__init__()
                self.function = function

            def forward(self, x: Tensor) -> Tensor:
                return self.function(network(x))

        def maker(function: Callable[[Tensor], Tensor]) -> Callable[[bytes, str], nn.Module]:
            def make(_graph: bytes, _precision: str) -> nn.Module:
                return Other(function)

            make.precisions = ("fp32",)
            return make

        made = {name: maker(function) for name, function in functions.items()}
        monkeypatch.setattr(choose, "ENGINES", made)
        monkeypatch.setattr(choose, "is_installed", made.__contains__)
        monkeypatch.setattr(choose, "onnx_graph", lambda model, size: b"")
        monkeypatch.setattr(choose, "_versions", lambda: ["1"])

    return put


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 3, 75, 75, generator=generator) * 2 - 1
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_openvino_computes_in_the_precision_that_is_asked_for(network):
    pytest.importorskip("openvino")
    x = images(3)
    with torch.inference_mode():
        expected = network(x)
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            run = choose.runner("openvino", network, precision, pytest.fail)
            with torch.autocast("cpu", dtype):  # as the programs call it
                assert relative(run(x), expected) < 0.02  # 2 if the graph were traced so, too


@torch.inference_mode()
def ran(name: str, network: nn.Module, *counts: int) -> tuple[str, list[str], list[Tensor]]:
    """Run batches of these sizes: what it calls itself, what it said, its logits."""
    said: list[str] = []
    run = choose.runner(name, network, "fp32", said.append)
    logits = [run(images(count)) for count in counts]
    return choose.named("fp32", run), said, logits


@pytest.mark.parametrize("name", INSTALLED)
def test_an_engine_gives_pytorchs_logits_in_batches_of_any_size(name, network):
    called, said, logits = ran(name, network, 3, 1, 5)
    assert (called, said) == (f"fp32 by {name}", [])
    with torch.inference_mode():
        for result in logits:
            assert relative(result, network(images(len(result)))) < 1e-5
    assert logits[1].data_ptr() != logits[2].data_ptr()  # none is overwritten by the next


@pytest.mark.parametrize(
    "wrong, why",
    [
        (lambda x: x * 1.01, "differ from PyTorch's in fp32 by 0.01"),
        (lambda x: x * float("nan"), "differ from PyTorch's"),
        (lambda x: x.missing, "cannot run this network"),
    ],
)
def test_an_engine_that_computes_something_else_is_not_used_and_that_is_said(
    wrong, why, engines, network
):
    engines(openvino=wrong)
    called, said, (logits,) = ran("openvino", network, 2)
    assert called == "fp32" and len(said) == 1
    assert said[0].startswith("openvino: ") and why in said[0] and "PyTorch runs" in said[0]
    with torch.inference_mode():
        assert torch.equal(logits, network(images(2)))


def test_auto_takes_the_fastest_that_is_right_and_remembers_it(
    engines, network, monkeypatch, cache
):
    engines(fast=lambda x: x + 0, wrong=lambda x: x + 1, slow=lambda x: x + 0)
    rates = iter([10.0, 30.0, 20.0])  # PyTorch's, and the two that are right
    monkeypatch.setattr(choose, "_images_per_s", lambda run, images: next(rates))
    called, said, _ = ran("auto", network, 2)
    assert called == "fp32 by fast" and len(said) == 2
    assert "torch 10.0, fast 30.0, slow 20.0" in said[1]
    assert ran("auto", network, 2)[:2] == ("fp32 by fast", [])  # nothing is timed again
    (note,) = cache.iterdir()
    note.write_text("no engine's name")
    rates = iter([40.0, 30.0, 20.0])
    assert ran("auto", network, 2)[0] == "fp32"
    assert note.read_text() == "torch"


def test_what_an_engine_cannot_do_is_said_before_anything_is_read(engines):
    engines(onnxruntime=lambda x: x)
    cpu = torch.device("cpu")
    for name, precision, device, words in [
        ("openvino", "fp32", cpu, "pip install -r requirements-inference.txt"),
        ("onnxruntime", "bf16", cpu, "computes in fp32 on CPUs"),
        ("onnxruntime", "fp32", torch.device("cuda"), "--device cpu"),
        ("auto", "fast", cpu, "--precision bf16"),
    ]:
        with pytest.raises(choose.EngineError, match=words):
            choose.check(name, precision, device)
    done = call(validate, "--weights", "absent", "--engine", "openvino")
    assert done.status == 1 and "requirements-inference.txt" in done.err


@pytest.mark.slow
def test_both_programs_run_by_an_engine(small_weights, pictures, tmp_path):
    pytest.importorskip("onnxruntime")
    own = ("--weights", small_weights, "--device", "cpu")
    results, lines = {}, {}
    for engine in ("torch", "onnxruntime"):
        out = tmp_path / f"{engine}.json"
        evaluation = (*own, "--data", pictures, "--workers", 0, "--json", out)
        done = call(validate, *evaluation, "--engine", engine)
        assert done.status == 0, done.err
        results[engine] = json.loads(out.read_text())
        done = call(predict, pictures, *own, "--json", "--engine", engine)
        assert (done.status, done.err) == (0, "")
        lines[engine] = [json.loads(line)["predictions"] for line in done.out.splitlines()]
    assert results["torch"]["precision"] == "fp32"
    assert results["onnxruntime"]["precision"] == "fp32 by onnxruntime"
    assert results["onnxruntime"]["loss"] == pytest.approx(results["torch"]["loss"], rel=1e-4)
    for ours, theirs in zip(lines["torch"], lines["onnxruntime"], strict=True):
        assert [p["class"] for p in ours] == [p["class"] for p in theirs]
        shares = [[p["probability"] for p in each] for each in (ours, theirs)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-3)


def signal_stack() -> bytes:
    """Place, flags and size of this thread's alternate stack for signal handlers."""
    stack = ctypes.create_string_buffer(24)
    ctypes.CDLL(None).sigaltstack(None, stack)
    return stack.raw


def test_openvino_leaves_no_stack_of_its_own_to_signal_handlers(network):
    """It would be freed with the model, and the next Ctrl-C be a segmentation fault."""
    pytest.importorskip("openvino")
    graph, before = onnx_graph(network, 75), signal_stack()
    engines = [openvino.OpenVINO(graph, "fp32") for _ in range(2)]
    for engine in engines:
        engine(torch.zeros(1, 3, 75, 75))
    assert signal_stack() == before
