"""Which images count and what is right, on small stand-ins for ImageNet's folders and files."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import programs
import pytest
import timm
import torch

from data import label_sets
from data.errors import DataError
from data.sources import FolderSource

SYNSETS = ["n00000001", "n00000002", "n00000003"]


def folders(root: Path, content: dict[str, list[str]]) -> FolderSource:
    for folder, files in content.items():
        (root / folder).mkdir(parents=True)
        for name in files:
            (root / folder / name).touch()
    return FolderSource(root)


@pytest.fixture
def validation(tmp_path: Path) -> FolderSource:
    """Six images named as ImageNet's, two a class, not in the order of their numbers."""
    content = {
        folder: [f"ILSVRC2012_val_{number:08d}.JPEG" for number in numbers]
        for folder, numbers in zip(SYNSETS, ((6, 2), (1, 4), (3, 5)))
    }
    return folders(tmp_path / "val", content)


@pytest.fixture
def two_of_three(tmp_path: Path) -> FolderSource:
    """An image of each class but the second."""
    return folders(tmp_path / "a", {SYNSETS[0]: ["1.jpg"], SYNSETS[2]: ["2.jpg"]})


def numbers(labels: label_sets.LabelSet, source: FolderSource) -> list[int]:
    return [int(Path(source.name(index)).stem[-8:]) for index in labels.indices]


def plain(source: FolderSource, classes: list[str] | None = SYNSETS) -> label_sets.LabelSet:
    return label_sets.from_folders(source, source.root, classes, 3, "net")


def right(labels: label_sets.LabelSet, source: FolderSource) -> list[list[int]]:
    """Answers of all images that count."""
    of_folder = torch.tensor([source.read(index)[1] for index in labels.indices])
    return labels.answers(of_folder, labels.indices.tolist()).tolist()


def test_folders_stand_for_classes_by_name(validation):
    labels = plain(validation)
    assert labels.indices.tolist() == list(range(6))
    assert right(labels, validation) == [0, 0, 1, 1, 2, 2]
    assert plain(validation, None).outputs.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"1 unknown .* and 1 missing"):
        plain(validation, ["n00000001", "n00000002", "n00000009"])
    with pytest.raises(DataError, match="3 classes, but net distinguishes 5"):
        label_sets.from_folders(validation, "val", None, 5, "net")


def test_a_network_may_have_its_classes_in_any_order_unless_they_are_numbers(validation, tmp_path):
    """As timm's trainer has them: class2 before class10."""
    assert plain(validation, SYNSETS[1:] + SYNSETS[:1]).outputs.tolist() == [2, 0, 1]
    numbered = folders(tmp_path / "numbered", {str(n): [f"{n}.png"] for n in (3, 4, 10)})
    with pytest.raises(DataError, match="another order; it knows its classes by number alone"):
        plain(numbered, ["3", "4", "10"])
    assert plain(numbered, ["10", "3", "4"]).outputs.tolist() == [0, 1, 2]


def test_the_pairing_of_folders_and_outputs_is_said(validation):
    assert plain(validation).name == "folders"
    assert plain(validation, None).name == "order"


def test_class_folders_have_two_orders(tmp_path):
    classes = ["a1", "a10", "a2", "B"]
    source = FolderSource(programs.write_images(tmp_path / "x", classes, 1))
    assert source.classes == ["B", "a1", "a10", "a2"]
    theirs = timm.data.create_dataset("", root=str(source.root)).reader.class_to_idx
    labels = label_sets.from_folders(source, "x", None, 4, "net", "natural")
    assert [theirs[name] for name in source.classes] == labels.outputs.tolist() == [3, 0, 2, 1]
    plain = label_sets.from_folders(source, "x", None, 4, "net", "alphabetical")
    assert plain.outputs.tolist() == [0, 1, 2, 3]
    assert label_sets.order_matters(plain, source.classes)
    assert not label_sets.order_matters(plain, ["a", "b"])
    with pytest.raises(DataError, match=r"^net: names its classes"):
        label_sets.from_folders(source, "x", classes, 4, "net", "natural")


