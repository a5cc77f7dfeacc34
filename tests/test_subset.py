"""Some classes of a data set, by a list: their images, and a run that trains on them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import timm.data
from calling import call
from programs import CONFIG, log_lines, write_images

import train
import validate
from data import class_lists, label_sets, subset
from data.base import Source
from data.errors import DataError
from data.sources import FolderSource, SyntheticSource
from irv2.network import imagenet_names
from scripts import export

LISTS = Path(__file__).parents[1] / "configs" / "classes"


def images_by_name(source: Source) -> dict[str, tuple[bytes, str]]:
    """Bytes and class of each image, by the name it has for people."""
    read = [(source.name(i), *source.read(i)) for i in range(len(source))]
    return {name: (encoded, source.classes[label]) for name, encoded, label in read}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and validation images of three classes, and a list of two of them."""
    folder = tmp_path_factory.mktemp("three")
    write_images(folder / "train", ["a", "b", "c"], 4)
    write_images(folder / "val", ["a", "b", "c"], 2, seed=1)
    (folder / "list.txt").write_text("# of some paper\nc\na\n")
    return folder


@pytest.mark.parametrize("form", ["folders", "synthetic"])
def test_a_subset_has_the_images_of_its_classes_and_no_others(three, form):
    source = FolderSource(three / "train") if form == "folders" else SyntheticSource(11, 3)
    first, _, last = source.classes
    chosen = subset.of_classes(source, [last, first], "here", "list")
    assert chosen.classes == [first, last]
    expected = {n: e for n, e in images_by_name(source).items() if e[1] != source.classes[1]}
    assert images_by_name(chosen) == expected
    assert chosen.class_counts() == [source.class_counts()[0], source.class_counts()[2]]
    assert list(chosen.members(len(chosen) - 1)) == list(chosen.images_of(1))
    assert chosen.remarks[-1] == "here: 2 of its 3 classes, those of list"


def test_a_subset_keeps_the_order_in_which_images_lie(three):
    source = FolderSource(three / "train")
    source.storage_order = np.random.default_rng(0).permutation(len(source)).astype(np.int32)
    chosen = subset.of_classes(source, ["a", "c"], "here", "list")
    lying = [source.name(i) for i in source.storage_order]
    kept = set(images_by_name(chosen))
    assert [chosen.name(i) for i in chosen.storage_order] == [
        name for name in lying if name in kept
    ]


def test_all_classes_are_the_source_itself_and_those_it_lacks_are_named(three):
    source = FolderSource(three / "train")
    assert subset.of_classes(source, ["c", "b", "a"], "here", "list") is source
    with pytest.raises(DataError, match="here: lacks 1 of the 2 classes of list: x"):
        subset.of_classes(source, ["a", "x"], "here", "list")


def test_a_class_is_found_in_another_unicode_form(tmp_path):
    write_images(tmp_path, [unicodedata.normalize("NFD", "é"), "b", "c"], 1)
    chosen = subset.of_classes(FolderSource(tmp_path), ["é", "b"], "here", "list")
    assert len(chosen) == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "a\nb\na\n"])
def test_a_list_without_names_or_with_one_twice_is_refused(tmp_path, text):
    (tmp_path / "list").write_text(text)
    with pytest.raises(DataError, match="list: expected names of classes, one a line"):
        class_lists.read(tmp_path / "list")
    with pytest.raises(DataError, match="cannot be read"):
        class_lists.read(tmp_path)


@pytest.mark.parametrize(
    "name, count",
    [("imagenet100", 100), ("imagenette", 10), ("imagewoof", 10), ("imagenet_a", 200),
     ("imagenet_r", 200)],
)  # fmt: skip
def test_the_lists_are_of_imagenets_classes(name, count):
    path = LISTS / f"{name}.txt"
    names, classes = class_lists.read(path), imagenet_names.synsets()
    assert len(names) == count and set(names) <= set(classes)
    if name in ("imagenet_a", "imagenet_r"):  # as timm's outputs that compete
        known = Path(timm.data.__file__).parent / "_info" / f"{name}_indices.txt"
        assert [classes.index(each) for each in names] == list(map(int, known.read_text().split()))


def test_validate_takes_a_list_as_the_outputs_that_compete(three):
    source = subset.of_classes(FolderSource(three / "val"), ["a", "c"], "here", "list")
    labels = label_sets.from_class_index(source, "here", ["a", "b", "c"], 3, three / "list.txt")
    assert labels.competing.tolist() == [True, False, True]
    assert labels.outputs.tolist() == [0, 2]


@pytest.mark.slow
def test_a_run_of_a_list_is_validated_and_exported_as_one(three):
    """Trained on two classes of three, it is asked about these two, the list being gone."""
    config = three / "small.yaml"
    places = f"data: {{train: {three}/train, val: {three}/val, classes: {three}/list.txt, "
    config.write_text(CONFIG.replace("data: {", places))
    run, out = three / "run", three / "exported.safetensors"
    trained = call(train, "--config", config, f"run.dir={run}", "train.epochs=1")
    assert trained.status == 0, trained.err
    assert "classes in the order of the outputs: a, c" in trained.out
    assert f"{three}/train: 2 of its 3 classes, those of {three}/list.txt" in trained.out
    (evaluation,) = {line["top1"] for line in log_lines(run, "eval") if line["weights"] == "ema"}
    (three / "list.txt").rename(three / "elsewhere.txt")
    assert call(export, "--run", run, "--format", "safetensors", "--out", out).status == 0
    assert str(three).encode() not in out.read_bytes()
    for network in (("--run", run), ("--weights", out, "--data", three / "val")):
        checked = call(validate, *network, "--workers", "0")
        assert checked.status == 0, checked.err
        assert f"{evaluation:.2f}" in checked.out
        assert "2 of its 3 classes" in checked.out
