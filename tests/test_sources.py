"""Sources of images: ImageFolder's numbering, synthetic images, mistakes said by name."""

import errno
import io
import os
import re
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from data import levels, loader, names, sources
from data.base import Source
from data.errors import DataError, ImageError, StorageError
from data.folders import ClassFiles, search
from data.image_formats import image_extensions
from data.sources import (
    FolderSource,
    SyntheticSource,
    check_same_classes,
    open_source,
    with_classes,
)

CONTENT = {  # as created: neither classes nor images in order
    "zebra": "b.png a/z.JPG a.jpeg a-1/c.png",
    "ant": "9.png 10.png notes.txt deep/er/x.PNG deep/y.Jpeg Z.bmp",
    "Bee": "one.webp .hidden.png README two.png.txt zero.tiff",
    ".": "labels.csv stray.png",
}
FILES = [f"{folder}/{name}" for folder, names in CONTENT.items() for name in names.split()]


@pytest.fixture
def folder(tmp_path):
    """Class folders with everything that may lie in them; each file holds its own name."""
    root = tmp_path / "images"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.png").write_text("linked.png")
    for link in ("linked", "ant/linked"):  # a class folder, and a folder within one
        (root / link).symlink_to(elsewhere, target_is_directory=True)
    return root


# ---------------------------------------------------------------------------------- folders


def test_classes_are_imagefolders(folder):
    assert FolderSource(folder).classes == ImageFolder(folder).classes


def test_images_and_labels_are_imagefolders_in_its_order(folder):
    source = FolderSource(folder)
    samples = [(source.name(i), source.read(i)[1]) for i in range(len(source))]
    assert samples == ImageFolder(folder).samples


def test_an_image_is_read_as_its_bytes_are(folder):
    source = FolderSource(folder)
    for i in range(len(source)):
        with open(source.name(i), "rb") as file:
            assert source.read(i)[0] == file.read()


def encoded(extension: str) -> bytes:
    """A small picture as a file of that ending holds it."""
    buffer = io.BytesIO()
    kind = Image.registered_extensions()[extension]
    Image.linear_gradient("L").convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("extension", [".jfif", ".jpe", ".gif", ".avif", ".jp2", ".webp", ".tga"])
def test_whatever_pillow_decodes_is_an_image(tmp_path, extension):
    (tmp_path / "a").mkdir()
    Image.init()
    try:
        (tmp_path / "a" / f"0{extension}").write_bytes(encoded(extension))
    except (KeyError, OSError):
        pytest.skip(f"Pillow is here without {extension}")
    source = FolderSource(tmp_path)
    assert (len(source), source.remarks) == (1, [])
    assert loader.read_image(source, 0)[0].shape == (256, 256, 3)


def test_what_pillow_knows_by_its_name_alone_is_no_image():
    extensions = image_extensions()
    assert set(IMG_EXTENSIONS) | {".mpo"} <= set(extensions)
    assert not {".h5", ".grib", ".wmf", ".mpg", ".eps", ".ps", ".pdf", ".txt"} & set(extensions)


def test_what_is_left_out_is_counted_and_named(folder):
    (others,) = (line for line in FolderSource(folder).remarks if "not images" in line)
    assert others == f"{folder}: 3 files are not images: .txt 2, no ending 1"


def test_images_beside_the_class_folders_and_what_programs_leave_are_noticed(tmp_path):
    laid_out(tmp_path, "a/0.png", "a/._0.png", "b/0.png", "__MACOSX/0.png")
    (tmp_path / "stray.png").touch()
    assert FolderSource(tmp_path).remarks == [
        f"{tmp_path}: files named ._… that macOS left, not images: 1",
        f"{tmp_path}: images beside the class folders, and so in no class: 1",
        f"{tmp_path}: folders that may not be classes: __MACOSX",
    ]


def test_names_that_some_disks_take_for_one_are_noticed(tmp_path):
    decomposed = unicodedata.normalize("NFD", "é")
    source = laid_out(tmp_path, "Cat/I.JPG", "Cat/i.jpg", "cat/0.png", "é/0.png",
                      f"{decomposed}/0.png", "dog/I.JPG", "dog/i.png")  # fmt: skip
    classes, images = source.remarks
    assert "classes whose names differ only in case or Unicode form" in classes
    assert classes.endswith(f": Cat and cat; {decomposed} and é")
    assert images.endswith(": Cat/I.JPG and Cat/i.jpg")
    assert names.same_but_for_case(["Straße", "STRASSE", "x"]) == [["Straße", "STRASSE"]]


