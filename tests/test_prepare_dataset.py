"""prepare_dataset.py: whole data sets or none, pixels and splits as the originals have them."""

import gzip
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import programs
import pyarrow as pa
import pytest
from calling import call
from imagenet_miniature import tree
from PIL import Image
from pyarrow import parquet
from shard_makers import encoded
from sklearn.datasets import load_digits
from tars import special, tar
from torchvision.datasets import FashionMNIST, Imagenette

from data.errors import DataError
from data.prepare import members, public_sets
from data.prepare.public_sets import FASHION_CLASSES, Entry, read_idx
from data.sources import FolderSource
from scripts import prepare_dataset
from scripts.prepare_dataset import write


def prepare(*arguments: str | Path) -> tuple[int, str]:
    """Call the program; returns its exit status and its messages."""
    status, _, error = call(prepare_dataset, *arguments)
    return status, error


def read_folder(folder: Path) -> list[tuple[str, bytes]]:
    """(class, pixels) of every image, in the order of file names."""
    paths = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    return [(path.parent.name, np.asarray(Image.open(path)).tobytes()) for path in paths]


# ---------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The digits, written by the program as a person starts it."""
    out = tmp_path_factory.mktemp("datasets") / "new" / "digits"
    result = programs.run("scripts/prepare_dataset.py", "digits", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}: 1,437 training and 360 validation images\n"
    assert result.stderr == ""
    assert [path.name for path in out.parent.iterdir()] == ["digits"]
    return out


@pytest.mark.slow
def test_digits_are_scikit_learns_scaled_to_bytes(digits):
    content = load_digits()
    pixels = ((content.images.astype(int) * 255 * 2 + 16) // 32).astype(np.uint8)  # rounded
    expected = [(str(label), image.tobytes()) for label, image in zip(content.target, pixels)]
    written = read_folder(digits / "train") + read_folder(digits / "val")
    assert len(written) == 1797
    assert Counter(written) == Counter(expected)


@pytest.mark.slow
def test_digits_are_png_files_of_one_channel(digits):
    for path in digits.glob("*/0/*"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))


@pytest.mark.slow
def test_held_out_digits_are_a_fifth_of_every_class(digits):
    held_out = Counter(label for label, _ in read_folder(digits / "val"))
    assert sum(held_out.values()) == 360
    for label, count in Counter(map(str, load_digits().target)).items():
        assert abs(held_out[label] - count * 360 / 1797) < 1


@pytest.mark.slow
def test_digits_are_split_the_same_way_each_time(digits):
    assert tree(digits) == dict(public_sets.digits())


@pytest.mark.slow
def test_a_second_run_leaves_the_folder_as_it_is(digits):
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in digits.parent.rglob("*")}

    before = state()
    said = f"{digits}: already there, left as it is\n"
    assert call(prepare_dataset, "digits", "--out", digits) == (0, said, "")
    assert state() == before


# ---------------------------------------------------------------------------------- whole or not


