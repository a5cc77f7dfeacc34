"""Every form in which people have ImageNet gives the same tree; what is wrong with one is named."""

from __future__ import annotations

import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import huggingface_hub
import imagenet_forms as forms
import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub import errors
from imagenet_forms import DATA, FORMS, write_files, zipped
from imagenet_miniature import IDS, VAL_IDS, expected, train_images, tree, val_images
from pyarrow import parquet
from scipy.io import savemat
from shard_makers import encoded, flip, sample
from tars import deflated, special, tar

from data import label_files, label_sets
from data.errors import DataError
from data.ilsvrc import BLACKLIST, ILSVRC2012
from data.label_files import LabelledFolder
from data.prepare import folder_writer
from data.prepare import parquet as parquet_reader
from data.sources import open_source
from scripts import prepare_imagenet
from scripts.prepare_imagenet import STATE, ClassFolders


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Not to wait for all that this machine has to write."""
    monkeypatch.setattr(os, "sync", lambda: None)


def whole() -> dict[str, bytes]:
    """The tree that every form should become."""
    files = {
        f"train/{synset}/{name}": content
        for synset, images in train_images().items()
        for name, content in images
    }
    for name, content in val_images():
        files[f"val/{IDS[VAL_IDS[int(name[-13:-5]) - 1]]}/{name}"] = content
    return files


def images(out: Path) -> dict[str, bytes]:
    return {name: file for name, file in tree(out).items() if name not in (STATE, BLACKLIST)}


def prepare(path: Path, out: Path, *more: str) -> int:
    arguments = ["--from", path, "--out", out, "--workers", "2", "--skip-md5", *more]
    return prepare_imagenet.main(list(map(str, arguments)), expected())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tree(form, tmp_path, capsys):
    path = FORMS[form](tmp_path / "given")
    assert prepare(path, tmp_path / "out") == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert told.startswith(f"{path}: {form.partition(',')[0]}\n")
    assert f"{tmp_path / 'out'}/val: 8 images of 4 classes" in told
    assert images(tmp_path / "out") == whole()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*/*")}
    assert prepare(path, tmp_path / "out") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*/*")} == before


@pytest.mark.parametrize("form", ["Kaggle's zip", "Kaggle's tree", "Hugging Face's parquet files"])
def test_every_form_becomes_shards(form, tmp_path, capsys):
    path = FORMS[form](tmp_path / "given")
    assert prepare(path, tmp_path / "out", "--shards", "--images-per-shard", "5") == 0
    write_files(tmp_path / "folders", whole())
    for split in ("train", "val"):
        shards, files = (open_source(str(tmp_path / out / split)) for out in ("out", "folders"))
        assert shards.classes == files.classes
        assert [shards.read(i) for i in range(len(shards))] == [
            files.read(i) for i in range(len(files))
        ]


def test_files_are_linked_where_that_is_asked(tmp_path, capsys, monkeypatch):
    path = forms.write_kaggle_tree(tmp_path / "given")
    assert prepare(path, tmp_path / "out", "--link") == 0
    assert images(tmp_path / "out") == whole()
    file = path / DATA / "val" / "ILSVRC2012_val_00000001.JPEG"
    assert file.stat().st_nlink == 2
    assert prepare(file.parent, tmp_path / "flat", "--link", "--only", "val") == 0  # CSV far above

    def refuse(*_arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert prepare(path, tmp_path / "symbolic", "--link") == 0
    assert images(tmp_path / "symbolic") == whole()
    link = tmp_path / "symbolic" / "val" / "n02105855" / file.name
    assert link.readlink() == file
    file.unlink()
    (link.parent / "ILSVRC2012_val_00000008.JPEG").unlink()
    assert prepare(path, tmp_path / "symbolic", "--link") == 1
    archives = forms.write_archives_alone(tmp_path / "archives")
    assert prepare(archives, tmp_path / "none", "--link") == 1
    assert "holds no files to link to" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- shards


def content(root: Path) -> list[tuple[str, str, bytes]]:
    """Class, name without ending, and bytes of every image, in no order."""
    source = open_source(str(root))
    return sorted(
        (source.classes[source.label(i)], Path(source.name(i)).stem.split(": ")[-1], file)
        for i, (file, _) in enumerate(map(source.read, range(len(source))))
    )


@pytest.mark.parametrize("place", ["elsewhere", "beside", "in folders of their own"])
def test_shards_of_others_are_indexed_where_they_lie(place, tmp_path, capsys):
    path = forms.write_shards(tmp_path / "given")
    out = path if place != "elsewhere" else tmp_path / "out"
    if place == "in folders of their own":
        for split, name in (("train", "train"), ("val", "validation")):
            (path / split).mkdir()
            for tar_file in path.glob(f"*{name}*.tar"):
                tar_file.rename(path / split / tar_file.name)
    assert prepare(path, out) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith(f"{path}: WebDataset's tar shards\n")
    write_files(tmp_path / "folders", whole())
    for split in ("train", "val"):
        assert content(out / split) == content(tmp_path / "folders" / split)
    links = [file for file in out.glob("*/*.tar") if file.is_symlink()]
    assert len(links) == (0 if place == "in folders of their own" else 4)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert prepare(path, out) == 0
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    (tmp_path / "list").write_text("2\n5\n")
    labels = label_sets.from_folders(source := open_source(str(out / "val")), "", None, 4, "net")
    left = label_sets.without(labels, source, tmp_path / "list")
    assert sorted(int(source.name(i)[-12:-4]) for i in left.indices) == [1, 3, 4, 6, 7, 8]


def test_shards_that_contradict_or_lack_images_are_refused_and_left_without_an_index(
    tmp_path, capsys
):
    path = forms.write_shards(tmp_path / "given")
    last = path / "imagenet1k-validation-0001.tar"
    whole = last.read_bytes()
    last.unlink()
    assert "5 images, 8 expected" in refusal(path, tmp_path, capsys, "--only", "val")
    last.write_bytes(tar(sample("ILSVRC2012_val_9", 0, json=b'{"filename": "n02119789/x.JPEG"}')))
    assert "of class n02119789, but the classes given" in refusal(
        path, tmp_path, capsys, "--only", "val"
    )
    last.write_bytes(whole)
    assert prepare(path, tmp_path / "out", "--only", "val") == 0
    assert prepare(path, tmp_path / "out", "--only", "val", "--link") == 1
    assert "as they are; make_shards.py changes them" in capsys.readouterr().err
    (tmp_path / "out" / "train" / "cats").mkdir(parents=True)
    assert prepare(path, tmp_path / "out") == 1
    assert "train: holds other things (cats)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("added", [False, True], ids=["as archived", "as Hugging Face names them"])
def test_a_folder_of_validation_images_is_sorted_by_each_kind_of_label_file(
    tmp_path, added, capsys
):
    val = forms.write_flat(tmp_path / "val", added)
    wanted = {name: file for name, file in whole().items() if name.startswith("val/")}
    for kind, path in forms.write_label_files(tmp_path / "labels").items():
        out = tmp_path / f"out of {kind}"
        assert prepare(val, out, "--labels", path, "--only", "val", "--link") == 0, kind
        assert images(out) == wanted
        source, folder = LabelledFolder(val, path), open_source(str(out / "val"))
        assert source.classes == folder.classes and source.starts == folder.starts
        assert [source.read(i) for i in range(8)] == [folder.read(i) for i in range(8)]


WRONG_LABELS = {
    "no class for an image": (
        b"ILSVRC2012_val_00000001 n02105855\n",
        "7 of its 8 images are not in",
    ),
    "two classes": (b"a.JPEG n02105855\na.JPEG n01440764\n", "a.JPEG is of two classes"),
    "names alone": (b"ILSVRC2012_val_00000001\n", "expected lines of name and class"),
    "ids without what they mean": (b"3\n1\n", "put that beside it"),
    "nothing": (b"\n", "is empty"),
    "no text": (b"\xff\xfe\xfd", "not a text file"),
    "a pickle": (b"\x80\x04cos\nsystem\n\0", "not a file of labels"),
    "boxes of two classes": (
        b"ImageId,PredictionString\nILSVRC2012_val_00000001,n02105855 1 1 2 2 n01440764 1 1 2 2 \n",
        "2 classes, expected one",
    ),
    "an endless cell": (
        b"ImageId,PredictionString\n" + b"x" * 200_000 + b",n02105855 1 1 2 2\n",
        "labels: cannot be read (field larger",
    ),
    "one that grows": (deflated(forms.meta_bin()), "not a file of labels"),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_a_file_of_labels_that_says_too_little_is_refused(kind, tmp_path):
    content, words = WRONG_LABELS[kind]
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(words)):
        LabelledFolder(forms.write_flat(tmp_path / "val"), tmp_path / "labels")


def test_a_name_that_carries_another_class_is_refused(tmp_path, capsys):
    val = forms.write_flat(tmp_path / "val", added=True)
    path = val / "ILSVRC2012_val_00000001_n02105855.JPEG"
    path.rename(val / "ILSVRC2012_val_00000001_n01440764.JPEG")
    (labels := tmp_path / "labels.csv").write_bytes(forms.solution())
    with pytest.raises(DataError, match="1 of its 8 images are of other classes in"):
        LabelledFolder(val, labels)
    assert prepare(val, tmp_path / "out", "--only", "val", "--labels", labels) == 1
    assert "of no class or another: n02105855" in capsys.readouterr().err


def test_numbers_beside_names_are_those_of_outputs(tmp_path):
    val, places = forms.write_flat(tmp_path / "val"), sorted(IDS.values())
    lines = [
        f"ILSVRC2012_val_{i:08d}.JPEG {places.index(synset)}\n"
        for i, synset in enumerate(forms.VAL_SYNSETS, 1)
    ]
    (tmp_path / "val.txt").write_text("".join(lines))
    source = LabelledFolder(val, tmp_path / "val.txt")
    assert label_sets.from_folders(source, "val", places, 4, "net").name == "numbered"
    from_1 = [f"{line.split()[0]} {int(line.split()[1]) + 1}\n" for line in lines]
    (tmp_path / "val.txt").write_text("".join(from_1))
    source = LabelledFolder(val, tmp_path / "val.txt")
    with pytest.raises(DataError, match="4 unknown"):
        label_sets.from_folders(source, "val", places, 4, "net")
    vast = [f"{line.split()[0]} {'1' * 5000}\n" for line in lines]
    (tmp_path / "val.txt").write_text("".join(vast))
    source = LabelledFolder(val, tmp_path / "val.txt")
    with pytest.raises(DataError, match="1 unknown"):
        label_sets.from_folders(source, "val", places, 4, "net")


def test_text_of_windows_and_names_with_spaces_are_read(tmp_path):
    lines = "my photo.jpg,great white shark\na.jpg\ttench\nb b.jpg n01440764\nc.jpg, x y\n"
    (tmp_path / "labels").write_bytes(lines.replace("\n", "\r\n").encode("utf-8-sig"))
    assert label_files.read(tmp_path / "labels") == {
        "my photo.jpg": "great white shark",
        "a.jpg": "tench",
        "b b.jpg": "n01440764",
        "c.jpg": "x y",
    }


def test_labels_of_images_that_are_not_there_are_a_remark(tmp_path):
    val = forms.write_flat(tmp_path / "val")
    (val / "ILSVRC2012_val_00000001.JPEG").unlink()
    (labels := tmp_path / "labels.csv").write_bytes(forms.solution())
    source = LabelledFolder(val, labels)
    assert len(source) == 7 and source.classes == sorted(IDS.values())
    assert source.remarks == [f"{val}: 1 of the 8 images in {labels} are not there"]


def test_ids_are_read_with_the_meta_of_a_later_devkit(tmp_path):
    fields = ("ILSVRC2015_CLSLOC_ID", "WNID", "name", "description", "num_train_images")
    synsets = np.zeros((4, 1), [(field, object) for field in fields])
    for row, (number, name) in enumerate(IDS.items()):
        synsets[row, 0] = (number, name, "thing", "what it is", 3)
    savemat(tmp_path / "meta_clsloc.mat", {"synsets": synsets})
    path = tmp_path / "ILSVRC2015_clsloc_validation_ground_truth.txt"
    path.write_text("".join(f"{number}\n" for number in VAL_IDS))
    assert list(label_files.read(path).values()) == forms.VAL_SYNSETS


# ---------------------------------------------------------------------------------- refusals


def refusal(path: Path, folder: Path, capsys, *more: str) -> str:
    """The message of a run that is refused with no image written."""
    assert prepare(path, folder / "out", *more) == 1
    assert not any(name.endswith("JPEG") for name in images(folder / "out"))
    assert not list((folder / "out").glob("*/index.safetensors"))
    return capsys.readouterr().err


def test_what_is_no_form_of_imagenet_is_told_the_forms(tmp_path, capsys):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "other.tar").write_bytes(tar([]))
    told = refusal(tmp_path, tmp_path, capsys)
    assert "not a form of ImageNet that is known" in told and "Kaggle's" in told
    assert "not there" in refusal(tmp_path / "nowhere", tmp_path, capsys)
    val = forms.write_flat(tmp_path / "val")
    assert "without train images; --only val" in refusal(val, tmp_path, capsys)
    assert "no labels of the validation images" in refusal(val, tmp_path, capsys, "--only", "val")
    (val / ILSVRC2012.devkit.name).write_bytes(b"labels of images that lie beside it")
    assert "without train images; --only val" in refusal(val, tmp_path, capsys)
    (alone := tmp_path / "alone").mkdir()
    (alone / ILSVRC2012.devkit.name).touch()
    assert f"{ILSVRC2012.train.name}: not there" in refusal(alone, tmp_path, capsys)
    ready = tmp_path / "ready" / "val"
    (ready / "n01440764").mkdir(parents=True)
    told = refusal(ready.parent, tmp_path, capsys)
    assert f"{ready}: holds class folders already" in told and f"data.val={ready}" in told
    stream = forms.write_kaggle_tar(tmp_path / "tar")
    assert "beginning to end" in refusal(stream, tmp_path, capsys, "--shards")


HOSTILE = ["../n01440764_1.JPEG", "/tmp/train/n01440764/n01440764_1.JPEG", "a/../../x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_member_that_leads_out_is_refused_in_every_archive(name, tmp_path, capsys):
    files = forms.kaggle_tree() | forms.kaggle_beside() | {name: b"x"}
    for kind, content in (("zip", zipped(files)), ("tar.gz", tar(files.items(), "w:gz"))):
        (tmp_path / f"a.{kind}").write_bytes(content)
        assert "refused, it holds" in refusal(tmp_path / f"a.{kind}", tmp_path, capsys)


def test_links_in_an_archive_are_refused_in_every_archive(tmp_path, capsys):
    name = f"{DATA}/train/n01440764/n01440764_1.JPEG"
    link = zipfile.ZipInfo(name)
    chain = [special("x", tarfile.GNUTYPE_LONGNAME)] * 2000
    (tmp_path / "chain.tar").write_bytes(tar(chain))
    assert "not a whole archive" in refusal(tmp_path / "chain.tar", tmp_path, capsys)
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    (tmp_path / "a.tar").write_bytes(tar([special(name, tarfile.SYMTYPE)]))
    for kind in ("zip", "tar"):
        assert "refused, it holds" in refusal(tmp_path / f"a.{kind}", tmp_path, capsys)


@pytest.mark.parametrize("form", ["Kaggle's zip", "Kaggle's tar", "Kaggle's tree"])
def test_images_that_are_missing_are_counted_by_class_in_every_form(
    form, tmp_path, capsys, monkeypatch
):
    files = forms.kaggle_tree()
    for name in ("train/n01440764/n01440764_1.JPEG", "val/ILSVRC2012_val_00000001.JPEG"):
        del files[f"{DATA}/{name}"]
    monkeypatch.setattr(forms, "kaggle_tree", lambda: files)
    path = FORMS[form](tmp_path / "given")
    assert "13 images, 14 expected" in refusal(path, tmp_path, capsys, "--only", "train")
    told = refusal(path, tmp_path, capsys, "--only", "val")
    assert "7 images, 8 expected\n  n02105855: 1 images, 2 expected" in told


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_cut_off_archive_of_kaggles_is_named(share, tmp_path, capsys):
    path = forms.write_kaggle_tar(tmp_path) / forms.INNER
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert f"{path}: not a whole archive" in refusal(path, tmp_path, capsys)


def test_a_zip_with_damaged_labels_is_named(tmp_path, capsys):
    path = forms.write_kaggle_zip(tmp_path) / "imagenet-object-localization-challenge.zip"
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("LOC_val_solution.csv").header_offset
    flip(path, *range(place + 60, place + 90))
    assert f"{path}: LOC_val_solution.csv in it is damaged" in refusal(path, tmp_path, capsys)


def test_damaged_bytes_in_a_zip_are_no_image(tmp_path, capsys):
    path = forms.write_kaggle_zip(tmp_path) / "imagenet-object-localization-challenge.zip"
    with zipfile.ZipFile(path) as archive:
        name = "n02100735_9.JPEG"
        place = next(i.header_offset for i in archive.infolist() if i.filename.endswith(name))
    flip(path, place + 200)
    assert prepare(path, tmp_path / "out", "--only", "train") == 1
    assert f"{name}: does not match its checksum" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- parquet


def changed(rows: list, **changes: object) -> list:
    """The first row with another name, content or label."""
    row = dict(zip(("name", "content", "label"), rows[0])) | changes
    return [tuple(row.values()), *rows[1:]]


def test_rows_of_parquet_files_that_contradict_their_names_are_refused(tmp_path, capsys):
    file, val = tmp_path / "validation.parquet", forms.parquet_rows()["validation"]

    def told(rows: list) -> str:
        file.write_bytes(forms.parquet_file(rows))
        return refusal(tmp_path, tmp_path, capsys, "--only", "val")

    assert "its label is 4, not one of 0 to 3" in told(changed(val, label=4))
    other = (val[0][2] + 1) % 4
    assert f"has label {other}, which is {sorted(IDS.values())[other]}" in told(
        changed(val, label=other)
    )
    assert "7 images, 8 expected" in told(val[1:])
    assert "twice" in told([val[1], *val[1:]])
    assert "the file has its name alone" in told(changed(val, content=None))
    file.write_bytes(forms.parquet_file(val)[:-9])
    assert f"{file}: not a whole parquet file" in refusal(
        tmp_path, tmp_path, capsys, "--only", "val"
    )
    table = pa.table({"pixels": [b"x"], "label": [0]})
    parquet.write_table(table, file)
    assert "no column of images" in refusal(tmp_path, tmp_path, capsys, "--only", "val")


def test_images_of_parquet_files_may_be_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_reader, "ROWS", 1)  # of row groups of two
    path = forms.write_parquet(tmp_path)
    files = sorted(path.glob("data/train*"))
    source = parquet_reader.imagenet_source(path, "train", files, expected())
    order = np.argsort(source.offsets).tolist()
    contents = [source.read(i) for i in order]
    assert contents == [source.read(i) for i in reversed(order)][::-1]
    assert sorted(content for content, _ in contents) == sorted(
        content for images in train_images().values() for _, content in images
    )


def test_signs_of_another_encoding_and_lost_names_are_told(tmp_path, capsys):
    rows = [(None, encoded(i, "WEBP", (60, 50)), label) for i, (*_, label) in
            enumerate(forms.parquet_rows()["validation"])]  # fmt: skip
    (tmp_path / "validation.parquet").write_bytes(forms.parquet_file(rows))
    out = tmp_path / "out"
    with mock.patch("data.prepare.parquet.MANY", 4):
        assert prepare(tmp_path, out, "--only", "val") == 0
    told = capsys.readouterr().err
    assert "of 4 images looked at some are not JPEG files, as ImageNet's are: 4 webp" in told
    assert "all have a shorter side of 50 px: scaled down" in told
    assert "8 val images have no names of ImageNet's" in told
    assert sorted(images(out).values()) == sorted(content for _, content, _ in rows)


def test_without_pyarrow_it_is_said_how_to_install_it(tmp_path, capsys, monkeypatch):
    path = forms.write_parquet(tmp_path / "given")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "needs pyarrow: pip install -r requirements-data.txt" in refusal(path, tmp_path, capsys)


def test_data_sets_of_the_hub_are_downloaded_as_far_as_they_are_needed(
    tmp_path, capsys, monkeypatch
):
    path, asked = forms.write_parquet(tmp_path / "given"), []

    def download(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert prepare("hf:ILSVRC/imagenet-1k@main", tmp_path / "out", "--only", "val") == 0
    assert len(images(tmp_path / "out")) == 8
    patterns = ["*val*.parquet", "*val*.tar"]
    options = {"repo_type": "dataset", "revision": "main", "allow_patterns": patterns}
    assert asked == [("ILSVRC/imagenet-1k", options)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError.__new__(errors.GatedRepoError), "accept its terms at https://hugg"),
        (
            errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError),
            "no such data set",
        ),
        (
            errors.LocalEntryNotFoundError("none\nat all"),
            "cannot be downloaded (none); ",
        ),
        (errors.HFValidationError("Repo id must"), "cannot be downloaded (Repo id must)"),
    ],
)
def test_a_download_that_fails_is_one_line(error, words, tmp_path, capsys, monkeypatch):
    def download(name: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    told = refusal("hf:a/b", tmp_path, capsys)
    assert f"hf:a/b: {words}" in told and told.count("\n") == 1


# ---------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("form", ["Kaggle's tar", "Hugging Face's parquet files"])
def test_a_stream_is_gone_on_with_where_it_was_on_the_disk(form, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_writer, "FLUSH_IMAGES", 4)
    monkeypatch.setattr(folder_writer, "READ_AHEAD", 2)
    path, written = FORMS[form](tmp_path / "given"), []
    write = Path.write_bytes

    def full(to: Path, content: bytes) -> int:
        if len(written) == 10:
            raise OSError(28, "No space left on device", str(to))
        written.append(to)
        return write(to, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert prepare(path, tmp_path / "out", "--only", "train") == 1
    assert folder_writer.written(tmp_path / "out" / "train.partial") == 8
    missing = ClassFolders(1, False).bytes_missing(tmp_path / "out" / "train", 1400, 4, 14)
    assert missing == pytest.approx(1.02 * 600)
    first = written[:8]
    written.clear()

    def noted(to: Path, content: bytes) -> int:
        written.append(to)
        return write(to, content)

    monkeypatch.setattr(Path, "write_bytes", noted)
    assert prepare(path, tmp_path / "out") == 0
    assert not set(first) & set(written) and len(written) == 14 - 8 + 8
    assert images(tmp_path / "out") == whole()
    assert sorted(os.listdir(tmp_path / "out" / "train")) == sorted(IDS.values())


def test_a_stream_that_was_stopped_before_its_folder_had_its_name_is_gone_on_with(
    tmp_path, monkeypatch
):
    path, compare = forms.write_kaggle_tar(tmp_path / "given"), folder_writer._compare

    def stopped(source: object, folder: Path, labels: list[int], workers: int) -> None:
        if labels:
            raise DataError("stopped")

    monkeypatch.setattr(folder_writer, "_compare", stopped)
    assert prepare(path, tmp_path / "out", "--only", "train") == 1
    monkeypatch.setattr(folder_writer, "_compare", compare)
    left = f".{'0' * 16}.tmp"  # of a note that was being written
    (tmp_path / "out" / "train.partial" / left).touch()
    (tmp_path / "out" / "train.partial" / "n01440764").rename(tmp_path / "taken away")
    assert prepare(path, tmp_path / "out") == 0
    assert images(tmp_path / "out") == whole()
    assert sorted(os.listdir(tmp_path / "out" / "train")) == sorted(IDS.values())
    (tmp_path / "out" / "train").rename(tmp_path / "out" / "train.partial")
    assert prepare(path, tmp_path / "out") == 0