def test_classes_are_named_in_their_order_the_first_and_the_last():
    assert names.in_order(["a", "b"]) == "a, b"
    assert names.in_order([*"abcdef"]) == "a, b, c … f"
    numbers = sorted(map(str, range(12)))
    assert names.in_order(numbers) == "0, 1, 10 … 9 (numbers, sorted as text)"
    assert names.in_order([f"{i:02}" for i in range(12)]) == "00, 01, 02 … 11"
    assert names.in_order(["2" * 5000, "3"]).endswith("2, 3 (numbers, sorted as text)")
    assert names.in_order(["\x1b[2J", "b"]) == r"\x1b[2J, b"


def labels_of(source: Source) -> list[int]:
    return [source.read(i)[1] for i in range(len(source))]


def check_members(source: Source) -> None:
    """Members and counts of classes, which differ in size, are those that the labels say."""
    labels = labels_of(source)
    assert len(set(labels)) == len(source.classes) > 2
    for i, label in enumerate(labels):
        assert list(source.members(i)) == [k for k, other in enumerate(labels) if other == label]
    assert source.class_counts() == np.bincount(labels).tolist()
    assert len(set(source.class_counts())) > 1


def test_members_of_a_folder_source_are_the_images_of_a_class(folder):
    check_members(FolderSource(folder))


def test_a_folder_named_like_an_image_is_none(tmp_path):
    (tmp_path / "a" / "0.jpg").mkdir(parents=True)
    (tmp_path / "a" / "0.jpg" / "1.png").touch()
    source = FolderSource(tmp_path)
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / "a/0.jpg/1.png")]


def test_names_that_are_no_text_are_read(tmp_path):
    for name in (b"\xff.png", b"a.png", b"\xc3\xa4.png", b"\xed\xa0\x80.png"):
        (tmp_path / "a").mkdir(exist_ok=True)
        with open(os.path.join(os.fsencode(tmp_path), b"a", name), "wb") as file:
            file.write(name)
    source = FolderSource(tmp_path)
    assert [source.name(i) for i in range(4)] == [path for path, _ in ImageFolder(tmp_path).samples]
    for i in range(4):
        assert os.fsencode(source.name(i)).endswith(source.read(i)[0])


