"""Every kind of file that the programs read: a sound one of each, and who reads it."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import h5py
import imagenet_forms
import imagenet_miniature
import mutants
import numpy as np
import small_meta
import torch
from drawn_weights import write_slim
from rude_server import answering, whole
from shard_makers import write_folder, write_set
from small_weights import write_small_weights
from written_runs import eval_line, train_line, write_run

import validate
from data import label_files, label_sets
from data.ilsvrc import ILSVRC2012
from data.prepare.shard_writer import Options
from data.shards import index as shard_index
from data.shards.object_store import ObjectStore
from data.shards.remote import Storage
from data.sources import FolderSource, open_source
from irv2 import cli, config_file
from irv2.engines import choose
from irv2.network import weights
from irv2.network.forms.base import WeightsError
from irv2.report import reference
from irv2.run import checkpoint
from irv2.run.logbook import Logbook
from scripts import inspect_checkpoint, make_shards, predict, prepare_imagenet, report
from scripts.benchmarks.range_server import serving

BLANK_LINE = b"\r\n\r\n"
STEP = "run/checkpoints/step-000000004"
FORMS = {
    "archives": imagenet_forms.write_archives_alone,
    "kaggle": imagenet_forms.write_kaggle_zip,
    "parquet": imagenet_forms.write_parquet,
    "wds": imagenet_forms.write_shards,
}
PICTURE = "images/zebra/1.jpg"
MANY_LINES = 20  # of programs that say all that is wrong at once

TIMM = {
    "architecture": "inception_resnet_v2",
    "num_classes": 3,
    "label_names": ["a", "b", "c"],
    "global_pool": "avg",
    "model_args": {"norm_eps": 0.001},
    "pretrained_cfg": {
        "input_size": [3, 75, 75],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "label_offset": 0,
    },
}

Reading = tuple[Any, ...]  # a program and its arguments


class Kind(NamedTuple):
    """A kind of file, and who reads it.

    read: a folder -> a program and its arguments. names: of which one must be told; default: the
    file's own. mend: makes checksums right that the change has made wrong. lines: the most that are
    said. things: may it be no file at all?
    """

    file: str
    changes: list[mutants.Mutate]
    read: Callable[[Path], Reading]
    names: tuple[str, ...] = ()
    mend: Callable[[Path], None] | None = None
    lines: int = 2
    things: bool = True


# ---------------------------------------------------------------------------------- sound files


def write_sound(root: Path) -> None:
    """Write a sound file of each kind."""
    lines = [train_line(step, grad_norm=1.0, data_wait=0.2) for step in range(1, 5)]
    settings = {"run": {"name": "a"}, "train": {"micro_batch": 4}, "optim": {"lr": 0.045}}
    run = write_run(root / "run", [*lines, eval_line(4, "ema", 50.0)], settings)
    (run / "validate.json").write_text(json.dumps(eval_line(4, "ema", 50.0)))
    state = weights.read(str(write_small_weights(root)))[0]
    torch.save({"state_dict": state}, root / "small.pth")
    arguments = argparse.Namespace(input_size=[3, 75, 75], mean=[0.5], interpolation="bicubic")
    averaged = {f"module.{name}": value for name, value in state.items()}
    content = {"arch": "x", "args": arguments, "state_dict": state, "state_dict_ema": averaged}
    torch.save(content, root / "last.pth")
    write_slim(root / "slim")
    (root / "timm").mkdir()
    shutil.copy(root / "small.safetensors", root / "timm" / "model.safetensors")
    (root / "timm" / "config.json").write_text(json.dumps(TIMM))
    about = small_meta.meta(4, classes=["a", "b", "c"])
    checkpoint.save(run / "checkpoints", 4, {"model": state, "ema": state}, about)
    write_folder(root / "images")
    write_set(root / "images", root / "shards", Options("images", images_per_shard=4))
    read_cached(root)
    for name in ("others", "unfinished"):
        shutil.copytree(root / "shards", root / name)
        (root / name / shard_index.INDEX).unlink()
    (root / "others" / shard_index.PLAN).unlink()
    names = sorted(path.name for path in (root / "images").iterdir())
    write_forms_of_imagenet(root / "imagenet")
    write_few_layers(root / "keras.h5")
    (root / "classes").write_text("\n".join(names))
    (root / "index.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (root / "subset").write_text("1.jpg\n2.png\n")
    (root / "labels").write_text("".join(f"{n}.jpg {names[n % 3]}\n" for n in range(9)))
    (root / "list").write_text("".join(f"{root / PICTURE}\n" for _ in range(3)))
    for number in range(1, 5):
        path = root / f"val/n01440764/ILSVRC2012_val_{number:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "real.json").write_text(json.dumps([[0], [], [0, 0], [0]]))
    published = root / "published"
    shutil.copytree(validate.REFERENCE.with_name("classes"), published / "classes")
    shutil.copy(validate.REFERENCE, published)
    shutil.copy(validate.REFERENCE.with_name("quickstart.yaml"), root / "config.yaml")
    (root / "fastest").write_text("openvino")
    (root / "answer").write_bytes(whole(b"content" * 20, "Content-Type: text/plain"))


def write_forms_of_imagenet(root: Path) -> None:
    """Write the miniature of ImageNet in each form, and the files that say its classes."""
    root.mkdir()
    for name, write in FORMS.items():
        (root / name).mkdir()
        write(root / name)
    (root / "labels").mkdir()
    imagenet_forms.write_label_files(root / "labels")


def write_few_layers(path: Path) -> None:
    """Write a file as Keras does, of two layers."""
    with h5py.File(path, "w") as file:
        for name, shape in {"conv2d/kernel:0": (3, 3, 3, 32), "conv2d/bias:0": (32,)}.items():
            file[f"conv2d/{name}"] = np.ones(shape, np.float32)


def sign(path: Path) -> None:
    """Write the checksums of a checkpoint anew."""
    files = [file for file in path.parent.iterdir() if file.name != checkpoint.SUMS]
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path.parent / checkpoint.SUMS).write_text(checkpoint._sums_text(sums))


# ---------------------------------------------------------------------------------- readers


def asking(function: Callable, *arguments: Any) -> Reading:
    """Make a program of a function."""

    def body() -> int:
        function(*arguments)
        return 0

    return (SimpleNamespace(__file__="fuzz.py", main=cli.program(body)),)


def go_on(run: Path) -> None:
    log = Logbook(run, step=4, total_steps=6)
    log.best_top1()
    log.close()


def label_set(root: Path, function: Callable, file: str, *classes: Any) -> None:
    """Apply a file to the evaluation of a folder's images."""
    source = FolderSource(root)
    if classes:
        function(source, str(root), *classes, root.parent / file)
    else:
        labels = label_sets.from_folders(source, "x", source.classes, len(source.classes), "net")
        function(labels, source, root.parent / file)


