#!/usr/bin/env python3
"""Measure what this repository promises about speed, as ratios within one run.

  python scripts/benchmark.py train               training steps, beside timm and the limits
  python scripts/benchmark.py infer               inference, beside timm and the limits
  python scripts/benchmark.py infer --peers       on CPUs, beside timm compiled, ONNX Runtime and
                                                  OpenVINO (requirements-inference.txt)
  python scripts/benchmark.py optimizer           clipping, RMSProp and average, beside timm's
  python scripts/benchmark.py start               from starting train.py to its first step
  python scripts/benchmark.py data                getting images in, beside timm's transforms
  python scripts/benchmark.py data --peers        the same beside OpenCV, DALI and SPDL
                                                  (requirements-benchmark.txt)
  python scripts/benchmark.py data --end-to-end   training from JPEGs, beside training from memory;
                                                  wants a GPU
  python scripts/benchmark.py checkpoint          what saving costs training, on the quickstart
  python scripts/benchmark.py scaling             two processes against one, one thread each, and
                                                  the parts of a step that scripts/plan.py needs
  python scripts/benchmark.py remote              shards in an object store, cached and cold; wants
                                                  requirements-remote.txt
  python scripts/benchmark.py gpu --minutes 8     what a GPU shows in so many minutes, the most
                                                  important first; without one a rehearsal
  python scripts/benchmark.py all                 one after the other, but remote and gpu

Prints a table with the machine and versions it belongs to. docs/benchmarks.md is written by
`python scripts/benchmark.py WHAT --page docs/benchmarks.md`. The GPU is taken if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import UserError
from data.files import write_atomically
from irv2 import cli
from irv2.cli import positive
from irv2.report.markdown import has_section, replace_section
from irv2.run import directory
from irv2.training import distributed
from scripts.benchmarks import (
    end_to_end,
    gpu,
    loading,
    loading_peers,
    network,
    peers,
    remote,
    saving,
    scaling,
    starting,
    updating,
)
from scripts.benchmarks.network import Setting

WHAT = ("train", "infer", "optimizer", "start", "data", "checkpoint", "scaling")
MODULES = {  # whose measurement takes rounds alone
    "data": loading,
    "data-peers": loading_peers,
    "data-end-to-end": end_to_end,
    "checkpoint": saving,
    "scaling": scaling,
    "remote": remote,
}
ON_CPU = {"infer-peers", "data-peers", "data", "scaling", "remote"}  # wherever they run
Figures = dict[str, Any]


class Benchmark(NamedTuple):
    """Something to measure, and how to show it; `name` is its section of the page."""

    name: str
    measure: Callable[[], Figures]
    table: Callable[[Figures], str]
    check: Callable[[], None] | None = None


def benchmarks(arguments: argparse.Namespace, device: torch.device) -> Iterator[Benchmark]:
    """Yield the benchmarks that the command line asks for."""
    wanted = WHAT if arguments.what == "all" else (arguments.what,)
    rounds, compiled = arguments.rounds, arguments.compile
    on = "-gpu" if device.type == "cuda" else ""
    suffix = f"{on}-compiled" if compiled else on
    variant = "-peers" if arguments.peers else "-end-to-end" if arguments.end_to_end else ""
    for what in (f"{what}{variant}" for what in wanted):
        if what == "infer-peers":
            yield Benchmark(what, lambda: peers.measure(rounds, arguments.image_size), peers.table)
        elif what in ("train", "infer"):
            cases = list(network_cases(arguments, device))
            yield network_benchmark(what, suffix, cases, rounds, compiled)
        elif what == "optimizer":
            yield Benchmark(
                f"optimizer{on}",
                lambda: updating.measure(device, rounds),
                updating.table,
                lambda: updating.check(device),
            )
        elif what == "start":
            yield Benchmark(
                f"start{suffix}", lambda: starting.measure(rounds, compiled), starting.table
            )
        else:
            module, name = MODULES[what], f"{what}{on}" if what == "checkpoint" else what
            yield Benchmark(name, partial(module.measure, rounds), module.table)


def network_cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[Setting]:
    """Yield a case for the precision asked for, else for those that the device is fast in."""
    batch = arguments.batch or (128 if device.type == "cuda" else 8)
    precisions = [arguments.precision] if arguments.precision else ["bf16"]
    if not arguments.precision and device.type == "cpu":
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        precisions = ["bf16", "fp32"] if has_bf16 else ["fp32"]
    for precision in precisions:
        yield Setting(batch, arguments.image_size, precision, device)


def network_benchmark(
    what: str, suffix: str, cases: list[Setting], rounds: int, compiled: bool
) -> Benchmark:
    measure, check = {
        "train": (network.measure_training, network.check_training),
        "infer": (network.measure_inference, network.check_inference),
    }[what]

    def check_all() -> None:
        for case in cases:
            check(case)

    return Benchmark(
        f"{what}{suffix}",
        lambda: {"cases": [measure(case, rounds, compiled) for case in cases]},
        lambda figures: "\n\n".join(network.table(case) for case in figures["cases"]),
        check_all,
    )


def machine(names: Iterable[str]) -> str:
    """Device and software that the benchmarks of these names were measured with."""
    on_gpu = torch.cuda.is_available() and not set(names) <= ON_CPU
    device = torch.cuda.get_device_name() if on_gpu else cpu_name()
    versions = ", ".join(f"{name} {version}" for name, version in directory.software().items())
    return f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; {versions}"


def cpu_name() -> str:
    """Name of the processor, and its unit for bfloat16 if it has one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = next((unit for unit in ("amx_bf16", "avx512_bf16", "avx512f") if unit in flags), "")
    return f"{names[0] if names else platform.processor()}{f' ({units})' if units else ''}"


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("what", choices=[*WHAT, "remote", "gpu", "all"])
    parser.add_argument("--minutes", type=positive, default=8, help="with gpu (default: 8)")
    parser.add_argument("--rounds", type=positive, default=5, help="pairs of turns (default: 5)")
    network_options = parser.add_argument_group("with train and infer")
    network_options.add_argument("--batch", type=positive, help="images (default: 8; GPU: 128)")
    network_options.add_argument("--image-size", type=positive, default=299, help="px (299)")
    network_options.add_argument("--precision", choices=["fp32", "bf16", "fp16"])
    network_options.add_argument(
        "--compile", action="store_true", help="also start: torch.compile on both sides; for GPUs"
    )
    network_options.add_argument(
        "--check",
        action="store_true",
        help="also optimizer: first compare the results; status 1 if they differ",
    )
    network_options.add_argument(
        "--profile", action="store_true", help="only show which operations take our time"
    )
    parser.add_argument("--peers", action="store_true", help="with infer and data: see above")
    parser.add_argument("--end-to-end", action="store_true", help="with data: on a GPU, see above")
    parser.add_argument("--json", type=cli.path, metavar="OUT", help="also write the figures here")
    parser.add_argument(
        "--page", type=cli.path, metavar="FILE", help="put the table into this page"
    )
    arguments = parser.parse_args()
    if arguments.end_to_end and arguments.what != "data":
        parser.error("--end-to-end goes with data")
    if arguments.peers and arguments.what not in ("infer", "data"):
        parser.error("--peers goes with infer and data")
    if arguments.end_to_end and not torch.cuda.is_available():
        parser.error("--end-to-end needs a GPU")
    if arguments.what == "gpu" and arguments.page and not torch.cuda.is_available():
        parser.error("gpu without a GPU is a rehearsal, whose figures go into no page")
    if arguments.profile and arguments.what not in ("train", "infer"):
        parser.error("--profile goes with train and infer")
    return arguments


