#!/usr/bin/env python3
"""Write a small public data set as PNG files in ImageFolder layout: OUT/train/<class>/, OUT/val/.

  python scripts/prepare_dataset.py digits --out datasets/digits
  python scripts/prepare_dataset.py fashion-mnist --out datasets/fashion_mnist [--from DIR]

digits: scikit-learn's 1,797 handwritten digits of 8x8 px; 360 held out, stratified, fixed seed.
fashion-mnist: 60,000 / 10,000 images of 28x28 px, from the original archives in DIR (Debian's
package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist, looked at first),
else downloaded by torchvision.
"""

from __future__ import annotations

import argparse
import gzip
import math
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (  # in the order of the archives' labels
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
DIGITS_HELD_OUT = 360

Split = tuple[str, np.ndarray, list[str]]  # "train" or "val", uint8 [N, H, W], class names [N]


def digits() -> Iterator[Split]:
    """scikit-learn's digits (UCI ML hand-written digits, test set)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    content = load_digits()
    pixels = (content.images * (255 / 16)).round().astype(np.uint8)
    train, val, train_labels, val_labels = train_test_split(
        pixels, content.target, test_size=DIGITS_HELD_OUT, stratify=content.target, random_state=0
    )
    yield "train", train, [str(label) for label in train_labels]
    yield "val", val, [str(label) for label in val_labels]


def fashion_mnist(archives: Path | None) -> Iterator[Split]:
    """Fashion-MNIST (Xiao et al., arXiv:1708.07747)."""
    if archives is None and DEBIAN_FASHION_MNIST.is_dir():
        archives = DEBIAN_FASHION_MNIST
    with tempfile.TemporaryDirectory() as scratch:
        if archives is None:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(scratch, download=True)
            archives = Path(scratch) / "FashionMNIST" / "raw"
        for split, stem in (("train", "train"), ("val", "t10k")):
            pixels = read_idx(archives / f"{stem}-images-idx3-ubyte.gz")
            labels_path = archives / f"{stem}-labels-idx1-ubyte.gz"
            labels = read_idx(labels_path)
            if len(labels) != len(pixels) or labels.max() >= len(FASHION_CLASSES):
                raise ValueError(f"{labels_path}: not the labels of {len(pixels)} fashion images")
            yield split, pixels, [FASHION_CLASSES[label] for label in labels]


def read_idx(path: Path) -> np.ndarray:
    """An IDX archive of bytes -> uint8 array of the shape its header states."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip archive ({error})") from None
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of bytes")
    sizes = 4 + 4 * (content[3] if len(content) > 3 else 0)  # where the sizes end
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, sizes, 4)]
    if len(content) < sizes or len(content) - sizes != math.prod(shape):
        raise ValueError(f"{path}: not as long as its header states")
    return np.frombuffer(content, np.uint8, offset=sizes).reshape(shape)


def write(splits: Iterator[Split], out: Path) -> None:
    """Write all splits beside `out`, then rename: the folder is there whole or not at all."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, pixels, names in splits:
        for name in set(names):
            (partial / split / name).mkdir(parents=True)
        images = enumerate(zip(pixels, names))
        for i, (image, name) in tqdm(images, total=len(names), desc=split, unit="image"):
            Image.fromarray(image).save(partial / split / name / f"{i:05d}.png")
    partial.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=["digits", "fashion-mnist"])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--from", dest="archives", type=Path, metavar="DIR", help="folder of the original archives"
    )
    arguments = parser.parse_args()
    out = arguments.out
    if out.exists():
        print(f"{out}: already there, left as it is")
        return 0
    try:
        splits = digits() if arguments.dataset == "digits" else fashion_mnist(arguments.archives)
        write(splits, out)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"prepare_dataset.py: {arguments.dataset}: {error}", file=sys.stderr)
        return 1
    print(f"{out}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