def test_a_network_of_more_outputs_than_folders_is_never_paired_by_chance(tmp_path):
    source = folders(tmp_path / "x", {f"c{i}": ["0.png"] for i in range(10)})
    (tmp_path / "list").write_text("".join(f"c{i}\n" for i in range(10)))
    synsets = [f"n{i:08d}" for i in range(1000)]
    for classes, outputs in ((synsets, 1000), (None, 1000), (None, 20)):
        with pytest.raises(DataError):
            label_sets.from_folders(source, "x", classes, outputs, "net")
        with pytest.raises(DataError):  # a list of ten names says nothing of 1,000 outputs
            label_sets.from_class_index(source, "x", classes, outputs, tmp_path / "list")
    (tmp_path / "json").write_text(json.dumps({f"c{i}": 3 * i for i in range(10)}))
    labels = label_sets.from_class_index(source, "x", None, 1000, tmp_path / "json")
    assert labels.outputs.tolist() == list(range(0, 30, 3)) and labels.competing.sum() == 10
    whole = label_sets.from_class_index(source, "x", None, 10, tmp_path / "list")
    assert whole.outputs.tolist() == list(range(10))


def test_names_are_the_same_in_every_unicode_form(tmp_path):
    composed = ["café", "cafz"]  # decomposed, the first sorts first; composed, last
    on_a_mac = [unicodedata.normalize("NFD", name) for name in composed]
    source = folders(tmp_path / "x", {name: ["0.png"] for name in on_a_mac})
    classes = sorted(composed)
    assert classes == ["cafz", "café"] and source.classes == on_a_mac
    labels = label_sets.from_folders(source, "x", classes, 2, "net")
    assert labels.outputs.tolist() == [1, 0]
    (tmp_path / "list").write_text("café\ncafz\n")
    labels = label_sets.from_class_index(source, "x", classes, 2, tmp_path / "list")
    assert labels.outputs.tolist() == [1, 0]


def test_folders_named_by_number_are_outputs_as_imagenetv2s(tmp_path):
    content = {str(n): [f"{n}.jpeg"] for n in range(12)}
    source = folders(tmp_path / "v2", content)
    assert source.classes[:3] == ["0", "1", "10"]  # the trap: sorted as text
    synsets = [f"n{i:08d}" for i in range(12)]
    for classes in (None, synsets):
        labels = label_sets.from_folders(source, "v2", classes, 12, "net")
        assert labels.name == "numbered"
        assert right(labels, source) == [int(name) for name in source.classes]
    with pytest.raises(DataError):  # a network of something else, by chance of as many classes
        label_sets.from_folders(source, "v2", [f"shoe{i}" for i in range(12)], 12, "net")
    own = label_sets.from_folders(source, "digits", source.classes, 12, "net")
    assert own.outputs.tolist() == list(range(12))  # its own classes, in its own order


