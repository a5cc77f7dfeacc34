"""The parts of `benchmark.py gpu`, each a process: `python -m scripts.benchmarks.gpu_parts NAME`.

A figure is a line {"name": value}. With --rehearsal all is small, on a CPU, and no figure counts.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from irv2.network.accelerate import accelerate, fold_batch_norm
from irv2.network.model import inception_resnet_v2
from irv2.training import distributed
from scripts.benchmarks import network, updating
from scripts.benchmarks.alternation import best_time, rate, seconds

WINDOW = 10  # steps
STEPS = 8  # of the part identity
FAMILIES = (  # of kernels, by their names, the first that fits
    ("fused by the compiler", r"^triton_"),
    ("pooling", r"pool"),
    ("convolutions and products", r"conv|gemm|cutlass|xmma|wgrad|dgrad|cudnn|nvjet|sm\d+_"),
    ("multi-tensor", r"multi_tensor|foreach"),
    ("copies and masks", r"copy|where|memcpy|memset|fill"),
    ("batch norm", r"batch_norm|bn_"),
)


class Bench:
    """Device, networks and clock of a part."""

    def __init__(self, rehearsal: bool) -> None:
        self.rehearsal = rehearsal
        self.device = distributed.choose_device("cpu" if rehearsal else "cuda")
        batch, size = (4, 75) if rehearsal else (128, 299)
        self.case = network.Setting(batch, size, "bf16", self.device)
        self.window = 1 if rehearsal else WINDOW

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Ours and timm's; in a rehearsal small ones, both ours."""
        if not self.rehearsal:
            return network.networks(self.device)
        torch.manual_seed(0)
        ours = accelerate(inception_resnet_v2(blocks=(1, 1, 1), width=1 / 16))
        return ours, copy.deepcopy(ours)

    def images_per_s(self, work: Callable[[], object], images: int | None = None) -> float:
        """Median of three windows, after one that is discarded."""

        def window() -> None:
            for _ in range(self.window):
                work()

        way = rate(self.window * (images or self.case.batch), window, self.device)
        way()
        return sorted(way() for _ in range(3))[1]

    def compiled(self, model: nn.Module, mode: str) -> nn.Module:
        return model if self.rehearsal else torch.compile(model, mode=mode, dynamic=False)


def report(**figures: float | str) -> None:
    print(json.dumps(figures), flush=True)


def forget_memory() -> None:
    """Have the next peak be that of what comes now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def report_memory(name: str) -> None:
    if torch.cuda.is_available():
        report(**{name: torch.cuda.max_memory_reserved() / 2**30})


# ------------------------------------------------------------------------------------- the parts


def ceilings(bench: Bench) -> None:
    """The card's rates at a large product of random numbers, and at copying."""
    n = 256 if bench.rehearsal else 8192
    left, right = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
    report(matrix_tflops=2 * n**3 / best_time(lambda: left @ right, bench.device) / 1e12)
    source = torch.empty(n * n * 8, device=bench.device)
    target = torch.empty_like(source)
    took = best_time(lambda: target.copy_(source), bench.device)
    report(copy_tb_s=2 * source.nbytes / took / 1e12)


def eager(bench: Bench) -> None:
    ours, peer = bench.networks()
    trainers = {
        "eager": network.our_trainer(ours, bench.case),
        "timm_eager": network.timms_trainer(peer, bench.case),
    }
    for name, trainer in trainers.items():
        report(**{name: bench.images_per_s(trainer.step)})
    for name, trainer in trainers.items():
        report(**{f"{name}_forward_backward": bench.images_per_s(trainer.forward_backward)})
    for name, make in (("", updating.our_update), ("timm_", updating.timms_update)):
        work = make(bench.networks()[bool(name)]).work
        report(**{f"{name}update_ms": 1e3 * best_time(work, bench.device, 3)})


def graph(bench: Bench) -> None:
    """Ours with its regions compiled, then recorded as well."""
    for name, mode in (("regions", "regions"), ("graph", "graph")):
        ours = trainer = None
        forget_memory()
        ours, _ = bench.networks()
        mode = False if bench.rehearsal and mode == "regions" else mode
        trainer = network.our_trainer(ours, bench.case, mode)
        took = seconds(trainer.step, bench.device)
        if name == "regions":
            report(compile_s=took)
        for _ in range(4):  # and recorded
            trainer.step()
        report(**{name: bench.images_per_s(trainer.step)})
        report_memory(f"{name}_gib")


def timm_compiled(bench: Bench) -> None:
    """timm's network in the modes of torch.compile, each reported as it is there."""
    best = 0.0
    for mode in network.MODES:
        peer = trainer = None
        forget_memory()
        _, peer = bench.networks()
        trainer = network.timms_trainer(bench.compiled(peer, mode), bench.case)
        took = seconds(trainer.step, bench.device)
        if best == 0:
            report(timm_compile_s=took)
            report_memory("timm_compiled_gib")
        best = max(best, bench.images_per_s(trainer.step))
        report(timm_compiled=best)


