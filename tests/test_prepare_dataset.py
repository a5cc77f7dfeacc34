"""prepare_dataset.py: whole data sets or none, pixels and splits as the originals have them."""

import gzip
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import FashionMNIST

from scripts import prepare_dataset
from scripts.prepare_dataset import FASHION_CLASSES, read_idx, write

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_dataset.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120
    )


def read_folder(folder: Path) -> list[tuple[str, bytes]]:
    """(class, pixels) of every image, in the order of file names."""
    paths = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    return [(path.parent.name, np.asarray(Image.open(path)).tobytes()) for path in paths]


# ---------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The digits, written by the program as a person starts it."""
    out = tmp_path_factory.mktemp("datasets") / "new" / "digits"
    result = run("digits", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}: written\n"
    assert [path.name for path in out.parent.iterdir()] == ["digits"]
    return out


def test_digits_are_scikit_learns_scaled_to_bytes(digits):
    content = load_digits()
    pixels = ((content.images.astype(int) * 255 * 2 + 16) // 32).astype(np.uint8)  # rounded
    expected = [(str(label), image.tobytes()) for label, image in zip(content.target, pixels)]
    written = read_folder(digits / "train") + read_folder(digits / "val")
    assert len(written) == 1797
    assert Counter(written) == Counter(expected)


def test_digits_are_png_files_of_one_channel(digits):
    for path in digits.glob("*/0/*"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))


def test_held_out_digits_are_a_fifth_of_every_class(digits):
    held_out = Counter(label for label, _ in read_folder(digits / "val"))
    assert sum(held_out.values()) == 360
    for label, count in Counter(map(str, load_digits().target)).items():
        assert abs(held_out[label] - count * 360 / 1797) < 1


def test_digits_are_split_the_same_way_each_time(digits):
    for split, pixels, names in prepare_dataset.digits():
        again = [(name, image.tobytes()) for name, image in zip(names, pixels, strict=True)]
        assert read_folder(digits / split) == again


def test_a_second_run_leaves_the_folder_as_it_is(digits):
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in digits.parent.rglob("*")}

    before = state()
    result = run("digits", "--out", digits)
    assert result.returncode == 0
    assert result.stdout == f"{digits}: already there, left as it is\n"
    assert state() == before


# ---------------------------------------------------------------------------------- whole or not


def test_a_failure_half_way_leaves_nothing_under_the_final_name(tmp_path):
    image = np.zeros((1, 4, 4), np.uint8)

    def failing():
        yield "train", image, ["cat"]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(failing(), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    write(iter([("train", image, ["dog"])]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["dog"]


# ---------------------------------------------------------------------------------- fashion-mnist


def idx(array: np.ndarray) -> bytes:
    """An IDX file: two zeros, the type (8: bytes), the rank, big-endian sizes, the content."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5), dtype=np.uint8)
LABELS = np.array([9, 0, 3, 9, 1, 6, 8], np.uint8)


@pytest.fixture
def archives(tmp_path) -> Path:
    """A small Fashion-MNIST: 7 training images, the last 3 of them for validation again."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for stem, start in (("train", 0), ("t10k", 4)):
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(IMAGES[start:]))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(LABELS[start:]))
    return folder


def test_idx_archives_are_read_in_their_shape(archives):
    assert np.array_equal(read_idx(archives / "train-images-idx3-ubyte.gz"), IMAGES)
    assert np.array_equal(read_idx(archives / "train-labels-idx1-ubyte.gz"), LABELS)


def test_fashion_classes_are_in_the_order_of_the_labels():
    # torchvision spells the first "T-shirt/top".
    theirs = [name.lower().replace(" ", "-").split("/")[0] for name in FashionMNIST.classes]
    assert theirs == list(FASHION_CLASSES)


def test_fashion_mnist_is_written_as_its_archives_have_it(archives, tmp_path):
    out = tmp_path / "fashion"
    result = run("fashion-mnist", "--out", out, "--from", archives)
    assert result.returncode == 0, result.stderr
    expected = [(FASHION_CLASSES[label], image.tobytes()) for label, image in zip(LABELS, IMAGES)]
    assert read_folder(out / "train") == expected
    assert read_folder(out / "val") == expected[4:]


def test_a_file_of_another_kind_is_one_line_and_exit_status_1(archives, tmp_path):
    path = archives / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x0d\3" + bytes(100)))
    result = run("fashion-mnist", "--out", tmp_path / "fashion", "--from", archives)
    assert result.returncode == 1
    assert result.stderr == (
        f"prepare_dataset.py: fashion-mnist: {path}: not an IDX file of bytes\n"
    )
    assert not (tmp_path / "fashion").exists()


DAMAGE: dict[str, tuple[str, Callable[[], bytes | None]]] = {
    "missing": ("images-idx3", lambda: None),
    "not gzip": ("images-idx3", lambda: b"<html>404 Not Found</html>"),
    "gzip cut off": ("images-idx3", lambda: idx(IMAGES[4:])[:-20]),
    "gzip damaged": ("images-idx3", lambda: idx(IMAGES[4:])[:20] + b"\xff" * 60),
    "empty": ("images-idx3", lambda: gzip.compress(b"")),
    "header cut off": ("images-idx3", lambda: gzip.compress(b"\0\0\x08")),
    "fewer pixels than stated": (
        "images-idx3",
        lambda: gzip.compress(gzip.decompress(idx(IMAGES[4:]))[:-1]),
    ),
    "fewer labels than images": ("labels-idx1", lambda: idx(LABELS[4:6])),
    "unknown label": ("labels-idx1", lambda: idx(np.array([1, 10, 2], np.uint8))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_archive_is_named_and_nothing_is_written(
    damage, archives, tmp_path, monkeypatch, capsys
):
    kind, content = DAMAGE[damage]
    path, out = archives / f"t10k-{kind}-ubyte.gz", tmp_path / "fashion"
    path.unlink()
    if content() is not None:
        path.write_bytes(content())
    arguments = ["fashion-mnist", "--out", str(out), "--from", str(archives)]
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *arguments])
    assert prepare_dataset.main() == 1
    message = capsys.readouterr().err.splitlines()[-1]  # after the training images' progress bar
    assert message.startswith("prepare_dataset.py: fashion-mnist: ")
    assert str(path) in message
    assert not out.exists()
