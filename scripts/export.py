#!/usr/bin/env python3
"""Write a trained network for other programs, and show that they compute the same with it.

  python scripts/export.py --run runs/quickstart --format onnx --out digits.onnx
  python scripts/export.py --run runs/quickstart --format openvino --out digits_int8 --int8 \
      --calibrate datasets/digits/train
  python scripts/export.py --weights runs/quickstart/best.safetensors --format timm --out digits

  safetensors   timm's names, one file; validate.py and predict.py read it, and timm does:
                timm.create_model("inception_resnet_v2", num_classes=N, checkpoint_path=FILE)
  timm          a folder: FOLDER/model.safetensors is such a file, and with FOLDER/config.json
                timm.create_model("local-dir:FOLDER", pretrained=True) knows classes and view, too
  torch-export  a graph that torch.export.load reads, without this repository
  onnx          a graph for ONNX Runtime and others, in one file
  openvino      a folder with openvino_model.xml and .bin

Graphs take float32 images [batch, 3, size, size], normalised, and give logits [batch, classes], for
any batch; batch norm is folded into the convolutions unless --not-folded. Classes, their names and
how images are seen (size, crop, interpolation, mean, std) travel in the file's metadata, as JSON.

--push OWNER/NAME uploads the folder of --format timm to Hugging Face's hub, with a model card in it
(README.md) written from the run: data, figures with intervals, curve, recipe, how to load it.

With --int8 --calibrate DATA, onnx and openvino have products of 8-bit integers, whose ranges are
measured on images of DATA, training images, say. Top-1 on the validation images is printed before
and after and kept in the metadata; nothing is written if more than --most-loss points are lost.

The result is opened by the runtime that it is for and run on images in batches of 1 and 3: those of
--check-images, else of the run's data.val, else scikit-learn's photographs. It gets its name only
if its logits are this network's. Exit status: 0 done, 1 something must be fixed first, and nothing
was left behind, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import loader, pictures, sources, transforms
from data.errors import DataError
from data.to_input import ToInput
from irv2 import cli, formats, input_pipeline
from irv2.formats import FORMATS, ExportError, Forward
from irv2.run.trained import Trained
from scripts.exporting import card, int8

BATCHES = (1, 3)


def export(arguments: argparse.Namespace) -> None:
    """Export a network to a file that is known to compute the same."""
    out, kind = arguments.out, FORMATS[arguments.format]
    check_name(out, arguments.format)
    formats.check_packages(arguments.format, arguments.int8)
    # Beside the result, so that it can be renamed; made now, so that a mistake ends the program.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        network = cli.load_network(arguments)
        write = functools.partial(kind.write, network, kind.may_fold and not arguments.not_folded)
        row("weights", f"{network.name} ({network.which})")
        images, where = check_images(network, arguments.check_images)
        with torch.inference_mode():
            expected = network.model.eval()(images)
        if not expected.isfinite().all():
            raise ExportError(f"{network.name}: its logits of {where} are not finite")

        row("format", arguments.format + (", int8" if arguments.int8 else ""))
        if arguments.int8:
            run, write = int8.quantized(network, arguments, row)
            expected = run(images)
        made = Path(folder) / out.name
        try:
            write(made)
        except OSError as error:
            raise ExportError(f"{out}: cannot be written ({error.strerror})") from None

        difference = largest_difference(kind.run(made, network), images, expected)
        batches = " and ".join(map(str, BATCHES))
        row("checked", f"by {kind.runtime}, on {where}, in batches of {batches}")
        row("difference", f"{difference:.1e} of the largest logit; allowed: {kind.tolerance:g}")
        if not difference <= kind.tolerance:  # written so that NaN fails, too
            raise ExportError(f"{out}: {kind.runtime} computes something else; nothing was kept")
        if arguments.push is not None:
            (made / "README.md").write_text(card.text(network, arguments.push), encoding="utf-8")
        keep(made, out)
    size = sum(path.stat().st_size for path in files_of(out))
    row("written", f"{out}, {size / 1e6:,.1f} MB")
    if arguments.push is not None:
        row("pushed", card.push(out, arguments.push))


def row(name: str, value: str) -> None:
    cli.say(f"{name:<11} {value}")


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
    """Rename what was made to its final name, once it is on the disk."""
    for path in files_of(made):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    made.rename(out)


def files_of(path: Path) -> list[Path]:
    """List a file, or the files of a folder."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


