"""Shards: a folder's images under the same numbers, damage noticed, other people's tars indexed."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from safetensors import safe_open
from shard_makers import (
    IMAGES,
    encoded,
    everything,
    flip,
    ignore,
    members_of,
    sample,
    write_folder,
    write_set,
    write_tar,
)
from tars import special

from data import sources
from data.errors import DataError, ImageError
from data.prepare.shard_scan import index_folder, read_classes, scan
from data.prepare.shard_writer import Options, write_shards
from data.shards import index as shard_index
from data.shards import local
from data.shards.index import Index, Shard
from data.shards.local import ShardSource
from data.sources import FolderSource, SyntheticSource, open_source


def index_here(root: Path, classes: Path | None = None) -> ShardSource:
    index_folder(root, classes and read_classes(classes), 1, ignore)
    return ShardSource(root)


def refusal(root: Path, classes: Path | None = None) -> str:
    """The error for shards that cannot be indexed; nothing is written."""
    before = sorted(path.name for path in root.iterdir())
    with pytest.raises(DataError) as error:
        index_folder(root, classes and read_classes(classes), 1, ignore)
    assert sorted(path.name for path in root.iterdir()) == before
    return str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="module")
def made(folder) -> Path:
    """Shards of the folder; not to be changed."""
    return write_set(folder, folder.parent / "shards")


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """Shards to damage."""
    return shutil.copytree(made, tmp_path / "shards")


# ---------------------------------------------------------------------------------- as the folder


def test_an_image_has_the_number_bytes_label_and_class_that_it_has_in_the_folder(folder, made):
    expected, source = FolderSource(folder), ShardSource(made)
    assert len(source) == len(expected) == IMAGES
    assert source.classes == expected.classes
    assert everything(source) == everything(expected)
    assert source.resized_to is None


def test_indexed_again_by_others_means_the_index_is_the_same(made, tmp_path):
    for path in made.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    index_folder(tmp_path, None, 1, ignore)
    name = shard_index.INDEX
    assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_counts_of_shards_are_those_of_their_labels(made):
    source = ShardSource(made)
    labels = [source.read(i)[1] for i in range(len(source))]
    assert source.class_counts() == np.bincount(labels).tolist()


def test_a_name_is_the_shards_path_and_the_members_name(made):
    source, members = ShardSource(made), members_of(made)
    for i in range(len(source)):
        shard, _, member = source.name(i).partition(": ")
        assert members[member] == source.read(i)[0]
        assert Path(shard).parent == made
        with tarfile.open(shard) as tar:
            assert member in tar.getnames()


def test_open_source_knows_shards_by_their_index(made):
    assert isinstance(open_source(str(made)), ShardSource)


def test_tar_files_without_an_index_are_told_what_makes_one(tmp_path):
    write_tar(tmp_path / "a-0.tar", sample("x", 0))
    with pytest.raises(DataError, match=re.escape(f"make_shards.py --index {tmp_path}")):
        open_source(str(tmp_path))


def test_storage_order_is_the_order_in_the_tar_files(made):
    source = ShardSource(made)
    order = source.storage_order
    images = [name for name in members_of(made) if not name.endswith((".cls", ".json"))]
    assert [source.name(i).partition(": ")[2] for i in order] == images
    assert sorted(order.tolist()) == list(range(IMAGES))


def test_images_announced_are_asked_of_the_system_in_storage_order(made, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *arguments: asked.append(arguments))
    source = ShardSource(made)
    source.will_read([5, 0, 13, 2])
    places = [i for i in source.storage_order.tolist() if i in {5, 0, 13, 2}]
    assert [size for _, size, _ in asked] == [len(source.read(i)[0]) for i in places]
    monkeypatch.delattr(os, "posix_fadvise")
    source.will_read([5])


def test_a_source_goes_to_another_process_by_its_name(made):
    source = ShardSource(made)
    source.read(3)
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)


def test_a_forked_process_and_its_parent_read_the_same_files(made):
    source = ShardSource(made)
    expected = everything(source)
    if (child := os.fork()) == 0:
        os._exit(everything(source) != expected)
    assert [everything(source) for _ in range(5)] == [expected] * 5
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_few_files_stay_open_and_none_when_the_source_is_gone(made, monkeypatch):
    def open_here() -> int:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(str(made) in os.readlink(link) for link in links if os.path.lexists(link))

    monkeypatch.setattr(local, "MAX_OPEN", 2)
    source = ShardSource(made)
    assert open_here() == 0
    everything(source)
    assert open_here() == 2
    del source
    assert open_here() == 0


# ---------------------------------------------------------------------------------- damage


def test_a_flipped_bit_in_an_image_is_noticed_and_the_others_are_read(copied):
    source = ShardSource(copied)
    encoded_image = source.read(6)[0]
    path = Path(source.name(6).partition(": ")[0])
    flip(path, path.read_bytes().index(encoded_image) + len(encoded_image) // 2)
    with pytest.raises(ImageError, match=re.escape(source.name(6)) + ".* does not match its check"):
        source.read(6)
    for i in set(range(IMAGES)) - {6}:
        source.read(i)


def test_a_shard_cut_off_while_in_use_is_an_error_of_the_image(copied):
    source = ShardSource(copied)
    last = int(source.storage_order[-1])
    name = source.name(last)
    path = Path(name.partition(": ")[0])
    os.truncate(path, path.read_bytes().index(source.read(last)[0]) + 10)
    with pytest.raises(ImageError, match=re.escape(name) + ".*shorter"):
        source.read(last)
    os.truncate(path, 0)
    with pytest.raises(ImageError, match=f"{path}: image at byte .*shorter"):
        source.read(last)


def test_a_shard_that_vanishes_is_an_error_of_the_image(copied):
    source = ShardSource(copied)
    for path in copied.glob("*.tar"):
        path.unlink()
    with pytest.raises(ImageError, match=r"train-0000\d.tar: image at byte .*No such file"):
        source.read(0)
    source.will_read([0, 1])


def test_missing_and_truncated_shards_are_named_when_the_source_is_opened(copied):
    paths = sorted(copied.glob("*.tar"))
    paths[0].unlink()
    size = paths[2].stat().st_size
    os.truncate(paths[2], size - 512)
    with pytest.raises(DataError) as error:
        ShardSource(copied)
    assert f"{copied}: 2 of 4 shards" in str(error.value)
    assert "train-00000.tar (No such file or directory)" in str(error.value)
    assert f"train-00002.tar ({size - 512:,} bytes, not {size:,})" in str(error.value)


def test_every_flipped_bit_of_an_index_is_noticed(copied):
    path = copied / shard_index.INDEX
    sound = path.read_bytes()
    expected = ShardSource(copied)
    for place in range(0, len(sound), 7):
        content = bytearray(sound)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            source = ShardSource(copied)
        except DataError as error:
            assert str(path) in str(error)
            continue
        assert source.classes == expected.classes  # a space of the header's padding
        assert everything(source) == everything(expected)


def test_a_truncated_index_is_refused(copied):
    path = copied / shard_index.INDEX
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=re.escape(f"{path}: a damaged index")):
        ShardSource(copied)


def rewrite(root: Path, change) -> None:
    """Change an index's header and columns, with a checksum that is right."""
    path = root / shard_index.INDEX
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["header"])
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["crc32"]
    change(header, columns)
    header["crc32"] = shard_index._checksum(header, columns)
    path.write_bytes(safetensors.numpy.save(columns, {"header": json.dumps(header)}))


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/x.tar", "a/b.tar", "..", "", "x.zip", "a\0.tar"]
)
def test_an_index_that_names_files_elsewhere_is_refused(copied, name):
    def change(header, _columns):
        header["shards"][0][0] = name

    rewrite(copied, change)
    with pytest.raises(DataError, match="is not a shard's name"):
        ShardSource(copied)


