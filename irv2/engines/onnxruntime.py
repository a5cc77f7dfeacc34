"""ONNX Runtime, which on CPUs computes in float32 and int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ONNXRuntime(nn.Module):
    """A graph run by ONNX Runtime: float32 [B, 3, H, W] -> float32 logits [B, C]."""

    precisions = ("fp32",)

    def __init__(self, graph: bytes, precision: str) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(graph, options, providers=providers)
        self.input = self.session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.contiguous_format).numpy()
        return torch.from_numpy(self.session.run(None, {self.input: images})[0])
