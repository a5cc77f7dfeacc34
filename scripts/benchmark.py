#!/usr/bin/env python3
"""Measure what this repository promises about speed, as ratios within one run.

  python scripts/benchmark.py data                getting images in, beside timm's transforms
  python scripts/benchmark.py data --end-to-end   training from JPEGs, beside training from memory;
                                                  wants a GPU
  python scripts/benchmark.py checkpoint          what saving costs training, on the quickstart

Prints a table with the machine and versions it belongs to. docs/benchmarks.md is written by
`python scripts/benchmark.py WHAT --page docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irv2 import checkpoint, rundir
from scripts.benchmarks import end_to_end, loading, saving
from scripts.pages import replace_section

BENCHMARKS = {"data": loading, "data-end-to-end": end_to_end, "checkpoint": saving}


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    versions = ", ".join(f"{name} {version}" for name, version in rundir.software().items())
    return f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; {versions}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    """Command line -> exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["data", "checkpoint"])
    parser.add_argument("--end-to-end", action="store_true", help="with data: on a GPU, see above")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of windows (default: 5)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures here")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table into this page")
    arguments = parser.parse_args()
    if arguments.end_to_end and arguments.what != "data":
        parser.error("--end-to-end goes with data")
    if arguments.end_to_end and not torch.cuda.is_available():
        parser.error("--end-to-end needs a GPU")
    name = f"{arguments.what}{'-end-to-end' if arguments.end_to_end else ''}"
    benchmark = BENCHMARKS[name]
    found = benchmark.measure(arguments.rounds)
    text = f"{benchmark.table(found)}\n\n{machine()}"
    print(text)
    if arguments.page is not None:
        replace_section(arguments.page, name, text)
    if arguments.json is not None:
        content = json.dumps({**found, "machine": machine()}, indent=2) + "\n"
        checkpoint.write_atomically(arguments.json, lambda file: file.write(content.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
