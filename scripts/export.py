#!/usr/bin/env python3
"""Write a trained network for other programs, and show that they compute the same with it.

  python scripts/export.py --run runs/quickstart --format onnx --out digits.onnx
  python scripts/export.py --weights runs/quickstart/best.safetensors --format timm --out digits

  safetensors   timm's names, one file; validate.py and predict.py read it, and timm does:
                timm.create_model("inception_resnet_v2", num_classes=N, checkpoint_path=FILE)
  timm          a folder: FOLDER/model.safetensors is such a file, and with FOLDER/config.json
                timm.create_model("local-dir:FOLDER", pretrained=True) knows classes and view, too
  torch-export  a graph that torch.export.load reads, without this repository
  onnx          a graph for ONNX Runtime and others, in one file

Graphs take float32 images [batch, 3, size, size], normalised, and give logits [batch, classes], for
any batch; batch norm is folded into the convolutions unless --not-folded. Classes, their names and
how images are seen (size, crop, interpolation, mean, std) travel in the file's metadata, as JSON.

What was written is opened by the runtime that it is for and asked about images in batches of 1 and
3: those of the run's data.val, else of --check-images, else scikit-learn's photographs. Only where
its logits are this network's does it get its name. Exit status: 0 done, 1 something must be mended
first, and nothing was left behind, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import loader, sources, transforms
from data.to_input import ToInput
from irv2 import checkpoint, program, weights
from irv2.trained import Trained
from scripts import formats, pictures, subjects
from scripts.formats import FORMATS, ExportError, Run

BATCHES = (1, 3)
MISTAKES = (
    checkpoint.CheckpointError,
    sources.DataError,
    ExportError,
    weights.WeightsError,
    OSError,
)


def export(arguments: argparse.Namespace) -> None:
    """From a network to a file that is known to be as good."""
    out, kind = arguments.out, FORMATS[arguments.format]
    check_name(out, arguments.format)
    formats.check_packages(arguments.format)
    # Beside the result, so that it can be renamed; made now, so that it is known to be possible.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        subject = subjects.open_subject(arguments)
        folded = kind.may_fold and not arguments.not_folded
        row("weights", f"{subject.name} ({subject.which})")
        images, where = check_images(subject, arguments.check_images)
        with torch.inference_mode():
            expected = subject.model.eval()(images)

        row("format", arguments.format + (", batch norm folded" if folded else ""))
        made = Path(folder) / out.name
        try:
            kind.write(subject, folded, made)
        except OSError as error:
            raise ExportError(f"{out}: cannot be written ({error.strerror})") from None

        difference = largest_difference(kind.run(made, subject), images, expected)
        batches = " and ".join(map(str, BATCHES))
        row("checked", f"by {kind.runtime}, on {where}, in batches of {batches}")
        row("difference", f"{difference:.1e} of the largest logit; allowed: {kind.tolerance:g}")
        if not difference <= kind.tolerance:  # as written, also for what is no number
            raise ExportError(f"{out}: {kind.runtime} computes something else; nothing was kept")
        keep(made, out)
    size = sum(path.stat().st_size for path in files_of(out))
    row("written", f"{out}, {size / 1e6:,.1f} MB")


def row(name: str, value: str) -> None:
    print(f"{name:<11} {value}", flush=True)


def check_name(out: Path, kind: str) -> None:
    """Raise ExportError for a name that is taken, or that says another format."""
    suffix = FORMATS[kind].suffix
    if os.path.lexists(out):
        raise ExportError(f"{out}: is there already; move it away, or give another --out")
    if not out.parent.is_dir():
        raise ExportError(f"{out}: no such folder to write it into")
    if suffix and out.suffix != suffix:
        raise ExportError(f"{out}: --out of --format {kind} must end in {suffix}")


def keep(made: Path, out: Path) -> None:
    """Give what was made its name, once the disk has it."""
    for path in files_of(made):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    made.rename(out)


def files_of(path: Path) -> list[Path]:
    """A file, or the files of a folder."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


# ------------------------------------------------------------------------- the check


def largest_difference(run: Run, images: Tensor, expected: Tensor) -> float:
    """Largest difference of a logit from `expected`, as a share of the largest of these."""
    with torch.inference_mode():
        found = torch.cat([run(part) for part in images.split(BATCHES)])
    return ((found - expected).abs().max() / expected.abs().max()).item()


def check_images(subject: Trained, named: list[str] | None) -> tuple[Tensor, str]:
    """Images for the check as the network's input, and what to call them. Raises DataError."""
    view = pictures.view_of(subject.data)
    val = subject.data["val"]
    if named is not None:
        pixels, where = of_files(named, view), "the images named"
    elif val is not None and os.path.isdir(os.path.expanduser(val)):
        pixels, where = of_source(val, view), f"images of {val}"
    else:
        pixels, where = of_scikit_learn(view), "scikit-learn's photographs"
    to_input = ToInput(subject.data["mean"], subject.data["std"], torch.device("cpu"))
    several = np.stack(list(islice(cycle(pixels), sum(BATCHES))))
    flips = torch.zeros(len(several), dtype=torch.bool)
    return to_input(torch.from_numpy(several), flips, None).contiguous(), where


def of_files(named: list[str], view: transforms.EvalView) -> list[np.ndarray]:
    """The first files. Raises DataError for one that cannot be used."""
    found = []
    for path in islice(pictures.named(named), sum(BATCHES)):
        picture = pictures.see(path, view)
        if picture.pixels is None:
            raise sources.DataError(f"{picture.path}: {picture.error}")
        found.append(picture.pixels)
    return found


def of_source(val: str, view: transforms.EvalView) -> list[np.ndarray]:
    """Images from all over a data set. Raises DataError for one that cannot be used."""
    source = sources.open_source(val)
    spread = range(0, len(source), max(1, len(source) // sum(BATCHES)))[: sum(BATCHES)]
    return [transforms.shown(loader.read_image(source, index)[0], view) for index in spread]


def of_scikit_learn(view: transforms.EvalView) -> list[np.ndarray]:
    """Both halves of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    halves = [half for image in load_sample_images().images for half in np.hsplit(image, 2)]
    return [transforms.shown(np.ascontiguousarray(half), view) for half in halves]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subjects.add_arguments(parser)
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a name that is not taken")
    parser.add_argument("--not-folded", action="store_true", help="graphs: keep batch norm")
    parser.add_argument(
        "--check-images", nargs="+", metavar="IMAGE|FOLDER", help="compare logits on these"
    )
    return parser.parse_args()


def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()

    def body() -> int:
        export(arguments)
        return 0

    return program.exit_status(body, MISTAKES, of_one_rank=())


if __name__ == "__main__":
    sys.exit(main())
