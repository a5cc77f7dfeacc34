#!/usr/bin/env python3
"""Classify pictures by a run or by published weights.

  python scripts/predict.py photo.jpg --run runs/quickstart
  python scripts/predict.py PHOTOS --weights runs/quickstart/best.safetensors --top 3
  find PHOTOS -print0 | python scripts/predict.py --files-from - --weights timm:NAME --json
  curl URL | python scripts/predict.py - --run runs/quickstart

Takes files, folders (with everything below them), lists of both, one a line or ended by NUL, and
from standard input a picture or such a list. Long names are shown shortened, with --json whole.
Each picture is preprocessed as by validate.py. Results are printed in the order of the pictures, as
each batch is done. With --json each line is {"image": …, "predictions": [{"class": …, "name": …,
"probability": …}, …]} or {"image": …, "error": …}. Exit status: 0 done; 1 something must be fixed
first, or some pictures could not be used, each with a line on standard error; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import pictures
from data.errors import DataError
from data.files import write_atomically
from data.names import LONGEST, LONGEST_LINE, shown, width, without_secrets
from data.optional import needed
from data.pictures import Picture
from data.to_input import ToInput
from irv2 import cli, explain, input_pipeline
from irv2.cli import positive
from irv2.engines import choose
from irv2.network import imagenet_names
from irv2.network.accelerate import fold_batch_norm
from irv2.run.trained import Trained
from irv2.training import distributed
from irv2.training.step import PRECISIONS


class Prediction(NamedTuple):
    """One of the likeliest classes of a picture."""

    output: int  # of the network
    label: str  # the class as the training data call it: a synset, a folder's name
    name: str  # the same in words
    probability: float


Results = list[tuple[Picture, list[Prediction]]]


class Predictor:
    """Pictures -> the likeliest classes of each, as validate.py ranks them."""

    def __init__(
        self, network: Trained, top: int, device: torch.device, precision: str, engine: str
    ) -> None:
        self.device, self.dtype = device, PRECISIONS[precision]
        model = fold_batch_norm(network.model).to(device, memory_format=torch.channels_last)
        self.run = choose.runner(engine, model, precision, cli.remark)
        self.features: Tensor | None = None  # [B, 1536] of the last batch, where PyTorch ran it
        model.get_classifier().register_forward_pre_hook(self._keep)
        self.to_input = ToInput(network.data.mean, network.data.std, device)
        self.labels = network.classes or [str(i) for i in range(model.num_classes)]
        self.names = imagenet_names.in_words(self.labels)
        self.top = top

    def _keep(self, _classifier: nn.Module, given: tuple[Tensor]) -> None:
        self.features = given[0]

    @torch.inference_mode()
    def logits(self, pixels: np.ndarray) -> Tensor:
        """uint8 [B, size, size, 3] -> float32 [B, C]."""
        images = torch.from_numpy(pixels).to(self.device)
        flips = torch.zeros(len(images), dtype=torch.bool, device=self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.run(self.to_input(images, flips, None)).float()

    def __call__(self, batch: list[Picture]) -> Results:
        """Predict the classes of each picture, the likeliest first.

        None if it cannot be read, or its logits are not finite; then it has an error.
        """
        seen = [picture.pixels for picture in batch if picture.pixels is not None]
        if not seen:
            return [(picture, []) for picture in batch]
        logits = self.logits(np.stack(seen))
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, : self.top]
        shares = logits.softmax(1).gather(1, best)
        are_finite = logits.isfinite().all(1).tolist()
        rows = iter(zip(best.tolist(), shares.tolist(), are_finite))
        return [
            self._predicted(picture, *next(rows)) if picture.pixels is not None else (picture, [])
            for picture in batch
        ]

    def _predicted(
        self, picture: Picture, best: list[int], shares: list[float], is_finite: bool
    ) -> tuple[Picture, list[Prediction]]:
        if not is_finite:
            return picture._replace(error="the network's logits of it are not finite"), []
        chosen = zip(best, shares)
        return picture, [Prediction(i, self.labels[i], self.names[i], share) for i, share in chosen]


def predict(arguments: argparse.Namespace, device: torch.device) -> int:
    """Print what each picture shows; returns the number of those that could not be used."""
    choose.check(arguments.engine, arguments.precision, device)
    if arguments.explain is not None:
        explain.check_installed()
        arguments.explain.mkdir(parents=True, exist_ok=True)
    network = cli.load_network(arguments)
    view = input_pipeline.evaluation_view(network.data)
    drawing = Drawing(network, device, arguments.explain) if arguments.explain else None
    embeddings = None if arguments.embeddings is None else Embeddings(arguments.embeddings)
    predictor = Predictor(network, arguments.top, device, arguments.precision, arguments.engine)
    show = show_json if arguments.json else Table()
    failed = 0
    lists = map(pictures.listed, arguments.files_from)
    paths = chain(pictures.named(arguments.images), *lists)
    hidden = sys.stdout.isatty() or not sys.stderr.isatty()
    with (
        pictures.read_ahead(paths, view, 2 * arguments.batch) as coming,
        tqdm(unit="image", leave=False, disable=hidden) as bar,
    ):
        while batch := list(islice(coming, arguments.batch)):
            results = predictor(batch)
            show(results)
            sys.stdout.flush()
            if drawing is not None:
                drawing(results)
            if embeddings is not None:
                embeddings.add(results, predictor.features)
            for picture, _ in results:
                if picture.error:
                    failed += 1
                    line = shown(f"{picture.path}: {picture.error}", LONGEST_LINE)
                    tqdm.write(line, file=sys.stderr)
            bar.update(len(batch))
    if embeddings is not None:
        embeddings.write()
    return failed


# ------------------------------------------------------------------------- output


def show_json(results: Results) -> None:
    """Print a JSON object for each picture. Names of files that are not UTF-8 are escaped."""
    for picture, predictions in results:
        if picture.error:
            content = {"image": without_secrets(picture.path), "error": picture.error}
        else:
            each = [
                {"class": p.label, "name": p.name, "probability": p.probability}
                for p in predictions
            ]
            content = {"image": picture.path, "predictions": each}
        print(json.dumps(content, allow_nan=False))


class Drawing:
    """Draws of each picture where the network saw its two likeliest classes: DIR/0001_NAME.png has
    the view of it, and beside it the map of each."""

    def __init__(self, network: Trained, device: torch.device, folder: Path) -> None:
        self.maps, self.folder, self.drawn = explain.ClassMaps(network, device), folder, 0

    def __call__(self, results: Results) -> None:
        for picture, predictions in results:
            if predictions:
                self.drawn += 1
                classes = [prediction.output for prediction in predictions[:2]]
                stem = re.sub(r"[^\w.-]", "_", Path(picture.path).stem)[:80]
                image = self.maps.drawn(picture.pixels, classes)
                image.save(self.folder / f"{self.drawn:04}_{stem}.png")


class Embeddings:
    """Features of the pictures before the classifier, float32, in the order of the output.

    A .npy file holds [N, 1536]; a .parquet file the columns image and embedding. Raises DataError
    where the name says neither, or pyarrow is missing.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".npy", ".parquet"):
            raise DataError(f"{path}: --embeddings must end in .npy or .parquet")
        if path.suffix == ".parquet":
            self.arrow = needed("pyarrow", "a parquet file")
            self.parquet = needed("pyarrow.parquet", "a parquet file")
        self.path, self.names, self.rows = path, [], []

    def add(self, results: Results, features: Tensor | None) -> None:
        """features: of those pictures of a batch that could be read."""
        seen = [(picture, chosen) for picture, chosen in results if picture.pixels is not None]
        if not seen:
            return
        is_sound = [bool(chosen) for _, chosen in seen]
        self.rows.append(features.float().cpu().numpy()[is_sound])
        self.names += [picture.path for picture, chosen in seen if chosen]

    def write(self) -> None:
        rows = np.concatenate(self.rows) if self.rows else np.zeros((0, 0), np.float32)
        if self.path.suffix == ".npy":
            write_atomically(self.path, lambda file: np.save(file, rows))
            return
        names = [name.encode("utf-8", "backslashreplace").decode() for name in self.names]
        table = self.arrow.table({"image": names, "embedding": list(rows)})
        write_atomically(self.path, lambda file: self.parquet.write_table(table, file))


