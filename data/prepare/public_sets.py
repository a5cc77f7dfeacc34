"""Small public data sets as the files of an ImageFolder.

Every set is a stream of `Entry`: train/<class>/<file> or val/<class>/<file> and what it holds.
Archives are read as streams, never unpacked; what is downloaded is compared with its published MD5.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets.utils import check_integrity, download_url

from data.errors import DataError
from data.files import read_regular
from data.prepare.members import contents_of_tar_gz

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
CIFAR_SIDE = 32  # px


class Entry(NamedTuple):
    """A file of the set that is made: "train/cat/00001.png" and its content.

    A path in place of the content: an existing file with it.
    """

    name: str
    content: bytes | Path


class PublishedArchive(NamedTuple):
    """A published archive."""

    url: str
    md5: str

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


CIFAR10 = PublishedArchive(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
)
IMAGENETTE = {  # by the length of the shorter side, px; as in torchvision.datasets.Imagenette
    "full": PublishedArchive(
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz",
        "fe2fc210e6bb7c5664d602c3cd71e612",
    ),
    "320": PublishedArchive(
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
        "3df6f0d01a2c9592104656642f5e78a3",
    ),
    "160": PublishedArchive(
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        "e793b78cc4c9e9a4ccc0c1155377a412",
    ),
}


# ---------------------------------------------------------------------------------- from arrays


def digits() -> Iterator[Entry]:
    """Yield scikit-learn's digits (UCI ML hand-written digits, test set)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    content = load_digits()
    pixels = (content.images * (255 / 16)).round().astype(np.uint8)
    train, val, train_labels, val_labels = train_test_split(
        pixels, content.target, test_size=DIGITS_HELD_OUT, stratify=content.target, random_state=0
    )
    yield from png_files("train", train, [str(label) for label in train_labels])
    yield from png_files("val", val, [str(label) for label in val_labels])


def fashion_mnist(folder: Path | None) -> Iterator[Entry]:
    """Yield Fashion-MNIST (Xiao et al., arXiv:1708.07747), from a folder's archives or downloaded.

    Raises DataError, OSError, RuntimeError (torchvision's, of a download).
    """
    if folder is None and DEBIAN_FASHION_MNIST.is_dir():
        folder = DEBIAN_FASHION_MNIST
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(scratch, download=True)
            folder = Path(scratch) / "FashionMNIST" / "raw"
        for split, stem in (("train", "train"), ("val", "t10k")):
            pixels = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
            labels_path = folder / f"{stem}-labels-idx1-ubyte.gz"
            labels = read_idx(labels_path)
            if len(labels) != len(pixels) or labels.max() >= len(FASHION_CLASSES):
                raise DataError(f"{labels_path}: not the labels of {len(pixels)} fashion images")
            yield from png_files(split, pixels, [FASHION_CLASSES[label] for label in labels])


def cifar10(path: Path | None, check_md5: bool = True) -> Iterator[Entry]:
    """Yield CIFAR-10 (Krizhevsky, 2009), binary version: the one that needs no unpickling.

    A record is a label and 32 x 32 pixels, plane by plane; five files of them are the training
    images, in order. Raises DataError, OSError, RuntimeError (torchvision's, of a download).
    """
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    wanted = {"batches.meta.txt", "test_batch.bin", *batches}
    with archive_file(CIFAR10, path, check_md5) as archive:
        files = {
            name.rpartition("/")[2]: content
            for name, content in contents_of_tar_gz(archive)
            if name.rpartition("/")[2] in wanted
        }
        if missing := sorted(wanted - files.keys()):
            raise DataError(f"{archive}: lacks {', '.join(missing)}; expected {CIFAR10.file_name}")
        classes = files["batches.meta.txt"].decode("ascii", "replace").split()
        if not all(re.fullmatch(r"[\w-]+", name) for name in classes):
            raise DataError(f"{archive}: batches.meta.txt does not hold class names")
        for split, names in (("train", batches), ("val", ["test_batch.bin"])):
            content = b"".join(files[name] for name in names)
            if not content or len(content) % (1 + 3 * CIFAR_SIDE**2):
                raise DataError(f"{archive}: the {split} images are not a whole number of records")
            records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * CIFAR_SIDE**2)
            labels = records[:, 0]
            if labels.max() >= len(classes):
                raise DataError(f"{archive}: a {split} label is {labels.max()}, over its classes'")
            pixels = records[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
            yield from png_files(split, pixels, [classes[label] for label in labels])


def png_files(split: str, pixels: np.ndarray, names: Iterable[str]) -> Iterator[Entry]:
    """Turn uint8 [N, H, W] or [N, H, W, 3] and each image's class into PNG files, numbered."""
    for i, (image, name) in enumerate(zip(pixels, names)):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
        yield Entry(f"{split}/{name}/{i:05d}.png", buffer.getvalue())


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX archive as a uint8 array of the shape its header states. Raises DataError."""
    try:
        content = gzip.decompress(read_regular(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip archive ({error})") from None
    if content[:3] != b"\0\0\x08":
        raise DataError(f"{path}: not an IDX file of bytes")
    sizes = 4 + 4 * (content[3] if len(content) > 3 else 0)  # where the sizes end
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, sizes, 4)]
    if len(content) < sizes or len(content) - sizes != math.prod(shape):
        raise DataError(f"{path}: not as long as its header states")
    return np.frombuffer(content, np.uint8, offset=sizes).reshape(shape)


# ---------------------------------------------------------------------------------- from files


def imagenette(size: str, path: Path | None, check_md5: bool = True) -> Iterator[Entry]:
    """Yield Imagenette (fast.ai), ten classes of ImageNet: its JPEG files as they are, by synset.

    `size`: a key of IMAGENETTE. Raises DataError, OSError, RuntimeError (of a download).
    """
    image_name = re.compile(r"[^/]+/((train|val)/\w+/\w[\w.-]*\.jpe?g)", re.IGNORECASE)
    splits = set()
    with archive_file(IMAGENETTE[size], path, check_md5) as archive:
        for name, content in contents_of_tar_gz(archive):
            if match := image_name.fullmatch(name):
                splits.add(match[2])
                yield Entry(match[1], content)
        if splits != {"train", "val"}:
            raise DataError(f"{archive}: holds no train/<class>/ and val/<class>/ with JPEG images")


# ---------------------------------------------------------------------------------- archives


@contextmanager
def archive_file(published: PublishedArchive, path: Path | None, check_md5: bool) -> Iterator[Path]:
    """Find a published archive: `path`, the file of its name in the folder `path`, or downloaded.

    Raises DataError for a missing file and, unless that is not checked, one with another MD5.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if path is None:
            download_url(published.url, scratch, published.file_name, published.md5)
            yield Path(scratch) / published.file_name
            return
        archive = path / published.file_name if path.is_dir() else path
        if not archive.is_file():
            raise DataError(f"{archive}: no such archive; it is published at {published.url}")
        if check_md5 and not check_integrity(str(archive), published.md5):
            raise DataError(
                f"{archive}: its MD5 is not {published.md5}, so it is damaged, cut off or another "
                f"version; download it again from {published.url}, or give --skip-md5"
            )
        yield archive