@torch.inference_mode()
def inference(bench: Bench) -> None:
    ours, peer = bench.networks()
    sides = {"infer": fold_batch_norm(ours).bfloat16(), "timm_infer": peer.eval().bfloat16()}
    for batch in (128, 8, 1):
        case = bench.case._replace(batch=min(batch, bench.case.batch))
        images = case.images().bfloat16()
        for name, model in sides.items():
            torch.compiler.reset()
            compiled = bench.compiled(model, "max-autotune")
            pace = bench.images_per_s(partial(compiled, images), case.batch)
            report(**{f"{name}_{batch}": pace})


def profile(bench: Bench) -> None:
    """Milliseconds of a step by family of kernels, and the share in which none runs."""
    ours, _ = bench.networks()
    step = network.our_trainer(ours, bench.case, False if bench.rehearsal else "graph").step
    for _ in range(6):
        step()
    took = seconds(lambda: [step() for _ in range(bench.window)], bench.device)
    with torch.profiler.profile() as profiler:
        seconds(step, bench.device)
    is_cuda, sums = bench.device.type == "cuda", Counter()
    for event in profiler.key_averages():
        spent = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if not is_cuda or event.device_type == torch.autograd.DeviceType.CUDA:
            sums[family(event.key)] += spent / 1e3
    report(**{f"family {name}": ms for name, ms in sums.items() if ms > 0.005})
    report(gpu_waits=max(0.0, 1 - sum(sums.values()) / (1e3 * took / bench.window)))


def family(kernel: str) -> str:
    """Name of the family that a kernel belongs to."""
    fitting = (name for name, pattern in FAMILIES if re.search(pattern, kernel, re.IGNORECASE))
    return next(fitting, "others")


def identity(bench: Bench) -> None:
    """The same steps again in another process, and from the middle on in a third."""
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, *options: str) -> dict[str, Tensor]:
            command = [sys.executable, "-m", "scripts.benchmarks.gpu_parts", "steps"]
            command += ["--rehearsal"] if bench.rehearsal else []
            subprocess.run([*command, "--to", str(Path(folder, name)), *options], check=True)
            return torch.load(Path(folder, name, "end.pt"), weights_only=True)["tensors"]

        def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
            return f"{sum(torch.equal(one[key], other[key]) for key in one)} of {len(one)}"

        once = run("once", "--deterministic", "--pace")
        report(identical_twice=same(once, run("again", "--deterministic")))
        middle = str(Path(folder, "once", "middle.pt"))
        report(identical_resumed=same(once, run("rest", "--deterministic", "--from", middle)))
        report(identical_as_is=same(run("plain", "--pace"), run("plain-again")))


def steps(bench: Bench, arguments: argparse.Namespace) -> None:
    """Make STEPS steps, the second half recorded, and save the state in the middle and at the end;
    or begin in the middle."""
    ours, _ = bench.networks()
    trainer = network.our_trainer(ours, bench.case, "graph")
    state, folder = trainer.state, Path(arguments.to)
    folder.mkdir()
    if arguments.origin is not None:
        saved = torch.load(arguments.origin, weights_only=True)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for key, tensor in saved["tensors"].items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
        state.load(parts, saved["counters"])
    while state.step < STEPS:
        trainer.step()
        if state.step in (STEPS // 2, STEPS):
            tensors = {
                f"{part}.{name}": tensor.cpu()
                for part, tensors in state.tensors().items()
                for name, tensor in tensors.items()
            }
            name = "end.pt" if state.step == STEPS else "middle.pt"
            torch.save({"tensors": tensors, "counters": state.counters()}, folder / name)
    if arguments.pace:
        name = "deterministic" if arguments.deterministic else "not_deterministic"
        report(**{name: bench.images_per_s(trainer.step)})


def tests(bench: Bench) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "--tb=line"]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout[-3000:], flush=True)
    report(tests=result.stdout.strip().rpartition("\n")[2].strip("= "))


PARTS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "eager": eager,
    "graph": graph,
    "identity": identity,
    "timm-compiled": timm_compiled,
    "inference": inference,
    "profile": profile,
    "tests": tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "steps"])
    parser.add_argument("--rehearsal", action="store_true")
    own = parser.add_argument_group("with steps, which is a process of the part identity")
    own.add_argument("--pace", action="store_true")
    own.add_argument("--from", dest="origin")
    own.add_argument("--to")
    own.add_argument("--deterministic", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments.rehearsal)
    distributed.set_up(bench.device, arguments.deterministic)
    if arguments.part == "steps":
        steps(bench, arguments)
    else:
        PARTS[arguments.part](bench)


if __name__ == "__main__":
    main()
