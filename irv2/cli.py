"""Shared by all programs: their output and exit status, arguments, the network they work on."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, Protocol

import torch.distributed as dist
from tqdm import tqdm

from data import user_cache
from data.errors import DataError, UserError
from data.names import LONGEST_LINE, shown
from data.paths import expanded
from irv2 import streams
from irv2.data_section import MAX_IMAGE_SIZE
from irv2.engines.choose import NAMES as ENGINES
from irv2.engines.choose import TORCH
from irv2.run import trained
from irv2.run.trained import Trained
from irv2.streams import OutputLostError
from irv2.training import distributed
from irv2.training.distributed import Place, World, WorldError
from irv2.training.metrics import Collector

Arguments = ParamSpec("Arguments")

# ------------------------------------------------------------------------------ the program


def program(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Make a function a program's `main`: an error ends it in a line.

    A lost output ends it, as it ends any program.
    """
    return _guarded(main, outlives_output=False)


def run(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Make a function a program's `main` as `program` does; its result is files, so it continues
    when its output is lost."""
    return _guarded(main, outlives_output=True)


def _guarded(main: Callable[Arguments, int], outlives_output: bool) -> Callable[Arguments, int]:
    @functools.wraps(main)
    def guarded(*arguments: Arguments.args, **named: Arguments.kwargs) -> int:
        if _place().local_rank > 0:  # what is said of a machine is said by one of its ranks
            logging.getLogger(user_cache.__name__).setLevel(logging.ERROR)
        try:
            with streams.guarded(outlives_output):
                return exit_status(functools.partial(main, *arguments, **named))
        except OutputLostError as error:
            if error.errno == errno.EPIPE:  # the reader has stopped: | head
                return 128 + signal.SIGPIPE
            _report(f"standard output: cannot be written ({error.strerror})")
            return 1

    return guarded


# ------------------------------------------------------------------------------ arguments


class Parser(argparse.ArgumentParser):
    """A parser whose help is laid out as it is written, and which repeats no secret."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


class OptionGroup(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *names: str, **description: Any) -> argparse.Action: ...
    def add_mutually_exclusive_group(self, *, required: bool) -> OptionGroup: ...


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Type of an argument that is a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,19}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text} is not a whole number of at least {least} and at most {most:,}"
            )
        return int(text)

    return number


positive = whole(1)
image_size = whole(75, MAX_IMAGE_SIZE)


def share(text: str) -> float:
    """Type of an argument that is a number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1")
    return value


def location(text: str) -> str:
    """Type of an argument that is a path, or a URL, synthetic:… or timm:…."""
    try:
        return expanded(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> Path:
    """Type of an argument that is a path."""
    return Path(location(text))


def picture(text: str) -> str:
    """Type of an argument that a shell's * may have named: a file of that very name comes first."""
    if os.path.lexists(text):
        return text
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: only files; to see it: curl URL | predict.py -")
    return location(text)


def add_network(options: OptionGroup, several: bool = False) -> None:
    """Add --run or --weights, and --which: the trained networks, or the one, to work on."""
    network = options.add_mutually_exclusive_group(required=True)
    network.add_argument("--run", type=path, metavar="DIR", help="a run's newest checkpoint")
    network.add_argument(
        "--weights",
        type=location,
        nargs="+" if several else None,
        metavar="WEIGHTS",
        help="a file or folder (docs/evaluation.md lists its forms), timm:NAME or hf-hub:ORG/NAME",
    )
    options.add_argument(
        "--which",
        choices=["ema", "raw"],
        help="averaged weights (default, if there are any) or raw",
    )


def add_view(options: OptionGroup) -> None:
    """Add options of the view, which override what the weights say."""
    options.add_argument("--image-size", type=image_size, metavar="PX", help="side of the input")
    options.add_argument("--crop", type=share, help="centre crop's share of the resized side")
    options.add_argument("--interpolation", choices=["bicubic", "bilinear"])
    for name in ("mean", "std"):
        options.add_argument(
            f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), help="of pixels in [0, 1]"
        )