@pytest.mark.parametrize(
    "content",
    [
        '{"0": ["n00000001", "tench"], "2": ["n00000003", "shark"]}',
        '{"0": "n00000001", "2": "n00000003"}',
        '{"n00000001": 0, "n00000003": 2}',
        "n00000003\n\nn00000001\n",
    ],
)
def test_a_class_index_names_the_outputs_that_compete(two_of_three, tmp_path, content):
    (tmp_path / "index").write_text(content)
    labels = label_sets.from_class_index(two_of_three, "a", SYNSETS, 3, tmp_path / "index")
    assert right(labels, two_of_three) == [0, 2]
    assert labels.competing.tolist() == [True, False, True]
    with pytest.raises(DataError, match="--class-index FILE"):
        plain(two_of_three)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n00000001\n", "n00000003, … not in"),
        ("n00000001\nn00000003\nn00000007\n", "n00000007 is not a class of the network"),
        ('{"n00000001": 0, "n00000003": 3}', "n00000003 is output 3, but .* 0 to 2"),
        ('{"n00000001": 0, "n00000003": 0}', "names an output twice"),
        ('{"n00000001": 0, "n00000003": null}', "'n00000003' should stand for"),
        ('{"n00000001": 0, "n00000003": true}', "'n00000003' should stand for"),
        ('{"n00000001": 0, "n00000003": 1e0}', "'n00000003' should stand for"),
        ('{"0": "n00000001", "' + "2" * 5000 + '": "n00000003"}', "should stand for"),
        ('{"n00000001": 0, "n00000003": ' + "2" * 5000 + "}", "limit .* digits"),
        ('{"n00000001": ' + "[" * 100_000, "nested too deep"),
        ('{"n00000001": 0', "not JSON"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_class_index_is_refused(two_of_three, tmp_path, content, message):
    if content is not None:
        (tmp_path / "index").write_text(content)
    with pytest.raises(DataError, match=message):
        label_sets.from_class_index(two_of_three, "a", SYNSETS, 3, tmp_path / "index")


def test_real_labels_follow_the_images_numbers_and_leave_out_those_without(validation, tmp_path):
    listed = [[2], [0, 1], [], [1, 0, 2], [2], [1]]
    (tmp_path / "real.json").write_text(json.dumps(listed))
    labels = label_sets.with_real_labels(plain(validation), validation, tmp_path / "real.json")
    assert labels.name == "real"
    assert sorted(numbers(labels, validation)) == [1, 2, 4, 5, 6]
    found = dict(zip(numbers(labels, validation), map(set, right(labels, validation))))
    assert found == {n: set(listed[n - 1]) for n in (1, 2, 4, 5, 6)}


def test_real_labels_are_places_among_the_synsets_whatever_the_order_of_the_outputs(
    validation, tmp_path
):
    listed = [[2], [0, 1], [0], [1, 0, 2], [2], [1]]
    (tmp_path / "real.json").write_text(json.dumps(listed))
    labels = plain(validation, SYNSETS[1:] + SYNSETS[:1])
    labels = label_sets.with_real_labels(labels, validation, tmp_path / "real.json")
    found = dict(zip(numbers(labels, validation), map(set, right(labels, validation))))
    assert found == {n: {[2, 0, 1][o] for o in listed[n - 1]} for n in range(1, 7)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], [1]]", "not one of the 2 images"),
        ("[[0], [1], [2], [3], [0], [0]]", "outputs that the network lacks"),
        ("[[0], [1], [2], [-1], [0], [0]]", "outputs that the network lacks"),
        ('{"a": 1}', "list of lists"),
        ("[[0], [1.5], [2], [2], [0], [0]]", "list of lists"),
        ("[[0]", "not JSON"),
        ("[[true], [1], [2], [2], [0], [0]]", "list of lists"),
        ("[" * 100_000, "nested too deep"),
        ("[[" + "1" * 5000 + "]]", "limit .* digits"),
    ],
)
def test_a_wrong_file_of_real_labels_is_refused(validation, tmp_path, content, message):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(DataError, match=message):
        label_sets.with_real_labels(plain(validation), validation, tmp_path / "real.json")


@pytest.mark.parametrize(
    "lines",
    ["2\n5\n", "ILSVRC2012_val_00000002\nILSVRC2012_val_00000005.JPEG\n",
     "n00000001/ILSVRC2012_val_00000002.JPEG\n\nval/x/ILSVRC2012_val_00000005.JPEG 17\n"],
)  # fmt: skip
def test_lists_name_images_by_number_or_file(validation, tmp_path, lines):
    (tmp_path / "list").write_text(lines)
    labels = plain(validation)
    kept = label_sets.only(labels, validation, tmp_path / "list")
    left = label_sets.without(labels, validation, tmp_path / "list")
    assert sorted(numbers(kept, validation)) == [2, 5]
    assert sorted(numbers(left, validation)) == [1, 3, 4, 6]
    (tmp_path / "list").write_text(lines + "77\n")
    with pytest.raises(DataError, match=r"1 of its 3 lines name no image here.* such as 77"):
        label_sets.only(labels, validation, tmp_path / "list")