def open_served(root: Path) -> None:
    """Open the shards of a folder from a server."""
    with serving(root) as url:
        open_source(url, Storage(timeout_s=5))


def read_cached(root: Path) -> None:
    """Read every image of a folder's shards from a server, or from a cache of them."""
    with serving(root / "shards") as url:
        served = open_source(url, Storage(str(root / "cache"), timeout_s=5))
        there = FolderSource(root / "images")
        for index in range(len(there)):
            assert served.read(index) == there.read(index)


def read_keras(path: Path) -> None:
    """Read a file of Keras' that has too few layers."""
    try:
        weights.read(str(path))
    except WeightsError as error:
        if "not Keras' Inception-ResNet-v2" not in str(error):
            raise


def prepared(file: str, changes: list[mutants.Mutate]) -> Kind:
    """A file of a form of ImageNet, of which folders are made."""
    main = partial(prepare_imagenet.main, expected=imagenet_miniature.expected())
    program, (form, *_) = (
        SimpleNamespace(__file__="prepare_imagenet.py", main=main),
        Path(file).parts,
    )

    def reading(at: Path) -> Reading:
        out = at / "prepared"
        return program, "--from", at / "imagenet" / form, "--out", out, "--skip-md5"

    names = (form, "prepared")  # of what one of several files does not hold
    return Kind(f"imagenet/{file}", changes, reading, names, lines=MANY_LINES)


