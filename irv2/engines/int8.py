"""Graphs in int8: convolutions and products of 8-bit integers, their ranges measured on images."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irv2.engines.graph import INPUT
from irv2.engines.onnxruntime import ONNXRuntime
from irv2.engines.openvino import OpenVINO, read_graph, same_signal_stack


def by_openvino(graph: bytes, batches: Iterable[Tensor]) -> tuple[Any, OpenVINO]:
    """Quantize an ONNX graph with NNCF: a model of OpenVINO's, and what runs it.

    batches: images as the network takes them, [B, 3, H, W].
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    arrays = [_in_rows(batch) for batch in batches]
    with same_signal_stack():
        model = nncf.quantize(
            read_graph(graph),
            nncf.Dataset(arrays),
            preset=nncf.QuantizationPreset.MIXED,  # activations that may be negative, before a ReLU
            subset_size=len(arrays),
        )
    return model, OpenVINO(model, "fp32")


def by_onnxruntime(graph: bytes, batches: Iterable[Tensor]) -> tuple[bytes, ONNXRuntime]:
    """Quantize an ONNX graph with ONNX Runtime's quantizer: an ONNX file, and what runs it."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: _in_rows(batch)}

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, made = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "made"))
        plain.write_bytes(graph)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_static(ready, made, Reader(), per_channel=True)
        content = made.read_bytes()
    return content, ONNXRuntime(content, "fp32")


def _in_rows(batch: Tensor) -> Any:
    return batch.contiguous(memory_format=torch.contiguous_format).numpy()
