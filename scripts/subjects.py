"""The trained network that a script is about, as its command line names it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from irv2 import trained
from irv2.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--run or --weights, and --which."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", type=Path, metavar="DIR", help="a run's newest checkpoint")
    subject.add_argument(
        "--weights",
        metavar="FILE|timm:NAME",
        help="a .pth, .pt or .safetensors file with timm's names, or weights from timm's hub",
    )
    parser.add_argument(
        "--which", choices=["ema", "raw"], default="ema", help="of a run: averaged (default) or raw"
    )


def open_subject(arguments: argparse.Namespace) -> Trained:
    """The network. Raises CheckpointError, or WeightsError."""
    if arguments.run is not None:
        return trained.of_run(arguments.run, arguments.which, say)
    return trained.of_weights(arguments.weights)


def say(text: str) -> None:
    """A remark, apart from what the script is asked to print."""
    print(text, file=sys.stderr, flush=True)