def ask_for(path: Path) -> None:
    """Ask a server whose answers are a file, byte by byte."""

    def answer(method: str, _path: str) -> Iterator[bytes]:
        content = path.read_bytes()
        yield content if method == "GET" else content.partition(BLANK_LINE)[0] + BLANK_LINE

    with answering(answer) as url:
        store = ObjectStore(url, 0.2)
        store.read("answer", 1000)
        store.sizes(["answer"])


def of_weights(at: Path, *weights_of: Any) -> Reading:
    return predict, at / PICTURE, *weights_of


def of_pictures(at: Path, *pictures: Any) -> Reading:
    return predict, *pictures, "--weights", at / "small.safetensors"


def shards_of(at: Path, *arguments: Any) -> Reading:
    return make_shards, *arguments, "--workers", 1


def label_file(file: str, through: str = "") -> Kind:
    """A file that says images' classes, or that one `through` which it is read needs."""
    file, names = f"imagenet/labels/{file}", (file, through) if through else (file,)
    return Kind(
        file,
        mutants.BYTES,
        lambda at: asking(label_files.read, at / "imagenet" / "labels" / names[-1]),
        names,
    )


KINDS = {
    "config, reported by key": Kind(
        "config.yaml",
        mutants.YAML,
        lambda at: asking(config_file.load, at / "config.yaml"),
        ("",),
        lines=100,
        things=False,
    ),
    "config.yaml of a run": Kind("run/config.yaml", mutants.YAML, lambda at: (report, at / "run")),
    "validate.json": Kind("run/validate.json", mutants.JSON, lambda at: (report, at / "run")),
    "log.jsonl, in report.py": Kind(
        "run/log.jsonl", mutants.JSON_LINES, lambda at: (report, at / "run", "--out", at / "page")
    ),
    "log.jsonl, gone on with": Kind(
        "run/log.jsonl", mutants.JSON_LINES, lambda at: asking(go_on, at / "run")
    ),
    "meta.json, in inspect_checkpoint.py": Kind(
        f"{STEP}/meta.json", mutants.JSON, lambda at: (inspect_checkpoint, at / STEP), mend=sign
    ),
    "meta.json, in predict.py": Kind(
        f"{STEP}/meta.json",
        mutants.JSON,
        lambda at: of_weights(at, "--run", at / "run"),
        ("step-000000004",),
        sign,
    ),
    "SHA256SUMS": Kind(
        f"{STEP}/SHA256SUMS",
        mutants.LINES,
        lambda at: (inspect_checkpoint, at / STEP),
        ("step-000000004",),
    ),
    "part of a checkpoint": Kind(
        f"{STEP}/ema.safetensors",
        mutants.SAFETENSORS,
        lambda at: of_weights(at, "--run", at / "run"),
        ("step-000000004",),
        sign,
    ),
    "weights, .safetensors": Kind(
        "small.safetensors",
        mutants.SAFETENSORS,
        lambda at: of_weights(at, "--weights", at / "small.safetensors"),
    ),
    "weights, .pth": Kind(
        "small.pth", mutants.BYTES, lambda at: asking(weights.read, str(at / "small.pth"))
    ),
    "checkpoint of a trainer": Kind(
        "last.pth", mutants.TORCH, lambda at: asking(weights.read, str(at / "last.pth"))
    ),
    "checkpoint of TensorFlow": Kind(
        "slim/model.ckpt.index",
        mutants.BYTES,
        lambda at: asking(weights.read, str(at / "slim" / "model.ckpt")),
        ("model.ckpt",),
    ),
    "config.json of timm": Kind(
        "timm/config.json",
        mutants.JSON,
        lambda at: of_weights(at, "--weights", at / "timm"),
        ("timm",),
    ),
    "picture": Kind(PICTURE, mutants.BYTES, lambda at: of_pictures(at, at / PICTURE)),
    "list of pictures": Kind(
        "list",
        mutants.LINES,
        lambda at: of_pictures(at, "--files-from", at / "list"),
        ("",),
        lines=10**6,
        things=False,
    ),
    "index of shards": Kind(
        "shards/index.safetensors",
        mutants.SAFETENSORS,
        lambda at: shards_of(at, "--verify", at / "shards"),
        ("shards",),
    ),
    "index of shards, over HTTP": Kind(
        "shards/index.safetensors",
        mutants.SAFETENSORS,
        lambda at: asking(open_served, at / "shards"),
        ("index.safetensors", "images-0"),
        things=False,
    ),
    "answer of an HTTP server": Kind(
        "answer", mutants.BYTES, lambda at: asking(ask_for, at / "answer"), things=False
    ),
    "shard": Kind(
        "others/images-00000.tar",
        mutants.TAR,
        lambda at: shards_of(at, "--index", at / "others"),
        ("others",),
    ),
    "plan of shards": Kind(
        "unfinished/plan.json",
        mutants.JSON,
        lambda at: shards_of(
            at, at / "images", "--out", at / "unfinished", "--images-per-shard", 4
        ),
        ("unfinished",),
    ),
    "list of classes": Kind(
        "classes",
        mutants.LINES,
        lambda at: shards_of(at, "--index", at / "others", "--classes", at / "classes"),
        ("classes", "others"),
    ),
    "published results": Kind(
        "published/reference.yaml",
        mutants.YAML,
        lambda at: asking(reference.read, at / "published" / "reference.yaml"),
    ),
    "class index": Kind(
        "index.json",
        mutants.JSON,
        lambda at: asking(
            label_set, at / "images", label_sets.from_class_index, "index.json", None, 3
        ),
    ),
    "ReaL labels": Kind(
        "real.json",
        mutants.JSON,
        lambda at: asking(label_set, at / "val", label_sets.with_real_labels, "real.json"),
    ),
    "subset": Kind(
        "subset",
        mutants.LINES,
        lambda at: asking(label_set, at / "images", label_sets.only, "subset"),
    ),
    "labels": Kind("labels", mutants.LINES, lambda at: asking(label_files.read, at / "labels")),
    "labels of Kaggle": label_file("LOC_val_solution.csv"),
    "labels of torchvision": label_file("meta.bin"),
    "classes of the development kit": label_file(
        "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
    ),
    "development kit": prepared(f"archives/{ILSVRC2012.devkit.name}", mutants.TAR_GZ),
    "archive of validation images": prepared(f"archives/{ILSVRC2012.val.name}", mutants.TAR),
    "archive of archives": prepared(f"archives/{ILSVRC2012.train.name}", mutants.TAR),
    "zip of Kaggle": prepared("kaggle/imagenet-object-localization-challenge.zip", mutants.ZIP),
    "parquet file": prepared("parquet/data/validation-00000-of-00002.parquet", mutants.PARQUET),
    "shard of timm": prepared("wds/imagenet1k-validation-0000.tar", mutants.TAR),
    "weights of Keras": Kind(
        "keras.h5", mutants.BYTES, lambda at: asking(read_keras, at / "keras.h5")
    ),
    "image in the cache of shards": Kind(
        "cache/00/*-0", mutants.BYTES, lambda at: asking(read_cached, at)
    ),
    "room of the cache of shards": Kind(
        "cache/00/.tally", mutants.BYTES, lambda at: asking(read_cached, at), things=False
    ),
    "fastest engine": Kind(
        "fastest", mutants.BYTES, lambda at: asking(choose._remembered, at / "fastest")
    ),
}
