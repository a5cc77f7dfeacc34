"""Inference beside everything that a user of CPUs could take: throughput and latency in one run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import user_cache
from data.optional import is_installed
from irv2.engines import int8
from irv2.engines.graph import onnx_graph
from irv2.engines.onnxruntime import ONNXRuntime
from irv2.engines.openvino import OpenVINO
from irv2.network.accelerate import fold_batch_norm
from irv2.report import markdown
from irv2.training.step import PRECISIONS
from scripts.benchmarks import network
from scripts.benchmarks.alternation import seconds
from scripts.benchmarks.network import Setting

BATCHES = (1, 8)
CALLS = 10  # of each way in a round, one after another
Work = Callable[[], object]


def measure(rounds: int, image_size: int) -> dict[str, Any]:
    """Measure every way in turn, for batches of 1 and 8: images/s, and p50 and p99 in ms."""
    cpu = torch.device("cpu")
    figures: dict[str, dict[str, Any]] = {}
    for batch in BATCHES:
        images = Setting(batch, image_size, "fp32", cpu).images()
        works = dict(ways(images))
        for work in works.values():
            work()
            work()
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name] += [seconds(work) for _ in range(CALLS)]
        for name, each in times.items():
            figures.setdefault(name, {})[str(batch)] = {
                "images_per_s": batch * len(each) / sum(each),
                "p50_ms": 1000 * float(np.percentile(each, 50)),
                "p99_ms": 1000 * float(np.percentile(each, 99)),
            }
    return {"ways": figures, "image_size": image_size, "rounds": rounds, "calls": rounds * CALLS}


def ways(images: Tensor) -> Iterator[tuple[str, Work]]:
    """Yield (name and precision, what runs the network on the images), of one set of weights."""
    ours, peer = network.networks(images.device)
    folded, peer = fold_batch_norm(ours), peer.eval()
    has_compiler = shutil.which("g++") is not None
    if has_compiler:
        user_cache.give_inductor_its_own(torch.__version__)
        compiled = torch.compile(peer, dynamic=False)  # each size by itself, which is faster
    for precision in ("fp32", "bf16"):
        yield f"ours, {precision}", _work(folded, images, precision)
        yield f"timm, {precision}", _work(peer, images, precision)
        if has_compiler:
            yield f"timm compiled, {precision}", _work(compiled, images, precision)
    graph = onnx_graph(ours, images.shape[-1])
    if is_installed("onnxruntime"):
        yield "ONNX Runtime, fp32", _work(ONNXRuntime(graph, "fp32"), images)
        yield "ONNX Runtime, int8", _work(int8.by_onnxruntime(graph, [images])[1], images)
    if is_installed("openvino"):
        for precision in ("fp32", "bf16"):
            yield f"OpenVINO, {precision}", _work(OpenVINO(graph, precision), images)
        if is_installed("nncf"):
            yield "OpenVINO, int8", _work(int8.by_openvino(graph, [images])[1], images)


def _work(run: nn.Module, images: Tensor, precision: str = "fp32") -> Work:
    dtype = PRECISIONS[precision]

    @torch.inference_mode()
    def work() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            run(images)

    return work


def table(figures: dict[str, Any]) -> str:
    """Format a row for each way."""
    size, heads = figures["image_size"], []
    for batch in BATCHES:
        heads.append(f"batch {batch}, images/s | p50, ms | p99, ms")
    rows = []
    for name, by_batch in figures["ways"].items():
        cells = [
            f"{each['images_per_s']:.4g} | {each['p50_ms']:.4g} | {each['p99_ms']:.4g}"
            for each in by_batch.values()
        ]
        rows.append(" | ".join([name, *cells]))
    return markdown.table(" | ".join([f"{size} px", *heads]), rows)