CLAIMS = {
    "a shard that is not named": lambda header, columns: columns["shard"].__setitem__(0, 9),
    "beyond a shard's end": lambda header, columns: columns["block"].__setitem__(3, 99999),
    "no header before it": lambda header, columns: columns["block"].__setitem__(3, 0),
    "more images": lambda header, columns: header["starts"].__setitem__(-1, 15),
    "descending": lambda header, columns: header["starts"].__setitem__(1, 12),
    "fewer classes": lambda header, columns: header["classes"].pop(),
    "no columns": lambda header, columns: columns.clear(),
    "wide columns": lambda header, columns: columns.update(crc32=columns["crc32"].astype("u8")),
    "no numbers": lambda header, columns: header.update(starts=["a"]),
    "10^12 images": lambda header, columns: header["starts"].__setitem__(-1, 10**12),
    "a million classes": lambda header, columns: header.update(classes=["x"] * 10**6),
    "a shard of 10^40 bytes": lambda header, columns: header["shards"][0].__setitem__(1, 10**40),
    "true for a number": lambda header, columns: header["starts"].__setitem__(1, True),
    "text for a size": lambda header, columns: header["shards"][0].__setitem__(1, "5"),
    "a number for a class": lambda header, columns: header["classes"].__setitem__(0, 7),
    "scaled to below nothing": lambda header, columns: header.update(resized_to=-1),
    "no starts": lambda header, columns: header.update(starts=[]),
    "nothing": lambda header, columns: header.update(shards=None),
    "a later format": lambda header, columns: header.update(format="tar shards, 2"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_an_index_that_cannot_be_right_is_refused(copied, claim):
    rewrite(copied, CLAIMS[claim])
    with pytest.raises(DataError, match=re.escape(str(copied / shard_index.INDEX))):
        ShardSource(copied)


# ---------------------------------------------------------------------------------- ImageNet's size


def test_an_index_of_imagenets_size_opens_fast_and_is_small(tmp_path):
    images, classes, count = 1_281_167, 1000, 1024
    rng = np.random.default_rng(0)
    columns = {
        "shard": rng.integers(0, count, images).astype(np.uint16),
        "block": rng.integers(1, 300_000, images).astype(np.uint32),
        "size": rng.integers(1, 200_000, images).astype(np.uint32),
        "crc32": rng.integers(0, 1 << 32, images).astype(np.uint32),
    }
    tars = [Shard(f"train-{i:05d}.tar", 160_000_000, "0" * 64) for i in range(count)]
    for shard in tars:
        with open(tmp_path / shard.name, "wb") as file:
            file.truncate(shard.size)  # no room is taken
    starts = [*range(0, classes * 1281, 1281), images]
    names = [f"n{i:08d}" for i in range(classes)]
    shard_index.save(Index(tars, names, starts, columns, None), tmp_path)
    started = time.process_time()
    source = ShardSource(tmp_path)
    assert time.process_time() - started < 1
    held = [value for value in vars(source).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) + source.storage_order.nbytes < 24 << 20


# ---------------------------------------------------------------------------------- others' shards


def test_shards_in_timms_layout_are_indexed_as_they_lie(tmp_path):
    """cls, jpg, json in any order; numbering by label, then key; synsets from the json."""
    images = {key: encoded(seed) for seed, key in enumerate("abcd")}
    about = {
        0: b'{"filename": "n01440764/n01440764_1.JPEG", "label": 0}',
        1: b'{"filename": "n01443537/n01443537_7.JPEG", "label": 1}',
    }
    labels = {"d": 0, "a": 1, "c": 0, "b": 0}
    d, a, c, b = (sample(k, i, images[k], json=about[i]) for k, i in labels.items())
    write_tar(tmp_path / "imagenet1k-train-0000.tar", d + a)
    write_tar(tmp_path / "imagenet1k-train-0001.tar", (c + b)[::-1])
    source = index_here(tmp_path)
    assert source.classes == ["n01440764", "n01443537"]
    read = [source.read(i) for i in range(4)]
    assert read == [(images["b"], 0), (images["c"], 0), (images["d"], 0), (images["a"], 1)]


LONG = "folder-" * 12 + "/" + "key-" * 40


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("key", ["./a", "a/b", LONG, "ä/ü", "../../etc/passwd", "/abs/olute"])
def test_names_of_every_kind_are_only_names(tmp_path, form, key):
    root = tmp_path / "deep" / "shards"
    image = encoded(1)
    write_tar(root / "x-0.tar", sample(key, 0, image) + sample("z", 0, b"other"), form)
    source = index_here(root)
    found = [source.read(i)[0] for i in range(2)]
    assert sorted(found) == sorted([image, b"other"])
    name = source.name(found.index(image))
    assert name.startswith(f"{root}/x-0.tar: ")
    assert name.endswith(f"{key}.jpg") or key in (LONG, "ä/ü")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["deep", "shards", "x-0.tar", shard_index.INDEX]
    )


def test_a_name_cannot_steer_a_terminal(tmp_path):
    write_tar(tmp_path / "x-0.tar", sample("a\x1b[2J\nb", 0))
    assert index_here(tmp_path).name(0) == f"{tmp_path}/x-0.tar: a?[2J?b.jpg"


def test_folders_other_members_and_several_kinds_of_images_are_taken_as_they_are(tmp_path):
    files = {"b.PNG": b"png", "b.cls": b" 1\n", "b.seg.png": b"mask", "b.txt": b"?", ".x": b"-"}
    members = [*sample("a", 0), special("folder", tarfile.DIRTYPE), *files.items()]
    write_tar(tmp_path / "x-0.tar", members)
    source = index_here(tmp_path)
    assert [source.read(i) for i in range(2)] == [(b"image", 0), (b"png", 1)]
    assert source.classes == ["0", "1"]


X, Y = sample("x", 0), sample("y", 0)
SETS = {
    "no label": ([X, Y[1:]], "b-1.tar: key 'y': no label"),
    "no image": ([X, Y[:1]], "b-1.tar: key 'y': no image"),
    "two images": ([X, [*Y, ("y.png", b"")]], "b-1.tar: key 'y': two images (.jpg, .png)"),
    "twice in a shard": ([X, Y + Y], "b-1.tar: key 'y': has two members .cls"),
    "twice in all": ([X, X], "b-1.tar: key 'x': is in b-0.tar, too"),
    "a word": ([X, [("y.cls", b"cat"), Y[1]]], "b-1.tar: key 'y': .cls holds 'cat'"),
    "negative": ([X, [("y.cls", b"-1"), Y[1]]], "b-1.tar: key 'y': .cls holds '-1'"),
    "huge": ([X, [("y.cls", b"9" * 50), Y[1]]], "b-1.tar: key 'y': .cls holds '999"),
    "a gap": ([X, sample("y", 2)], "no image of class 1 (label 1)"),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_sample_that_is_none_is_refused_by_shard_and_key(tmp_path, kind):
    contents, words = SETS[kind]
    for i, members in enumerate(contents):
        write_tar(tmp_path / f"b-{i}.tar", members)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("kept", ["half an image", "no end", "a damaged header", "nothing", "gzip"])
def test_a_tar_that_is_not_whole_is_refused(tmp_path, kept):
    members = sample("x", 0, b"1" * 3000) + sample("y", 0, b"2" * 3000)
    path = write_tar(tmp_path / "b-0.tar", members)
    content = path.read_bytes()
    begin = content.index(b"2" * 3000)
    harmed = {
        "half an image": content[: begin + 1000],
        "no end": content[: begin + 3072],  # at the very end of the last member
        "a damaged header": content[: begin - 500] + b"\xff" + content[begin - 499 :],
        "nothing": b"",
        "gzip": b"\x1f\x8b" + content,
    }
    path.write_bytes(harmed[kept])
    assert refusal(tmp_path).startswith(f"{path}: not a whole tar archive")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_declares_gigabytes_is_not_read(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", sample("x", 0))
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 3 << 30
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    with pytest.raises(DataError, match=r"a name or attributes of 3,221,225,472 bytes"):
        scan(path)


def test_a_tar_that_goes_on_after_its_end_is_refused_before_it_is_read(tmp_path):
    path = write_tar(tmp_path / "b-0.tar", sample("x", 0))
    os.truncate(path, 1 << 40)
    assert "bytes after the archive's end" in refusal(tmp_path)


def test_a_chain_of_headers_in_a_tar_is_refused(tmp_path):
    """Each says that the next header's name is a long one, which follows."""
    long_name = special("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    long_name.size = 5
    link = long_name.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")
    (tmp_path / "b-0.tar").write_bytes(5000 * link + bytes(10240))
    assert refusal(tmp_path).startswith(f"{tmp_path}/b-0.tar: not a whole tar archive")


def test_links_in_a_tar_are_refused(tmp_path):
    write_tar(tmp_path / "b-0.tar", [*sample("x", 0), special("y.jpg", tarfile.SYMTYPE)])
    assert refusal(tmp_path) == f"{tmp_path}/b-0.tar: 'y.jpg' is not a plain file"


def test_shards_of_two_sets_in_a_folder_are_refused_with_the_way_out(tmp_path):
    write_tar(tmp_path / "imagenet1k-train-0000.tar", X)
    write_tar(tmp_path / "imagenet1k-validation-00.tar", Y)
    message = refusal(tmp_path)
    assert "several sets (imagenet1k-train-*, imagenet1k-validation-*)" in message
    assert f"ln -s {tmp_path}/imagenet1k-train-*.tar" in message


# ---------------------------------------------------------------------------------- class names


@pytest.fixture
def two_classes(tmp_path) -> Path:
    root = tmp_path / "two"
    write_tar(root / "v-0.tar", sample("n01440764_1", 0) + sample("val_2", 1))
    return root


def test_class_names_come_from_a_file_or_from_other_shards(two_classes, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("n01440764\nn01443537\n")
    assert index_here(two_classes, names).classes == ["n01440764", "n01443537"]
    other = tmp_path / "other"
    write_tar(other / "o-0.tar", X + sample("y", 1))
    assert index_here(other, two_classes).classes == ["n01440764", "n01443537"]


def test_classes_that_only_some_images_tell_are_numbers(two_classes):
    assert index_here(two_classes).classes == ["0", "1"]


LISTS = {
    "too short": ("n01440764\n", "has label 1, beyond the 1 classes given"),
    "too long": ("n01440764\nb\nc\n", "no image of class c (label 2)"),
    "shifted by one": ("background\nn01440764\n", "labelled 0 are of class n01440764, but"),
    "an empty line": ("n01440764\n\nb\n", "names.txt: expected class names, one a line"),
    "one twice": ("a\na\n", "names.txt: expected class names, one a line"),
    "nothing": ("", "names.txt: expected class names, one a line"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_class_names_that_do_not_fit_are_refused(two_classes, tmp_path, kind):
    text, words = LISTS[kind]
    (tmp_path / "names.txt").write_text(text)
    assert words in refusal(two_classes, tmp_path / "names.txt")


# ---------------------------------------------------------------------------------- resized


def test_larger_images_are_scaled_down_and_the_others_copied(tmp_path):
    sizes = {"large.jpg": (90, 60), "tall.png": (40, 130), "small.jpg": (50, 30)}
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i, (name, size) in enumerate(sizes.items()):
        content = encoded(i, "PNG" if name.endswith("png") else "JPEG", size)
        (tmp_path / "images" / "a" / name).write_bytes(content)
    originals = FolderSource(tmp_path / "images")
    options = Options("a", shorter_side=32)
    source = ShardSource(write_set(tmp_path / "images", tmp_path / "s", options))
    assert source.resized_to == 32
    opened = [Image.open(io.BytesIO(source.read(i)[0])) for i in range(3)]
    assert [image.size for image in opened] == [(48, 32), (50, 30), (32, 104)]
    assert source.read(1) == originals.read(1)
    large = Image.open(io.BytesIO(originals.read(0)[0])).resize((48, 32), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(large, int) - np.asarray(opened[0], int))
    assert difference.mean() < 12  # noise, as JPEG with coarser colours has it
    assert [name.rpartition(".")[2] for name in map(source.name, range(3))] == ["jpg"] * 3

    with pytest.raises(DataError, match=r"^VAL: .*shorter side of 32 px"):
        sources.refuse_resized(source, "VAL", "--option")
    write_shards(source, tmp_path / "again", Options("a"), 1, ignore)
    assert ShardSource(tmp_path / "again").resized_to == 32
    sources.refuse_resized(originals, "VAL", "--option")
    sources.refuse_resized(SyntheticSource(4, 2), "VAL", "--option")
