"""The miniature of ImageNet in each form in which people have it; no two list it in one order."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import torch
from imagenet_miniature import IDS, VAL_IDS, devkit_files, train_images, val_images, write_archives
from pyarrow import parquet
from shard_makers import sample
from tars import tar

VAL_SYNSETS = [IDS[i] for i in VAL_IDS]
DATA = "ILSVRC/Data/CLS-LOC"
INNER = "imagenet_object_localization_patched2019.tar.gz"


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def solution() -> bytes:
    """LOC_val_solution.csv: of each image the class and box of all that is in it."""
    rows = [
        f"ILSVRC2012_val_{i:08d}," + f"{synset} 85 1 499 272 " * (1 + i % 2)
        for i, synset in enumerate(VAL_SYNSETS, 1)
    ]
    return "\n".join(["ImageId,PredictionString", *rows[::-1]]).encode()


def kaggle_tree() -> dict[str, bytes]:
    """Files of the folder ILSVRC, images and others."""
    files = {
        f"{DATA}/train/{synset}/{name}": content
        for synset, images in reversed(train_images().items())
        for name, content in images
    }
    files |= {f"{DATA}/val/{name}": content for name, content in val_images()}
    return files | {
        f"{DATA}/test/ILSVRC2012_test_00000001.JPEG": b"test",
        "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": b"<annotation>",
        "ILSVRC/Annotations/CLS-LOC/train/n02119789/n02119789_7.xml": b"<annotation>",
        "ILSVRC/ImageSets/CLS-LOC/val.txt": b"ILSVRC2012_val_00000001 1",
    }


def kaggle_beside() -> dict[str, bytes]:
    """Files beside the folder ILSVRC."""
    return {"LOC_val_solution.csv": solution(), "LOC_synset_mapping.txt": b"n02119789 kit fox"}


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip archive, its files stored and deflated in turn."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("ILSVRC")
        for i, (name, content) in enumerate(files.items()):
            archive.writestr(name, content, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
    return buffer.getvalue()


def write_archives_alone(folder: Path) -> Path:
    write_archives(folder)
    return folder


def write_kaggle_zip(folder: Path) -> Path:
    files = {"imagenet-object-localization-challenge.zip": zipped(kaggle_tree() | kaggle_beside())}
    return write_files(folder, files)


def write_kaggle_zip_of_tar(folder: Path) -> Path:
    files = {INNER: tar(kaggle_tree().items(), "w:gz"), **kaggle_beside()}
    return write_files(folder, {"any.zip": zipped(files)}) / "any.zip"


def write_kaggle_tar(folder: Path) -> Path:
    return write_files(folder, {INNER: tar(kaggle_tree().items(), "w:gz"), **kaggle_beside()})


def write_kaggle_tree(folder: Path) -> Path:
    return write_files(folder, kaggle_tree() | kaggle_beside())


def write_kaggle_data(folder: Path) -> Path:
    """The tree without what Kaggle has beside it, and the devkit's labels."""
    kit = {name: content for name, content in devkit_files().items() if "blacklist" not in name}
    return write_files(folder, kaggle_tree() | kit) / DATA


def parquet_file(rows: list[tuple[str | None, bytes, int]]) -> bytes:
    """As Hugging Face's `datasets` writes them: two images in a row group, and a schema's names."""
    feature = {"names": [f"thing {i}, object {i}" for i in range(4)], "_type": "ClassLabel"}
    features = {"features": {"image": {"_type": "Image"}, "label": feature}}
    images = [{"bytes": content, "path": name} for name, content, _ in rows]
    table = pa.table({"image": images, "label": [label for *_, label in rows]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, row_group_size=2)
    return buffer.getvalue()


def parquet_rows() -> dict[str, list[tuple[str, bytes, int]]]:
    """Name, bytes and label of the images of each split, which lie in no order."""
    places = {synset: place for place, synset in enumerate(sorted(IDS.values()))}
    train = [
        (f"{name.removesuffix('.JPEG')}_{synset}.JPEG", content, places[synset])
        for synset, images in train_images().items()
        for name, content in images
    ]
    val = []
    for name, content in val_images():
        synset = VAL_SYNSETS[int(name[-13:-5]) - 1]
        val.append((name.replace(".", f"_{synset}."), content, places[synset]))
    return {"train": train[::3] + train[1::3] + train[2::3], "validation": val}


def write_parquet(folder: Path) -> Path:
    files = {"README.md": b"---", "data/test-00000-of-00001.parquet": parquet_file([])}
    for split, rows in parquet_rows().items():
        for number, part in enumerate((rows[:5], rows[5:])):
            files[f"data/{split}-{number:05d}-of-00002.parquet"] = parquet_file(part)
    return write_files(folder, files)


def write_shards(folder: Path) -> Path:
    """As timm/imagenet-1k-wds has them: shards of both splits in one folder, keys as files."""
    files = {"README.md": b"---", "_info.json": b"{}"}
    for split, rows in parquet_rows().items():
        for number, part in enumerate((rows[:5], rows[5:])):
            members = []
            for name, content, label in part:
                stem, synset = name.removesuffix(".JPEG").rsplit("_", 1)
                about = {"filename": f"{synset}/{stem}.JPEG", "label": label}
                members += sample(stem, label, content, json=json.dumps(about).encode())
            files[f"imagenet1k-{split}-{number:04d}.tar"] = tar(members)
    return write_files(folder, files)


FORMS: dict[str, Callable[[Path], Path]] = {
    "the original archives": write_archives_alone,
    "Kaggle's zip": write_kaggle_zip,
    f"Kaggle's zip with {INNER} in it": write_kaggle_zip_of_tar,
    "Kaggle's tar": write_kaggle_tar,
    "Kaggle's tree": write_kaggle_tree,
    "Kaggle's tree, no CSV": write_kaggle_data,
    "Hugging Face's parquet files": write_parquet,
}


# ---------------------------------------------------------------------------------- labels


def write_flat(folder: Path, added: bool = False) -> Path:
    """Validation images in one folder, if asked with Hugging Face's names."""
    files = dict(val_images())
    if added:
        files = {
            name.replace(".", f"_{VAL_SYNSETS[int(name[-13:-5]) - 1]}."): content
            for name, content in files.items()
        }
    return write_files(folder, files)


def meta_bin() -> bytes:
    """Write what torchvision writes after reading the development kit."""
    buffer = io.BytesIO()
    torch.save((dict.fromkeys(IDS.values(), ("thing", "object")), VAL_SYNSETS), buffer)
    return buffer.getvalue()


def write_label_files(folder: Path) -> dict[str, Path]:
    """Files that say of which class each validation image is, by what they are."""
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 9)]
    pairs = list(zip(names, VAL_SYNSETS))
    files = {
        "ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in VAL_IDS).encode(),
        "meta.mat": devkit_files()["meta.mat"],
        "LOC_val_solution.csv": solution(),
        "meta.bin": meta_bin(),
        "spaces.txt": "".join(f"{name}.JPEG {synset}\n" for name, synset in pairs[::-1]).encode(),
        "tabs.txt": "".join(f"val/{name}.JPEG\t{synset}\n" for name, synset in pairs).encode(),
        "commas.csv": "".join(f"{name},{synset}\n" for name, synset in pairs).encode(),
    }
    write_files(folder, files)
    return {name: folder / name for name in files if name != "meta.mat"}
