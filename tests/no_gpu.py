"""A CUDA device that is not there: tensors without numbers, and Inductor's code for it, not run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CUDA = torch.device("cuda", 0)
H100 = SimpleNamespace(
    **{"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
    **{"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048},
    **{"max_threads_per_block": 1024, "total_memory": 80 << 30, "L2_cache_size": 50 << 20},
    **{"shared_memory_per_block_optin": 232448, "gcnArchName": ""},
)


def on_cuda(tensor: Tensor) -> Tensor:
    """A tensor of the same form on the device; within FakeTensorMode."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)


def move(model: nn.Module) -> nn.Module:
    """Move a model to the device, in place; within FakeTensorMode."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(on_cuda(p), p.requires_grad)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = on_cuda(buffer)
    return model


class StaysThere(TorchDispatchMode):
    """Refuses operations that bring numbers from the device to the host, and notes all others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        there = [t for t in args if isinstance(t, Tensor) and t.is_cuda]
        comes_back = isinstance(output, Tensor) and not output.is_cuda
        if there and (comes_back or func.name() in ("aten::_local_scalar_dense", "aten::nonzero")):
            raise AssertionError(f"{func.name()} waits for the device")
        return output


@contextmanager
def properties() -> Iterator[None]:
    """Answer as an H100 would what Inductor asks about the device."""
    answers: list[tuple[Any, str, Callable]] = [
        (torch.cuda, "get_device_properties", lambda _=None: H100),
        (torch.cuda, "get_device_capability", lambda _=None: (9, 0)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda _=None: H100)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda _=None: 90)),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (scheduler, "has_triton", lambda: True),
        (torch._C, "_conv_determine_backend_memory_format", lambda *_: torch.channels_last),
        (DeviceProperties, "create", classmethod(lambda _cls, _device: device)),
    ]
    device = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
    target = GPUTarget("cuda", 90, 32)
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        stand_in = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
        stack.enter_context(mock.patch.object(driver, "_active", stand_in))
        yield


class Generated:
    """A backend of torch.compile that makes Inductor's code for the device of what it is given on
    a CPU, and runs it uncompiled: `code` and the bytes it moves, of each graph."""

    def __init__(self) -> None:
        self.code: list[str] = []
        self.moved: list[int] = []

    def __call__(self, graph: nn.Module, inputs: list) -> Callable:
        return compile_fx.compile_fx(graph, inputs, inner_compile=self._lowered)

    def _lowered(self, graph: torch.fx.GraphModule, inputs: list, **options: Any) -> Callable:
        mode, there = detect_fake_mode(inputs), copy.deepcopy(graph)
        with mode:
            inputs = [on_cuda(i) if isinstance(i, Tensor) else i for i in inputs]
        for node in there.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
        compile_fx.record_original_output_strides(there)
        with properties():
            FakeTensorProp(there, mode).propagate_dont_convert_inputs(*inputs)
        kinds = {name: options.get(name, False) for name in ("is_inference", "is_backward")}
        with V.set_fake_mode(mode), properties():
            lowering = GraphLowering(there, example_inputs=inputs, **kinds)
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), DebugContext():
                lowering.run(*inputs)
                code, _ = lowering.codegen()
                self.code.append(code.value)
                self.moved.append(lowering.count_bytes()[0])
        return make_boxed_func(graph.forward)