def test_a_failure_half_way_leaves_nothing(tmp_path):
    def failing():
        yield Entry("train/cat/0.png", b"cat")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(failing(), tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_left_is_replaced(tmp_path):
    (tmp_path / "out.partial" / "train" / "cat").mkdir(parents=True)
    assert write([Entry("train/dog/0.png", b"dog")], tmp_path / "out", 1) == {"train": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["dog"]


def test_files_reach_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "sync", lambda: seen.append(sorted(os.listdir(tmp_path))))
    write([Entry("train/dog/0.png", b"dog")], tmp_path / "out", 1)
    assert seen == [["out.partial"]]


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
    assert prepare("fashion-mnist", "--out", out, "--from", archives) == (0, "")
    expected = [(FASHION_CLASSES[label], image.tobytes()) for label, image in zip(LABELS, IMAGES)]
    assert read_folder(out / "train") == expected
    assert read_folder(out / "val") == expected[4:]


def test_a_file_of_another_kind_is_one_line_and_exit_status_1(archives, tmp_path):
    path = archives / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x0d\3" + bytes(100)))
    status, told = prepare("fashion-mnist", "--out", tmp_path / "fashion", "--from", archives)
    assert status == 1
    assert told == f"prepare_dataset.py: fashion-mnist: {path}: not an IDX file of bytes\n"
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
def test_a_damaged_archive_is_named_and_nothing_is_written(damage, archives, tmp_path):
    kind, content = DAMAGE[damage]
    path, out = archives / f"t10k-{kind}-ubyte.gz", tmp_path / "fashion"
    path.unlink()
    if content() is not None:
        path.write_bytes(content())
    status, message = prepare("fashion-mnist", "--out", out, "--from", archives)
    assert status == 1 and message.count("\n") == 1
    assert message.startswith("prepare_dataset.py: fashion-mnist: ")
    assert str(path) in message
    assert not out.exists()


# ---------------------------------------------------------------------------------- archives


def pack(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo | tuple) -> Path:
    """A .tar.gz of files and of further members."""
    path.write_bytes(tar([*files.items(), *more], "w:gz"))
    return path


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
CIFAR_LABELS = dict(zip(BATCHES, ([1, 0], [2], [0], [2], [1], [2, 1, 0])))


def cifar_records(labels: list[int], seed: int) -> tuple[bytes, list[np.ndarray]]:
    """The content of a batch file, and its images [32, 32, 3]."""
    images = list(np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3), np.uint8))
    planes = [[image[..., channel].tobytes() for channel in range(3)] for image in images]
    records = (bytes([label]) + b"".join(parts) for label, parts in zip(labels, planes))
    return b"".join(records), images


def cifar_files() -> dict[str, bytes]:
    """A miniature of cifar-10-binary.tar.gz, its members in another order than their numbers."""
    files = {"cifar-10-batches-bin/readme.html": b"<html>"}
    for seed, (name, labels) in reversed(list(enumerate(CIFAR_LABELS.items()))):
        files[f"cifar-10-batches-bin/{name}.bin"] = cifar_records(labels, seed)[0]
    return files | {"cifar-10-batches-bin/batches.meta.txt": b"airplane\nautomobile\nbird\n\n"}


JPEG = b"\xff\xd8 not looked into"
IMAGENETTE_FILES = {
    f"imagenette2-320/{name}": f"{name}".encode() + JPEG
    for name in (
        "train/n01440764/n01440764_3.JPEG",
        "val/n01440764/ILSVRC2012_val_00000293.JPEG",
        "train/n02102040/n02102040_1.JPEG",
        "val/n02102040/n02102040_40.JPEG",
        "noisy_imagenette.csv",
        "train/n02102040/._n02102040_1.JPEG",
    )
}


def test_cifar10_is_written_as_its_records_have_it(tmp_path):
    archive = pack(tmp_path / "cifar-10-binary.tar.gz", cifar_files())
    out = tmp_path / "cifar"
    assert prepare("cifar10", "--out", out, "--from", archive.parent, "--skip-md5") == (0, "")
    classes = ["airplane", "automobile", "bird"]
    expected = [
        (classes[label], image.tobytes())
        for seed, labels in enumerate(CIFAR_LABELS.values())
        for label, image in zip(labels, cifar_records(labels, seed)[1])
    ]
    assert read_folder(out / "train") == expected[:6]
    assert read_folder(out / "val") == expected[6:]


def test_imagenette_is_written_byte_for_byte(tmp_path):
    archive = pack(tmp_path / "imagenette2-320.tgz", IMAGENETTE_FILES)
    out = tmp_path / "imagenette"
    assert prepare("imagenette", "--out", out, "--from", archive, "--skip-md5") == (0, "")
    images = {name.partition("/")[2]: content for name, content in IMAGENETTE_FILES.items()}
    for name in ("noisy_imagenette.csv", "train/n02102040/._n02102040_1.JPEG"):
        del images[name]
    assert tree(out) == images