class Table:
    """Prints a line for each picture; columns are as wide as the longest path so far, if not over
    LONGEST. Nothing in a name acts on the terminal."""

    def __init__(self) -> None:
        self.width = 0

    def __call__(self, results: Results) -> None:
        seen = [(shown(picture.path, LONGEST), chosen) for picture, chosen in results if chosen]
        self.width = max([self.width, *(width(path) for path, _ in seen)])
        for path, predictions in seen:
            words = ", ".join(f"{shown(p.name)} {100 * p.probability:.1f} %" for p in predictions)
            print(f"{path}{' ' * (self.width - width(path))}  {words}")


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "images",
        type=cli.picture,
        nargs="*",
        metavar="IMAGE|FOLDER|-",
        help="- is a picture or a list on stdin",
    )
    parser.add_argument(
        "--files-from",
        type=cli.location,
        action="append",
        default=[],
        metavar="LIST|-",
        help="a file of names, one a line or each ended by NUL",
    )
    cli.add_network(parser)
    cli.add_view(parser)
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes (default: 5)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument(
        "--batch", type=positive, default=16, metavar="N", help="images at once (default: 16)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--explain",
        type=cli.path,
        metavar="DIR",
        help="also draw there, of each picture, where the network saw its two likeliest classes",
    )
    parser.add_argument(
        "--embeddings",
        type=cli.path,
        metavar="OUT.npy|OUT.parquet",
        help="also write the features before the classifier there, 1,536 of each picture",
    )
    cli.add_engine(parser)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    arguments = parser.parse_intermixed_args()
    if not arguments.images and not arguments.files_from:
        parser.error("no pictures: IMAGE, FOLDER, - or --files-from LIST")
    if arguments.embeddings is not None and arguments.engine != choose.TORCH:
        parser.error("--embeddings goes with --engine torch")
    return arguments


@cli.program
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    with distributed.start(arguments.device) as world:
        return 1 if predict(arguments, world.device) else 0


if __name__ == "__main__":
    sys.exit(main())