def test_an_image_costs_its_name_and_four_bytes(tmp_path, monkeypatch):
    for i in range(50):
        (tmp_path / f"n{i:08d}").mkdir()
    names = [f"n01440764_{i}.JPEG" for i in range(10_000, 11_000)]
    monkeypatch.setattr(sources, "search", lambda _top: ClassFiles(list(names), Counter()))
    tracemalloc.start()
    source = FolderSource(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 50_000
    assert held < 50_000 * (len(names[0]) + 4) * 1.1


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as error:
        FolderSource(root)
    return str(error.value)


def test_a_root_that_is_none_is_named(tmp_path):
    (tmp_path / "image.png").touch()
    assert f"{tmp_path / 'nowhere'}: no such data folder" in refusal(tmp_path / "nowhere")
    assert str(tmp_path / "image.png") in refusal(tmp_path / "image.png")
    assert f"{tmp_path}: holds no class folders" in refusal(tmp_path)


def test_a_class_without_images_is_named_and_one_given_as_the_root(folder):
    assert refusal(folder / "Bee").endswith(f"only images; if Bee is a class, give {folder}")
    (folder / "empty" / "deep").mkdir(parents=True)
    (folder / "empty" / "deep" / "notes.txt").touch()
    assert f"{folder / 'empty'}: no images in it" in refusal(folder)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    """Refused here, as nothing is to those who may read everything."""
    scandir = os.scandir

    def refuse(path: str):
        if path == str(folder / "ant" / "deep"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = f"{folder / 'ant' / 'deep'}: cannot be listed (Permission denied)"
    with pytest.raises(DataError, match=re.escape(message)):
        FolderSource(folder)


@pytest.mark.parametrize(
    ("folders", "meant"),
    [("train val", "train or ROOT/val"), ("Test Train extra", "Test or ROOT/Train"), ("val", "val"),
     ("testing training validation", "testing or ROOT/training or ROOT/validation")],
)  # fmt: skip
def test_a_root_whose_folders_are_splits_is_refused(tmp_path, folders, meant):
    for name in folders.split():
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "0.png").touch()
    assert refusal(tmp_path).endswith(f"give {tmp_path}/{meant.replace('ROOT', str(tmp_path))}")


@pytest.mark.parametrize("folders", ["bus train", "dog test", "plane train val-lens"])
def test_a_class_may_be_called_train_or_test(tmp_path, folders):
    for name in folders.split():
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    assert FolderSource(tmp_path).classes == folders.split()


def laid_out(root: Path, *images: str) -> FolderSource:
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return FolderSource(root)


def test_a_root_one_level_too_high_is_told_with_the_folder_that_was_meant(tmp_path):
    def message(name: str, *images: str) -> str:
        with pytest.raises(DataError) as error:
            levels.refuse_wrong_level(laid_out(tmp_path / name, *images), "DIR", "data.val")
        return str(error.value)

    assert message("one", "a/0.png", "a/1.png").startswith("data.val=DIR: has only one class, a;")
    above = message("above", "imagenet/a/0.png", "imagenet/b/0.png")
    assert above == (
        "data.val=DIR: has only one class, imagenet, and that holds folders (a, b); "
        "give DIR/imagenet"
    )
    mixed = message("mixed", "a/0.png", "b/0.png", "more/c/0.png", "more/d/0.png")
    assert "1 of its 3 class folders hold only folders, such as more (c, d)" in mixed
    assert "give DIR/more, else put the images into more itself" in mixed


def test_folders_below_a_class_that_has_images_itself_are_let_pass(tmp_path):
    source = laid_out(tmp_path, "a/0.png", "a/more/1.png", "b/0.png")
    levels.refuse_wrong_level(source, "DIR", "data.train")
    assert len(source) == 3


def test_training_and_validation_images_must_lie_apart(tmp_path):
    (tmp_path / "train" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "train", target_is_directory=True)
    train = str(tmp_path / "train")
    for val in (train, f"{train}/", f"{train}/x/..", str(tmp_path / "link")):
        with pytest.raises(DataError, match="are the same"):
            levels.refuse_overlap(train, val)
    for pair in ((train, f"{train}/x"), (str(tmp_path), train), ("s3://b/c", "s3://b/c/val/")):
        with pytest.raises(DataError, match="one lies in the other"):
            levels.refuse_overlap(*pair)
    with pytest.raises(DataError, match="are the same"):
        levels.refuse_overlap("https://host/x", "https://host/x/")
    for pair in ((train, f"{train}2"), ("synthetic:8x2",) * 2, ("s3://b/c", "s3://b/c2")):
        levels.refuse_overlap(*pair)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_system_has_run_out_of_is_no_fault_of_an_image(folder, monkeypatch, number):
    """Else another image would stand in for it, and the run would not be the same."""
    source = FolderSource(folder)

    def refuse(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StorageError, match="the system's limit"):
        source.read(0)


def test_a_folder_that_several_links_lead_to_is_taken_once(tmp_path):
    real = tmp_path / "a" / "real"
    real.mkdir(parents=True)
    (real / "0.png").touch()
    for name in ("again", "zebra"):
        (tmp_path / "a" / name).symlink_to(real, target_is_directory=True)
    assert search(str(tmp_path / "a") + "/").images == ["again/0.png"]


@pytest.mark.parametrize("target", ["a", "a/more", "."])
def test_a_link_that_leads_back_is_an_error(tmp_path, target):
    """Two of them would double a class with each level, without an end."""
    (tmp_path / "a" / "more").mkdir(parents=True)
    (tmp_path / "a" / "0.png").touch()
    for name in ("x", "y"):
        (tmp_path / "a" / "more" / name).symlink_to(tmp_path / target, target_is_directory=True)
    with pytest.raises(DataError, match=f"^{tmp_path}/a/more/x.*: a link that leads back to"):
        FolderSource(tmp_path)


def test_an_image_that_is_a_pipe_or_endless_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").symlink_to("/dev/zero")
    for index in (0, 1):
        with pytest.raises(ImageError, match=rf"{index}\.png: .* \(not a regular file\)"):
            FolderSource(tmp_path).read(index)


def test_an_image_that_cannot_be_read_is_named(folder):
    (folder / "ant" / "dangling.png").symlink_to(folder / "nowhere.png")
    source = FolderSource(folder)
    index = [source.name(i) for i in range(len(source))].index(str(folder / "ant/dangling.png"))
    with pytest.raises(ImageError, match=re.escape(source.name(index))) as error:
        source.read(index)
    assert isinstance(error.value, DataError)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- synthetic


def pixels(source: SyntheticSource, index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source.read(index)[0])).convert("RGB"), np.float64)