HOSTILE = {
    "parent": ("set/train/../../../escaped.JPEG", JPEG),
    "absolute": ("/tmp/train/a/escaped.JPEG", JPEG),
    "symbolic link": special("set/train/a/0.JPEG", tarfile.SYMTYPE),
    "hard link": special("set/train/a/0.JPEG", tarfile.LNKTYPE),
    "device": special("set/train/a/0.JPEG", tarfile.CHRTYPE),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_archive_that_leads_out_of_its_folder_is_refused(kind, tmp_path):
    archive = pack(tmp_path / "images.tgz", IMAGENETTE_FILES, HOSTILE[kind])
    out = tmp_path / "out"
    status, told = prepare("imagenette", "--out", out, "--from", archive, "--skip-md5")
    assert status == 1
    assert told.startswith(f"prepare_dataset.py: imagenette: {archive}: refused, it holds ")
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["images.tgz"]


def damaged(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


BROKEN = {  # content of the whole archive -> of the broken one
    "cut off": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-6],
    "a bit of the checksum": lambda content: damaged(content, -6),
    "not gzip": lambda _: b"<html>404 Not Found</html>",
    "gzip, not tar": lambda _: gzip.compress(b"x" * 3000),
    "a tar cut off": lambda content: gzip.compress(gzip.decompress(content)[:2000]),
    "empty": lambda _: gzip.compress(bytes(10240)),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    ("name", "files"), [("imagenette", IMAGENETTE_FILES), ("cifar10", cifar_files())]
)
def test_a_broken_archive_is_named_and_leaves_nothing(kind, name, files, tmp_path):
    archive = pack(tmp_path / "archive.tgz", files)
    archive.write_bytes(BROKEN[kind](archive.read_bytes()))
    status, told = prepare(name, "--out", tmp_path / "out", "--from", archive, "--skip-md5")
    assert status == 1
    assert told.startswith(f"prepare_dataset.py: {name}: {archive}: ")
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["archive.tgz"]


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_an_archive_of_another_checksum_is_refused_unless_told_not_to_look(
    name, tmp_path, monkeypatch
):
    files = cifar_files() if name == "cifar10" else IMAGENETTE_FILES
    archive = pack(tmp_path / "archive.tgz", files)
    arguments = (name, "--out", tmp_path / "out", "--from", archive)
    status, told = prepare(*arguments)
    assert status == 1 and f"{archive}: its MD5 is not " in told
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(public_sets, "CIFAR10", public_sets.CIFAR10._replace(md5=md5))
    sizes = {"320": public_sets.IMAGENETTE["320"]._replace(md5=md5)}
    monkeypatch.setattr(public_sets, "IMAGENETTE", sizes)
    assert prepare(*arguments) == (0, "")


def test_published_archives_are_torchvisions():
    sizes = {size.removesuffix("px"): archive for size, archive in Imagenette._ARCHIVES.items()}
    assert sizes == public_sets.IMAGENETTE


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_what_is_not_given_is_downloaded_and_compared_with_its_md5(name, tmp_path, monkeypatch):
    files = cifar_files() if name == "cifar10" else IMAGENETTE_FILES
    asked = []

    def download(url: str, folder: str, file_name: str, md5: str) -> None:
        asked.append((url, md5))
        pack(Path(folder) / file_name, files)

    monkeypatch.setattr(public_sets, "download_url", download)
    assert prepare(name, "--out", tmp_path / "out") == (0, "")
    published = public_sets.CIFAR10 if name == "cifar10" else public_sets.IMAGENETTE["320"]
    assert asked == [tuple(published)]


# ---------------------------------------------------------------------------------- folder


@pytest.fixture
def unsplit(tmp_path) -> Path:
    """Classes of 20, 9 and 2 images, one of them in a folder of its own."""
    root = tmp_path / "images"
    for name, count in (("ant", 20), ("bee", 9), ("cat/deep", 1), ("cat", 1)):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_text(f"{name} {i}")
    (root / "ant" / "notes.txt").touch()
    return root


def files_below(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name.endswith(".jpg")}


def test_a_folder_is_split_by_class_and_nothing_is_lost_or_twice(unsplit, tmp_path):
    out = tmp_path / "out"
    noticed = (0, f"note: {unsplit}: 1 file is no image: .txt 1\n")
    assert prepare("folder", unsplit, "--out", out, "--val-fraction", "0.25") == noticed
    train, val = files_below(out / "train"), files_below(out / "val")
    assert not train.keys() & val.keys()
    assert train | val == files_below(unsplit)
    assert Counter(name.split("/")[0] for name in val) == {"ant": 5, "bee": 2, "cat": 1}


def test_a_split_is_the_same_anywhere_and_another_for_another_seed(unsplit, tmp_path):
    root, splits = unsplit, []
    for i, seed in enumerate([3, 3, 4]):
        root, out = root.rename(tmp_path / f"moved{i}"), tmp_path / f"out{i}"
        assert prepare("folder", root, "--out", out, "--seed", str(seed))[0] == 0
        splits.append(set(files_below(out / "val")))
    assert splits[0] == splits[1] != splits[2]


def test_files_are_linked_or_copied_where_they_cannot_be(unsplit, tmp_path, monkeypatch):
    target = unsplit / "ant" / "0.jpg"
    (unsplit / "bee" / "link.jpg").symlink_to(target)
    assert prepare("folder", unsplit, "--out", tmp_path / "linked")[0] == 0
    assert target.stat().st_nlink == 3  # itself, and as both of its names
    assert not any(path.is_symlink() for path in (tmp_path / "linked").rglob("*"))

    def refuse(*_arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert prepare("folder", unsplit, "--out", tmp_path / "copied")[0] == 0
    assert files_below(tmp_path / "copied") == files_below(tmp_path / "linked")
    assert target.stat().st_nlink == 3


def test_what_cannot_be_split_is_told_in_a_line(unsplit, tmp_path):
    def refused(source: Path, out: Path = tmp_path / "out") -> str:
        status, told = prepare("folder", source, "--out", out)
        assert status == 1 and told.count("\n") == 1
        assert not out.exists()
        return told

    assert "no such data folder" in refused(tmp_path / "nowhere")
    assert "choose a place outside" in refused(unsplit, unsplit / "split")
    assert prepare("folder", unsplit, "--out", tmp_path / "split")[0] == 0
    assert "its folders train and val are parts of a data set" in refused(tmp_path / "split")
    (unsplit / "cat" / "0.jpg").unlink()
    assert "one image cannot be in both train and val" in refused(unsplit)


# ---------------------------------------------------------------------------------- csv


@pytest.fixture
def table(unsplit) -> Path:
    """A CSV file of the images of `unsplit`, with columns of its own."""
    paths = sorted(path.relative_to(unsplit) for path in unsplit.rglob("*.jpg"))
    lines = [f'{path},"{path.parts[0]}/Linn.",{i}' for i, path in enumerate(paths)]
    (unsplit / "table.csv").write_text("\n".join(["file,species,weight", *lines]))
    return unsplit / "table.csv"


def test_images_that_a_table_lists_are_split_by_class(table, tmp_path):
    out = tmp_path / "out"
    columns = ("--path-column", "file", "--label-column", "species")
    assert prepare("csv", table, "--out", out, "--val-fraction", "0.25", *columns) == (0, "")
    train, val = files_below(out / "train"), files_below(out / "val")
    assert Counter(name.split("/")[0] for name in val) == {
        "ant_Linn.": 5, "bee_Linn.": 2, "cat_Linn.": 1}  # fmt: skip
    contents = [*train.values(), *val.values()]
    assert sorted(contents) == sorted(files_below(table.parent).values())
    assert sorted(name for name in train | val if "cat" in name) == [
        "cat_Linn./0000000-0.jpg", "cat_Linn./0000001-0.jpg"]  # fmt: skip
    assert (table.parent / "bee" / "3.jpg").stat().st_nlink == 2
    again = tmp_path / "again"
    table.rename(tmp_path / "moved.csv")
    place = ("--root", table.parent, "--val-fraction", "0.25", *columns)
    assert prepare("csv", tmp_path / "moved.csv", "--out", again, *place)[0] == 0
    assert tree(again) == tree(out)


TABLES = {
    "path,label\nant/0.jpg,ant\nant/0.jpg,bee\n": "1 files are listed twice: ant/0.jpg",
    "path,label\nant/99.jpg,ant\nant/0.jpg,ant\n": "1 files are not below",
    "path,label\n../outside.jpg,ant\nant/0.jpg,ant\n": "1 files are not below",
    "path,label\nant/0.jpg,a/b\nant/1.jpg,a_b\n": "would share a folder: 'a/b', 'a_b'",
    "path,label\nant/notes.txt,ant\n": "1 files are no images",
    "path,label\nant/0.jpg,..\nant/1.jpg,..\n": "'..' cannot be the name of a class's folder",
    "path,label\nant/0.jpg,ant\n": "ant: one image cannot be in both train and val",
    "file,species\nant/0.jpg,ant\n": "has no column 'path', only file, species",
    "": "has no column 'path'",
}


@pytest.mark.parametrize("content", TABLES)
def test_a_table_that_cannot_be_used_is_told_in_a_line(content, unsplit, tmp_path):
    (unsplit / "table.csv").write_text(content)
    shutil.copy(unsplit / "ant" / "0.jpg", unsplit.parent / "outside.jpg")
    status, told = prepare("csv", unsplit / "table.csv", "--out", tmp_path / "out")
    assert status == 1 and TABLES[content] in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- parquet


def write_parquet(path: Path, rows: list[tuple[str | None, bytes, int]], names: list[str]) -> Path:
    """As Hugging Face's library writes a data set, with other columns before."""
    feature = {"names": names, "_type": "ClassLabel"}
    features = {"id": {"_type": "Value"}, "photo": {"_type": "Image"}, "kind": feature}
    photos = [{"bytes": content, "path": name} for name, content, _ in rows]
    labels = [label for *_, label in rows]
    table = pa.table({"id": list(range(len(rows))), "photo": photos, "kind": labels})
    text = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": text}), path, row_group_size=3
    )
    return path


PETS = ["cat", "dog/wolf"]


def pets(count: int, first: int = 0, named: bool = True) -> list[tuple[str | None, bytes, int]]:
    return [
        (f"{i}.png" if named else None, encoded(i, "PNG"), i % 2)
        for i in range(first, first + count)
    ]


@pytest.mark.parametrize("other", ["validation", "test"])
def test_any_image_data_set_in_parquet_becomes_folders(other, tmp_path):
    data = tmp_path / "hub" / "data"
    write_parquet(data / "train-00000-of-00002.parquet", pets(4), PETS)
    write_parquet(data / "train-00001-of-00002.parquet", pets(3, 4), PETS)
    write_parquet(data / f"{other}-00000-of-00001.parquet", pets(4, 9), PETS)
    assert prepare("parquet", data.parent, "--out", tmp_path / "out") == (0, "")
    wanted = {
        f"{split}/{('cat', 'dog_wolf')[label]}/{name}": content
        for split, rows in (("train", pets(7)), ("val", pets(4, 9)))
        for name, content, label in rows
    }
    assert tree(tmp_path / "out") == wanted
    out = call(prepare_dataset, "parquet", data.parent, "--out", tmp_path / "out").out
    assert f"{tmp_path / 'out' / 'val'}: 4 images of 2 classes" in out


def test_a_data_set_without_validation_images_is_split_by_class(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", pets(20, named=False), PETS)
    assert prepare("parquet", path, "--out", tmp_path / "out", "--val-fraction", "0.3") == (0, "")
    files = tree(tmp_path / "out")
    assert sorted(files.values()) == sorted(content for _, content, _ in pets(20))
    counts = Counter(name.rpartition("/")[0] for name in files)
    assert counts == {"train/cat": 7, "train/dog_wolf": 7, "val/cat": 3, "val/dog_wolf": 3}
    assert all(name.endswith(".png") for name in files)
    files = {name.rpartition("/")[2] for name in tree(tmp_path / "out" / "val")}
    assert prepare("parquet", path, "--out", tmp_path / "again", "--val-fraction", "0.3")[0] == 0
    assert {name.rpartition("/")[2] for name in tree(tmp_path / "again" / "val")} == files


def test_names_that_are_no_image_files_are_mended(tmp_path):
    names = ["..", "a\0b.png", "../../escaped.png", "no ending", "x.txt", "", "y.jpg", ".png"]
    rows = [(name, encoded(i, "PNG"), 0) for i, name in enumerate(names)]
    path = write_parquet(tmp_path / "a" / "train.parquet", [*rows, *pets(2)[1:]], PETS)
    write_parquet(path.with_name("test.parquet"), pets(2), PETS)
    assert prepare("parquet", path.parent, "--out", tmp_path / "out") == (0, "")
    assert sorted(os.listdir(tmp_path / "out" / "train" / "cat")) == sorted([
        "0000000.png", "0000001.png", "escaped.png", "no ending.png", "x.txt.png", "0000005.png",
        "y.jpg", ".png"])  # fmt: skip
    assert len(FolderSource(tmp_path / "out" / "train")) == 9
    assert sorted(os.listdir(tmp_path)) == ["a", "out"]


def test_a_data_set_that_cannot_be_used_is_told_in_a_line(tmp_path):
    def refused(*more: object) -> str:
        status, told = prepare("parquet", tmp_path / "hub", "--out", tmp_path / "out", *more)
        assert status == 1 and told.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return told

    assert "no parquet files of training images" in refused()
    train = tmp_path / "hub" / "train.parquet"
    write_parquet(train, [*pets(4), ("x.png", b"", 2)], PETS)
    assert "row 4, counted on in the files after it: '2' is not a label of a class" in refused()
    write_parquet(train, pets(4), ["..", "dog"])
    assert "'..' cannot be the name of a class's folder" in refused()
    write_parquet(train, pets(4), PETS)
    assert "no column of labels (breed)" in refused("--label-column", "breed")
    assert "its column kind holds int64, not images" in refused("--image-column", "kind")
    table = pa.table({"image": [b"x"] * 4, "kind": [[0], [1], [0], [1]]})
    parquet.write_table(table, train)
    assert "row 0, counted on in the files after it: '[0]' is not a label" in refused(
        "--label-column", "kind"
    )
    parquet.write_table(table.append_column("label", [[0, 1, 0, 1]]), train)
    write_parquet(train.with_name("train_2.parquet"), pets(4), PETS)
    assert "train_2.parquet: no column of images (image)" in refused()
    train.with_name("train_2.parquet").unlink()
    os.mkfifo(train.with_name("train_2.parquet"))
    assert "train_2.parquet: not a whole parquet file (" in refused()
    train.with_name("train_2.parquet").unlink()
    write_parquet(train, pets(4), ["dog/wolf", "dog_wolf"])
    assert "would share a folder: 'dog/wolf', 'dog_wolf'" in refused()
    write_parquet(tmp_path / "hub" / "small" / "train.parquet", pets(4), PETS)
    assert f"its train files lie in 2 folders; give one of them: {train.parent}" in refused()
    shutil.rmtree(tmp_path / "hub" / "small")
    write_parquet(train, pets(4), PETS)
    write_parquet(tmp_path / "hub" / "test.parquet", [row for row in pets(4) if row[2]], PETS)
    assert "only one of train and val has images of cat" in refused()


def test_a_packed_archive_with_too_large_a_file_is_refused_unread(tmp_path):
    vast = tarfile.TarInfo("a/vast")
    vast.size = members.MAX_MEMBER + 1
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(vast.tobuf() + bytes(1024)))
    with pytest.raises(DataError, match=r"a\.tar\.gz: refused.*too large a file"):
        list(members.contents_of_tar_gz(tmp_path / "a.tar.gz"))
