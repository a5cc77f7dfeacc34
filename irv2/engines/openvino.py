"""OpenVINO, which computes in float32, bfloat16, float16 and int8 on CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class OpenVINO(nn.Module):
    """A graph compiled by OpenVINO: float32 [B, 3, H, W] -> float32 logits [B, C].

    graph: the content of an ONNX file, or a model of OpenVINO's.
    """

    precisions = tuple(PRECISIONS)

    def __init__(self, graph: bytes | Any, precision: str) -> None:
        super().__init__()
        import openvino as ov

        model = read_graph(graph) if isinstance(graph, bytes) else graph
        options = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, by all threads
        }
        with same_signal_stack():
            self.compiled = ov.Core().compile_model(_channels_last(model), "CPU", options)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(self.compiled(rows)[0].copy())  # its memory is used again


class _Stack(ctypes.Structure):
    """Linux's stack_t."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Leave this thread the alternate stack for signal handlers that it has, if it has one.

    OpenVINO sets one of its own for AMX and frees it with the model, or with another: the next
    Ctrl-C would end the program with a segmentation fault (seen with 2026.4).
    """
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def read_graph(graph: bytes) -> Any:
    """Read the content of an ONNX file as a model of OpenVINO's."""
    import openvino as ov

    return ov.Core().read_model(graph, b"")


def _channels_last(model: Any) -> Any:
    """Have a model take its images as they lie in memory here."""
    from openvino.preprocess import PrePostProcessor

    around = PrePostProcessor(model.clone())
    around.input().tensor().set_layout("NHWC")
    around.input().model().set_layout("NCHW")
    return around.build()