def test_lists_name_images_by_number_whatever_stands_around_it(tmp_path):
    content = {
        SYNSETS[0]: ["ILSVRC2012_val_00000006_n00000001.JPEG", "0-ILSVRC2012_val_00000002.jpg"],
        SYNSETS[1]: ["ILSVRC2012_val_00000001.webp", "ILSVRC2012_val_00000004_n00000002.JPEG"],
        SYNSETS[2]: ["x.JPEG"],
    }
    source = folders(tmp_path / "val", content)
    (tmp_path / "list").write_text("1\n2\nILSVRC2012_val_00000004.JPEG\nILSVRC2012_val_00000006\n")
    left = label_sets.without(plain(source), source, tmp_path / "list")
    assert [Path(source.name(index)).name for index in left.indices] == ["x.JPEG"]


def test_where_folders_hold_files_of_the_same_name_lists_need_the_folder(tmp_path):
    source = folders(tmp_path / "x", {name: ["0.png", "1.png"] for name in "abc"})
    labels = label_sets.from_folders(source, "x", ["a", "b", "c"], 3, "net")
    (tmp_path / "list").write_text("b/1.png\nc/0\n")
    kept = label_sets.only(labels, source, tmp_path / "list")
    assert kept.indices.tolist() == [3, 4]
    (tmp_path / "list").write_text("1.png\n")
    with pytest.raises(DataError, match="name no image"):
        label_sets.only(labels, source, tmp_path / "list")


@pytest.mark.parametrize("line", ["my photo.png", "my photo", "a.1", "a.1.png", "12", "x/12.png"])
def test_lists_name_files_whatever_they_are_called(tmp_path, line):
    source = folders(tmp_path / "x", {"a": ["my photo.png"], "x": ["12.png", "a.1.png"]})
    labels = label_sets.from_folders(source, "x", ["a", "x"], 2, "net")
    (tmp_path / "list").write_text(f"{line}\n")
    (index,) = label_sets.only(labels, source, tmp_path / "list").indices
    name = Path(source.name(index)).name
    assert Path(line).name in (name, name.removesuffix(".png"))


def test_lists_may_name_images_that_do_not_count_any_more(validation, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[2], [], [0], [1], [2], [1]]))
    (tmp_path / "list").write_text("2\n5\n")
    labels = label_sets.with_real_labels(plain(validation), validation, tmp_path / "real.json")
    left = label_sets.without(labels, validation, tmp_path / "list")
    assert sorted(numbers(left, validation)) == [1, 3, 4, 6]
    (tmp_path / "few").write_text("1\n5\n")
    few = label_sets.only(plain(validation), validation, tmp_path / "few")
    assert numbers(label_sets.without(few, validation, tmp_path / "list"), validation) == [1]


def test_nothing_left_is_an_error(validation):
    labels = plain(validation)
    label_sets.check_not_empty(labels, "val")
    none = label_sets.LabelSet("folders", np.empty(0, np.int64), labels.outputs)
    with pytest.raises(DataError, match="no image is left"):
        label_sets.check_not_empty(none, "val")


def test_a_number_of_any_length_names_no_image(validation, tmp_path):
    for text in ("9" * 5000, "0" * 5000 + "7"):
        (tmp_path / "list").write_text(text)
        with pytest.raises(DataError, match="1 of its 1 lines name no image"):
            label_sets.only(plain(validation), validation, tmp_path / "list")
    (tmp_path / "list").write_text("0" * 5000 + "4")
    assert numbers(
        label_sets.only(plain(validation), validation, tmp_path / "list"), validation
    ) == [4]


def test_outputs_that_are_listed_many_times_take_no_room(validation, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[0] * 100_000, *([1] for _ in range(5))]))
    labels = label_sets.with_real_labels(plain(validation), validation, tmp_path / "real.json")
    assert labels.several.shape == (6, 1)