def test_synthetic_spec_states_images_and_classes_which_are_balanced():
    source = open_source("synthetic:23x5")
    assert len(source) == 23
    assert len(set(source.classes)) == 5
    assert source.classes == sorted(source.classes)
    assert source.class_counts() == [5, 5, 5, 4, 4]
    check_members(source)


def test_synthetic_images_are_the_same_in_every_process_and_differ_from_each_other():
    first, second = open_source("synthetic:6x2"), open_source("synthetic:6x2")
    encoded = [first.read(i)[0] for i in range(6)]
    assert encoded == [second.read(i)[0] for i in range(6)]
    assert len(set(encoded)) == 6


def test_synthetic_images_of_a_class_share_its_colour():
    source = open_source("synthetic:12x4")
    colours = np.array([pixels(source, i).mean((0, 1)) for i in range(12)])  # i % 4: the class
    for label in range(4):
        assert np.ptp(colours[label::4], axis=0).max() < 3
    distances = np.abs(colours[:4, None] - colours[None, :4]).max(2)
    assert distances[~np.eye(4, dtype=bool)].min() > 10


@pytest.mark.parametrize("sizes", ["", "10", "0x0", "10x", "4x5", "10X2", "10x2 ", "-4x2"])
def test_a_wrong_synthetic_spec_is_quoted_with_the_form_expected(sizes):
    words = f"^{re.escape(f'synthetic:{sizes}')}: .*synthetic:IMAGESxCLASSES"
    with pytest.raises(DataError, match=words):
        open_source(f"synthetic:{sizes}")


def test_any_other_spec_is_a_folder(folder):
    assert isinstance(open_source(str(folder)), FolderSource)
    with pytest.raises(DataError, match="no such data folder"):
        open_source("synthetical")


# ---------------------------------------------------------------------------------- two class lists


def mismatch(classes: list[str], expected: list[str]) -> str:
    with pytest.raises(DataError) as error:
        check_same_classes(classes, expected, "VAL", "TRAIN")
    return str(error.value)


def test_unknown_and_missing_classes_are_counted_and_three_of_them_named():
    check_same_classes(["a", "b"], ["a", "b"], "VAL", "TRAIN")
    assert mismatch(["a", "c"], ["a", "b"]) == (
        "VAL: its classes are not those of TRAIN: 1 unknown (c) and 1 missing (b)"
    )
    assert mismatch(["a"], list("abcdef")).endswith("5 missing (b, c, d, …)")
    assert mismatch(["a"], list("abcd")).endswith("3 missing (b, c, d)")


def test_the_same_classes_in_another_order_are_refused():
    assert mismatch(["b", "a"], ["a", "b"]).endswith("another order")


def test_classes_in_another_unicode_form_are_found_by_name_and_it_is_said(tmp_path):
    composed = sorted(["café", "cafz", "x"])
    on_a_mac = [unicodedata.normalize("NFD", name) for name in composed]
    source = laid_out(tmp_path, *(f"{n}/{k}.png" for k, n in enumerate(on_a_mac)), "x/3.png")
    matched = with_classes(source, composed, "VAL", "TRAIN")
    assert source.classes != matched.classes == composed  # in another order
    for index in range(4):
        name, label = matched.name(index), matched.label(index)
        assert unicodedata.normalize("NFC", Path(name).parent.name) == composed[label]
        assert matched.read(index) == (b"", label)
        assert index in matched.images_of(label) and index in matched.members(index)
    assert matched.class_counts() == [1, 1, 2] and len(matched) == 4
    assert matched.remarks[-1].startswith("VAL: its class names are those of TRAIN in another")
    assert with_classes(source, source.classes, "VAL", "TRAIN") is source
    with pytest.raises(DataError, match="another order"):
        with_classes(source, source.classes[::-1], "VAL", "TRAIN")
    with pytest.raises(DataError, match="1 unknown"):
        with_classes(source, ["café", "y", "x"], "VAL", "TRAIN")