def add_engine(options: OptionGroup) -> None:
    """Add --engine, what runs the network."""
    options.add_argument(
        "--engine",
        choices=ENGINES,
        default=TORCH,
        help="what runs the network (default: torch); auto: the fastest here, timed once. One "
        "is used if its logits of the first images are PyTorch's (docs/evaluation.md)",
    )


def add_report(options: OptionGroup) -> None:
    """Add --report, a page of an evaluation, and what is on it."""
    options.add_argument(
        "--report",
        type=path,
        metavar="DIR",
        help="also write a page (index.html), per_class.csv and predictions.csv.gz there",
    )
    options.add_argument(
        "--explain",
        action="store_true",
        help="on the page, where the network looked in its mistakes (requirements-explain.txt)",
    )


def stated_view(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of `add_view` state, under its names in the config."""
    view = {
        "image_size": arguments.image_size,
        "eval_crop": arguments.crop,
        "eval_interpolation": arguments.interpolation,
        "mean": arguments.mean,
        "std": arguments.std,
    }
    return {key: value for key, value in view.items() if value is not None}


def load_network(arguments: argparse.Namespace) -> Trained:
    """Load the network that the options of `add_network` name.

    Raises CheckpointError, or WeightsError.
    """
    if arguments.run is not None:
        network = trained.load_run(arguments.run, arguments.which or "ema", remark)
    else:
        network = trained.load_weights(arguments.weights, arguments.which)
    for line in network.remarks:
        remark(line)
    return trained.seen_as(network, stated_view(arguments))


def say(text: str) -> None:
    """Print a line of the program's output."""
    print(shown(text), flush=True)


def remark(text: str) -> None:
    """Print a remark to stderr, separate from the program's output."""
    print(shown(text, LONGEST_LINE), file=sys.stderr, flush=True)


@contextmanager
def progress(name: str, images: int, world: World) -> Iterator[Callable[[int, Collector], None]]:
    """Show a bar on a terminal; yields the function that advances it, for `scoring.collect`.

    It shows this rank's top-1 at most once a second, because that waits for the device.
    """
    hidden = not (world.is_main and sys.stderr.isatty())
    title = shown(Path(name).name)
    with tqdm(total=images, desc=title, unit="image", leave=False, disable=hidden) as bar:
        last = time.perf_counter()

        def show(done: int, collected: Collector) -> None:
            nonlocal last
            if not bar.disable and time.perf_counter() - last > 1:
                bar.set_postfix_str(f"top-1 {collected.top1():.2f} %", refresh=False)
                last = time.perf_counter()
            bar.update(done)

        yield show


# ------------------------------------------------------------------------------ exit status


def exit_status(body: Callable[[], int]) -> int:
    """Run a program's body and return its status, or 1 after one line if a user's error ended it.

    Most errors occur on all ranks of a machine alike, so only one of them reports; errors of a
    single rank, and those of the operating system, are reported by the rank itself. A collective
    that fails because another rank has left needs no traceback: that rank has said why.
    """
    try:
        return body()
    except UserError as error:
        if _place().local_rank == 0 or error.one_rank:
            _report(*map(str, error.args))
        return 1
    except OSError as error:  # no permission, no space: the message names the file
        _report(str(error))
        return 1
    except RuntimeError as error:
        words = ("closed by peer", "reset by peer", "Timed out waiting")  # gloo's
        if not (isinstance(error, dist.DistError) or any(word in str(error) for word in words)):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        _report(f"ending, because another rank has ended or hangs ({reason})")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _place() -> Place:
    """Return this process's place, or if it has none, or nonsense, that of a single process."""
    try:
        return distributed.place()
    except WorldError:
        return Place()


def _report(*lines: str) -> None:
    name, rank = Path(sys.argv[0]).name, _place().rank
    speaker = f"{name}: rank {rank}" if rank > 0 else name
    text = "\n".join(shown(line, LONGEST_LINE) for line in lines)
    print(f"{speaker}: {text}", file=sys.stderr, flush=True)