@cli.program
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    device = distributed.choose_device("auto")
    distributed.set_up(device)
    if arguments.profile:
        for case in network_cases(arguments, device):
            print(f"{case}\n{network.profile(case, arguments.what == 'train')}")
        return 0
    if arguments.what == "gpu":
        measure_gpu(arguments.minutes, arguments.page)
        return 0
    results: dict[str, Figures] = {}
    wanted = list(benchmarks(arguments, device))
    if arguments.page is not None:
        missing = [b.name for b in wanted if not has_section(arguments.page, b.name)]
        if missing:
            raise UserError(f"{arguments.page} has no section {missing[0]}")
    for benchmark in wanted:
        if arguments.check and benchmark.check is not None:
            benchmark.check()  # raises DisagreementError
            print(f"{benchmark.name}: results agree", flush=True)
        figures = benchmark.measure()
        text = f"{benchmark.table(figures)}\n\n{machine([benchmark.name])}"
        print(f"{text}\n", flush=True)
        results[benchmark.name] = figures
        if arguments.page is not None:
            replace_section(arguments.page, benchmark.name, text)
    if arguments.json is not None:
        write_figures(arguments.json, results)
    return 0


def measure_gpu(minutes: int, page: Path | None) -> None:
    """Measure what a GPU shows in so many minutes, and write each part into the page as it ends."""
    rehearsal = not torch.cuda.is_available()
    if page is not None and not has_section(page, "gpu"):
        raise UserError(f"{page} has no section gpu")
    where = f"{machine(['gpu'])}, {date.today()}"

    def ended(figures: Figures, outcomes: list[gpu.Outcome]) -> None:
        part, how, seconds, _ = outcomes[-1]
        print(f"{part}: {how}, {seconds:.0f} s", flush=True)
        text = f"{gpu.table(figures, outcomes)}\n\n{where}"
        if page is not None:
            replace_section(page, "gpu", text)

    figures, outcomes = gpu.measure(minutes, rehearsal, ended)
    print(f"\n{gpu.table(figures, outcomes)}\n\n{where}")
    print("\nLook first at:", *gpu.look_first(figures, outcomes), sep="\n  ")
    if rehearsal:
        print("A REHEARSAL on a CPU with a small network: no figure above is one.")


def write_figures(path: Path, results: dict[str, Figures]) -> None:
    """Write one benchmark's figures, or several by name, with the machine."""
    only = next(iter(results.values())) if len(results) == 1 else results
    write_atomically(path, json.dumps({**only, "machine": machine(results)}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
