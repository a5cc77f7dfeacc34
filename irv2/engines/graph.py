"""The network as an ONNX graph in memory, which every engine reads."""

from __future__ import annotations

import io
import warnings

import torch
from torch import nn

from irv2.network.accelerate import fold_batch_norm

INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def onnx_graph(model: nn.Module, image_size: int) -> bytes:
    """Return an ONNX file: float32 [batch, 3, image_size, image_size] -> logits [batch, classes].

    By PyTorch's older exporter, which takes 3 s where the other, of scripts/export.py, takes 17.
    """
    content = io.BytesIO()
    # Tensors made in inference mode cannot be traced.
    with warnings.catch_warnings(), torch.inference_mode(False):
        example = torch.zeros(2, 3, image_size, image_size)
        warnings.simplefilter("ignore")  # it is called old, and the check of the size a constant
        torch.onnx.export(
            fold_batch_norm(model).requires_grad_(False),
            (example,),
            content,
            dynamo=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
        )
    return content.getvalue()
