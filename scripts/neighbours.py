#!/usr/bin/env python3
"""Show which pictures a network sees as most alike, by the features before its classifier.

  python scripts/predict.py datasets/digits/train --run RUN --embeddings train.parquet
  python scripts/predict.py MISTAKES --run RUN --embeddings mistakes.parquet
  python scripts/neighbours.py mistakes.parquet --among train.parquet

Prints a line for each picture: the nearest among the others, with the cosine of the angle between
their features. Exit status: 0 done; 1 something must be fixed first; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import DataError
from data.files import open_regular
from data.names import shown
from data.optional import needed
from irv2 import cli

AT_ONCE = 1024  # pictures compared in one product


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Read what predict.py --embeddings has written: names, and features of length 1, float32
    [N, F]. Raises DataError."""
    parquet = needed("pyarrow.parquet", "a parquet file")
    try:
        with open_regular(path) as file:
            table = parquet.read_table(file, columns=["image", "embedding"])
        features = np.array(table["embedding"].to_pylist(), np.float32)
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: no embeddings of predict.py's, .parquet ({reason})") from None
    return table["image"].to_pylist(), features / np.maximum(lengths, np.finfo(np.float32).tiny)


def nearest(of: np.ndarray, among: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `among` with the largest cosines to each row of `of`, and these: both [N, count]."""
    rows, cosines = [], []
    for first in range(0, len(of), AT_ONCE):
        products = of[first : first + AT_ONCE] @ among.T
        order = np.argsort(-products, axis=1, kind="stable")[:, :count]
        rows.append(order)
        cosines.append(np.take_along_axis(products, order, axis=1))
    return np.concatenate(rows), np.concatenate(cosines)


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("of", type=cli.path, metavar="PARQUET", help="pictures to explain")
    parser.add_argument(
        "--among", type=cli.path, required=True, metavar="PARQUET", help="training images, say"
    )
    parser.add_argument(
        "--nearest", type=cli.positive, default=3, metavar="N", help="of each (default: 3)"
    )
    return parser.parse_args()


@cli.program
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    (names, of), (others, among) = read(arguments.of), read(arguments.among)
    if of.shape[1] != among.shape[1]:
        raise DataError(f"{arguments.of} and {arguments.among} are of different networks")
    for name, rows, cosines in zip(names, *nearest(of, among, arguments.nearest)):
        listed = ", ".join(f"{shown(others[row])} {c:.3f}" for row, c in zip(rows, cosines))
        print(f"{shown(name)}  {listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