# ------------------------------------------------------------------------- the check


def largest_difference(run: Forward, images: Tensor, expected: Tensor) -> float:
    """Largest difference of a logit from `expected`, as a share of the largest of these."""
    with torch.inference_mode():
        logits = torch.cat([run(part) for part in images.split(BATCHES)])
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def check_images(network: Trained, named: list[str] | None) -> tuple[Tensor, str]:
    """Prepare images for the check as the network's input, and name them. Raises DataError."""
    view = input_pipeline.evaluation_view(network.data)
    val = network.images
    if named is not None:
        pixels, where = read_files(named, view), "the images named"
    elif val is not None and os.path.isdir(val):
        pixels, where = read_source(val, view), f"images of {val}"
    else:
        pixels, where = read_photographs(view), "scikit-learn's photographs"
    to_input = ToInput(network.data.mean, network.data.std, torch.device("cpu"))
    several = np.stack(list(islice(cycle(pixels), sum(BATCHES))))
    flips = torch.zeros(len(several), dtype=torch.bool)
    return to_input(torch.from_numpy(several), flips, None).contiguous(), where


def read_files(named: list[str], view: transforms.EvalView) -> list[np.ndarray]:
    """Read the first files. Raises DataError for one that cannot be used."""
    views = []
    for path in islice(pictures.named(named), sum(BATCHES)):
        picture = pictures.see(path, view)
        if picture.pixels is None:
            raise DataError(f"{picture.path}: {picture.error}")
        views.append(picture.pixels)
    return views


def read_source(val: str, view: transforms.EvalView) -> list[np.ndarray]:
    """Read images from all over a data set. Raises DataError for one that cannot be used."""
    source = sources.open_source(val)
    spread = range(0, len(source), max(1, len(source) // sum(BATCHES)))[: sum(BATCHES)]
    return [transforms.as_evaluated(loader.read_image(source, index)[0], view) for index in spread]


def read_photographs(view: transforms.EvalView) -> list[np.ndarray]:
    """Read both halves of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    halves = [half for image in load_sample_images().images for half in np.hsplit(image, 2)]
    return [transforms.as_evaluated(np.ascontiguousarray(half), view) for half in halves]


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    cli.add_network(parser)
    cli.add_view(parser)
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--out", type=cli.path, required=True, help="a name that is not taken")
    parser.add_argument("--not-folded", action="store_true", help="graphs: keep batch norm")
    parser.add_argument(
        "--check-images",
        type=cli.picture,
        nargs="+",
        metavar="IMAGE|FOLDER",
        help="compare logits on these",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="with --format timm: write a model card, too, and upload all to Hugging Face's hub",
    )
    add = parser.add_argument_group("int8, of the formats onnx and openvino")
    add.add_argument("--int8", action="store_true", help="8-bit integers, if accuracy allows it")
    add.add_argument(
        "--calibrate",
        type=cli.location,
        metavar="DATA",
        help="training images to measure ranges on",
    )
    add.add_argument(
        "--data", type=cli.location, metavar="DIR", help="evaluate on these; default: data.val"
    )
    add.add_argument(
        "--most-loss",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="most of top-1 that may be lost (default: 0.5)",
    )
    arguments = parser.parse_args()
    if arguments.push is not None and arguments.format != "timm":
        parser.error("--push goes with --format timm")
    if arguments.int8 and arguments.format not in formats.QUANTIZERS:
        parser.error(f"--int8 goes with --format {' and '.join(formats.QUANTIZERS)}")
    if arguments.int8 != (arguments.calibrate is not None):
        parser.error("--int8 and --calibrate DATA go together")
    return arguments


@cli.program
def main() -> int:
    """Command line -> exit status."""
    export(parse_arguments())
    return 0


if __name__ == "__main__":
    sys.exit(main())
