"""ImageNet's archives read in place: ImageFolder's order, tarfile's members, damage refused."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import imagenet_miniature as miniature
import numpy as np
import pytest
from imagenet_miniature import devkit_files, devkit_tar, train_images, train_tar, val_images
from tars import special, tar
from torchvision.datasets import ImageFolder

from data.errors import DataError, ImageError
from data.ilsvrc import read_devkit
from data.prepare.imagenet import train_source, val_source
from data.prepare.listed import ArchiveSource, Listing
from data.prepare.members import list_members

CLASSES = sorted(miniature.NUMBERS)


def open_archives(folder: Path, **archives: bytes) -> dict[str, ArchiveSource]:
    """Both splits, some archives replaced by others."""
    expected = miniature.write_archives(folder, **archives)
    devkit = read_devkit(folder / expected.devkit.name, expected)
    return {
        "train": train_source(folder / expected.train.name, devkit, expected, 2, lambda size: None),
        "val": val_source(folder / expected.val.name, devkit),
    }


def refusal(folder: Path, **archives: bytes) -> str:
    with pytest.raises(DataError) as error:
        open_archives(folder, **archives)
    return str(error.value)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, ArchiveSource]:
    return open_archives(tmp_path_factory.mktemp("archives"))


# ---------------------------------------------------------------------------------- images


def test_images_are_those_of_an_image_folder_in_its_order(sources, tmp_path):
    files = [
        (tmp_path / "val" / miniature.IDS[miniature.VAL_IDS[int(name[-13:-5]) - 1]] / name, content)
        for name, content in val_images()
    ]
    for synset, images in train_images().items():
        files += [(tmp_path / "train" / synset / name, content) for name, content in images]
    for path, content in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for split, source in sources.items():
        peer = ImageFolder(tmp_path / split)
        assert source.classes == peer.classes
        found = [(source.name(i), *source.read(i)) for i in range(len(source))]
        assert found == [
            (path.replace(str(tmp_path / split), source.root), Path(path).read_bytes(), label)
            for path, label in peer.samples
        ]


def test_members_are_the_images_of_a_class(sources):
    for source in sources.values():
        labels = [source.read(i)[1] for i in range(len(source))]
        for i, label in enumerate(labels):
            members = [k for k, other in enumerate(labels) if other == label]
            assert list(source.members(i)) == list(source.images_of(label)) == members
        assert source.class_counts() == np.bincount(labels).tolist()


def test_a_source_reads_the_same_in_another_process(sources):
    copy = pickle.loads(pickle.dumps(sources["train"]))
    assert [copy.read(i) for i in range(14)] == [sources["train"].read(i) for i in range(14)]


def test_an_archive_that_was_cut_off_or_removed_since_is_named(tmp_path):
    source = open_archives(tmp_path)["val"]
    path = Path(source.root)
    os.truncate(path, 1000)
    with pytest.raises(ImageError, match=r"ILSVRC2012_val_0000000.*cut off"):
        source.read(len(source) - 1)
    path.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        source.read(0)


def test_imagenet_takes_less_than_60_mib(tmp_path):
    synsets, numbers = [f"n{label:08d}" for label in range(1000)], np.arange(1281)
    names = np.array([f"n00000999_{i}.JPEG" for i in range(10_000, 11_281)], np.bytes_)
    source = ArchiveSource(tmp_path, synsets, [Listing(names, numbers, numbers)] * 1000)
    assert len(source) == 1_281_000
    assert source.name(1_280_999) == f"{tmp_path}/n00000999/n00000999_11280.JPEG"
    assert sum(a.nbytes for a in (source.names, source.offsets, source.sizes)) < 60 << 20


# ---------------------------------------------------------------------------------- tar headers


def members_of(path: Path, content: bytes) -> list[tuple[str, int, int]]:
    path.write_bytes(b"before" + content + b"behind")
    with open(path, "rb") as file:
        return list_members(file.fileno(), 6, 6 + len(content), "outer.tar: inner.tar")


def test_members_are_tarfiles(tmp_path):
    rng = np.random.default_rng(0)
    files = [(f"{i}.JPEG", rng.bytes(size)) for i, size in enumerate([0, 1, 511, 512, 513, 3000])]
    content = tar(files)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [(info.name, 6 + info.offset_data, info.size) for info in archive]
    assert members_of(tmp_path / "file", content) == expected
    assert [size for _, _, size in expected] == [0, 1, 511, 512, 513, 3000]


def test_an_archive_cut_off_anywhere_is_refused(tmp_path):
    content = tar([("a.JPEG", bytes(700)), ("b.JPEG", bytes(100))])
    end = 512 + 1024 + 512 + 512  # then come zeros to its end
    members = members_of(tmp_path / "file", content)
    for size in [*range(0, end + 512, 64), end - 1, end + 511]:
        with pytest.raises(DataError, match=r"^outer.tar: inner.tar: damaged or cut off"):
            members_of(tmp_path / "file", content[:size])
    assert members_of(tmp_path / "file", content[: end + 512]) == members


def test_a_damaged_header_is_refused_where_tarfile_sees_the_end(tmp_path):
    content = bytearray(tar([("a.JPEG", bytes(700)), ("b.JPEG", bytes(100))]))
    content[512 + 1024 + 2] ^= 1
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert archive.getnames() == ["a.JPEG"]
    with pytest.raises(DataError, match="no tar header at byte 1,536"):
        members_of(tmp_path / "file", bytes(content))


def test_a_negative_size_ends_in_a_refusal(tmp_path):
    info = tarfile.TarInfo("a.JPEG")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"  # base 256: -256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(DataError, match="damaged or cut off"):
        members_of(tmp_path / "file", bytes(header) + bytes(1024))


# ---------------------------------------------------------------------------------- hostile


PATHS = ["../x", "/etc/x", "a/../../b", "./n02100735_1.JPEG", "n02100735_1.JPEG/..", "..", "", "é"]
KINDS = {
    "symbolic link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "folder": tarfile.DIRTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
    "sparse file": tarfile.GNUTYPE_SPARSE,
    "extended header": tarfile.XHDTYPE,
}


@pytest.mark.parametrize("name", [*PATHS, "n01440764_1.JPEG", "n02100735_x.JPEG", "x.png"])
def test_an_image_by_an_unknown_name_is_refused(name, tmp_path):
    images = train_images()
    images["n02100735"].append((name, b"x"))
    assert "train.tar: n02100735.tar: holds" in refusal(tmp_path, train=train_tar(images))
    assert "val.tar: holds" in refusal(tmp_path, val=tar([*val_images(), (name, b"x")]))


@pytest.mark.parametrize("name", [*PATHS, "n00000001.tar", "n00001740.tar", "../n02100735.tar"])
def test_an_archive_by_an_unknown_name_is_refused(name, tmp_path):
    entries = [(f"{synset}.tar", tar(images)) for synset, images in train_images().items()]
    assert "train.tar: holds" in refusal(tmp_path, train=tar([*entries, (name, tar([]))]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_refused(kind, tmp_path):
    images = train_images()
    images["n02100735"][1] = special("n02100735_9.JPEG", KINDS[kind])
    error = refusal(tmp_path, train=train_tar(images))
    assert "n02100735.tar: holds 'n02100735_9.JPEG', which is not a plain file" in error
    entries = [special("n02100735.tar", KINDS[kind]), ("n02105855.tar", tar([]))]
    assert "train.tar: holds 'n02100735.tar', which" in refusal(tmp_path, train=tar(entries))
    entries = [*val_images()[1:], special("ILSVRC2012_val_00000005.JPEG", KINDS[kind])]
    assert "val.tar: holds 'ILSVRC2012_val" in refusal(tmp_path, val=tar(entries))


def test_two_images_of_the_same_name_are_refused(tmp_path):
    images = train_images()
    images["n02100735"][1] = images["n02100735"][0]
    assert "'n02100735_10.JPEG' twice" in refusal(tmp_path, train=train_tar(images))


# ---------------------------------------------------------------------------------- counts


def test_training_images_that_are_missing_are_counted_by_class(tmp_path):
    images = train_images()
    del images["n01440764"]
    del images["n02100735"][0]
    assert refusal(tmp_path, train=train_tar(images)) == (
        f"{tmp_path}/ILSVRC2012_img_train.tar: 10 images, 14 expected\n"
        "  n01440764: 0 images, 3 expected\n"
        "  n02100735: 3 images, 4 expected"
    )


def test_an_empty_class_is_refused_whatever_the_sum(tmp_path):
    images = train_images()
    images["n01440764"] = []
    images["n02100735"] += [(f"n02100735_{i}.JPEG", b"x") for i in (5, 6, 7)]
    assert "n01440764: 0 images, 3 expected" in refusal(tmp_path, train=train_tar(images))


def test_validation_images_that_are_missing_are_counted_by_class(tmp_path):
    assert refusal(tmp_path, val=tar(val_images()[1:])) == (
        f"{tmp_path}/ILSVRC2012_img_val.tar: 7 images, 8 expected\n"
        "  n01440764: 1 images, 2 expected"
    )


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_cut_off_archive_is_named(share, tmp_path):
    for role, content in (
        ("train", train_tar(train_images()).rstrip(b"\0")),
        ("val", tar(val_images()).rstrip(b"\0")),
        ("devkit", devkit_tar(devkit_files())),
    ):
        cut = content[: int(share * len(content))] or b"\1"
        assert f"{tmp_path}/ILSVRC2012_" in (error := refusal(tmp_path, **{role: cut}))
        assert role in error
    inner = tar(train_images()["n02100735"]).rstrip(b"\0")
    entries = [("n02100735.tar", inner[: int(share * len(inner))])]
    assert "train.tar: n02100735.tar: damaged or cut" in refusal(tmp_path, train=tar(entries))


# ---------------------------------------------------------------------------------- devkit

LABELS = "ILSVRC2012_validation_ground_truth.txt"
DEVKITS = {
    "a label too few": ({LABELS: b"1\n" * 7}, "has 7 labels; 8 expected"),
    "a label too many": ({LABELS: b"1\n" * 9}, "has 9 labels; 8 expected"),
    "id 0": ({LABELS: b"1\n" * 7 + b"0\n"}, "line 8: not an id from 1 to 4: '0'"),
    "an id beyond the last": ({LABELS: b"5\n" + b"1\n" * 7}, "line 1: not an id from 1 to 4: '5'"),
    "a high-level id": ({LABELS: b"1\n1001\n" + b"1\n" * 6}, "line 2: not an id"),
    "no number": ({LABELS: b"1\n" * 6 + b"-1\ncat\n"}, "line 7: not an id"),
    "not MATLAB": ({"meta.mat": b"MATLAB 5.0" + bytes(200)}, "meta.mat: cannot be read"),
    "a pickle": ({"meta.mat": b"cos\nsystem\n(S'exit 1'\ntR."}, "meta.mat: cannot be read"),
    "meta cut off": ({"meta.mat": devkit_files()["meta.mat"][:1500]}, "meta.mat: cannot be read"),
}


@pytest.mark.parametrize("case", DEVKITS)
def test_a_devkit_of_something_else_is_refused(case, tmp_path):
    files, words = DEVKITS[case]
    error = refusal(tmp_path, devkit=devkit_tar({**devkit_files(), **files}))
    assert error.startswith(f"{tmp_path}/ILSVRC2012_devkit_t12.tar.gz: ")
    assert words in error
    assert "\n" not in error


@pytest.mark.parametrize("name", ["meta.mat", LABELS])
def test_a_file_that_the_devkit_lacks_is_named(name, tmp_path):
    files = devkit_files()
    del files[name]
    words = f"holds no ILSVRC2012_devkit_t12/data/{name}"
    assert words in refusal(tmp_path, devkit=devkit_tar(files))


@pytest.mark.parametrize("last", [{}, {5: "n01440764"}, {4: "n02119789"}, {4: "../n9"}], ids=repr)
def test_synsets_that_are_not_numbered_from_1_are_refused(last, tmp_path):
    ids = {i: miniature.IDS[i] for i in (1, 2, 3)} | last
    files = {**devkit_files(), "meta.mat": miniature.meta(ids)}
    assert ": meta.mat" in refusal(tmp_path, devkit=devkit_tar(files))


def test_a_devkit_without_a_blacklist_is_no_fault(tmp_path):
    files = devkit_files()
    del files["ILSVRC2012_validation_blacklist.txt"]
    assert len(open_archives(tmp_path, devkit=devkit_tar(files))["val"]) == 8
