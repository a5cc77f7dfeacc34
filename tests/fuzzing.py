"""Every kind of file that the programs read, changed at random, and what must hold of each change.

A mutant lies in a fresh copy of a folder of sound files, and is read by the program that reads such
a file or by the function in which it does. That must end within SECONDS and take less than MEMORY:
as if nothing were wrong, or with status 1 and a line that names the file. Nothing outside of the
folder may change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mutants
import small_meta
import torch
from calling import Called, call
from drawn_weights import write_slim
from rude_server import answering, whole
from shard_makers import write_folder, write_set
from small_weights import write_small_weights
from written_runs import eval_line, train_line, write_run

import validate
from data import label_files, label_sets
from data.prepare.shard_writer import Options
from data.shards import index as shard_index
from data.shards import object_store
from data.shards.object_store import ObjectStore
from data.shards.remote import Storage
from data.sources import FolderSource, open_source
from irv2 import cli, config_file
from irv2.network import weights
from irv2.report import reference
from irv2.run import checkpoint
from irv2.run.logbook import Logbook
from scripts import inspect_checkpoint, make_shards, predict, report
from scripts.benchmarks.range_server import serving

SECONDS, MEMORY = 20, 1 << 30
LONGEST = 10_000  # characters of what is said of a file
BLANK_LINE = b"\r\n\r\n"
STEP = "run/checkpoints/step-000000004"
PICTURE = "images/zebra/1.jpg"

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
    for name in ("others", "unfinished"):
        shutil.copytree(root / "shards", root / name)
        (root / name / shard_index.INDEX).unlink()
    (root / "others" / shard_index.PLAN).unlink()
    names = sorted(path.name for path in (root / "images").iterdir())
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
    (root / "answer").write_bytes(whole(b"content" * 20, "Content-Type: text/plain"))


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
}


# ---------------------------------------------------------------------------------- one mutant


class Late(BaseException):
    """A reader that takes longer than it may."""


@contextmanager
def deadline() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mutate(kind: Kind, path: Path, rng: random.Random) -> str:
    """Change a file; returns the change's name."""
    content = path.read_bytes()
    path.unlink()  # other copies may share it
    if kind.things and rng.random() < 0.1:
        thing = rng.choice(mutants.THINGS)
        thing(path)
        return thing.__name__
    change = rng.choice(kind.changes)
    path.write_bytes(change(content, rng))
    if kind.mend is not None and rng.random() < 0.9:
        kind.mend(path)
    return change.__name__


def copied(source: str, target: str) -> str:
    """Copy a small file; share a large one, which no program changes in place."""
    return (os.link if os.path.getsize(source) > 1 << 16 else shutil.copy2)(source, target)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of everything in a folder."""
    found = [(str(path), path.lstat()) for path in sorted(folder.rglob("*"))]
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found}


def fault_of(kind: Kind, called: Called) -> str:
    """Describe what is wrong with a reader's words; empty if nothing is."""
    lines, said = called.err.splitlines(), called.out + called.err
    if called.status not in (0, 1):
        return f"status {called.status}"
    if not all(character.isprintable() or character in "\n\t" for character in said):
        return "control characters"
    if called.status == 0:
        return ""
    names = kind.names or (Path(kind.file).name,)
    if not any(name in called.err for name in names):
        return "the file is not named"
    if not 1 <= len(lines) <= kind.lines or max(map(len, lines)) > LONGEST:
        return f"{len(lines)} lines, the longest of {max(map(len, lines), default=0)} characters"
    return ""


def read(kind: Kind, at: Path) -> tuple[int | None, str]:
    """Read the file of a folder; returns the status and what is wrong."""
    try:
        with deadline():
            called = call(*kind.read(at))
    except Late:
        return None, f"took more than {SECONDS} s"
    except BaseException:
        return None, traceback.format_exc()
    fault = fault_of(kind, called)
    return called.status, f"{fault}: {called.err[-2000:]}" if fault else ""


class Tally(NamedTuple):
    """Outcomes of the mutants of a kind."""

    read: int  # as if nothing were wrong
    refused: int
    slowest_s: float
    memory_mib: float  # more than before
    faults: list[str]


def run(kind: Kind, root: Path, seed: str, count: int) -> Tally:
    """Try mutants of a kind; `root`: the sound files, with a folder beside them to work in."""
    rng, statuses, faults, slowest = random.Random(seed), [], [], 0.0
    object_store.FIRST_PAUSE_S = 0.02
    work, memory = root.with_name("work"), peak()
    before = state_of(root)
    for number in range(-1, count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root, work, copy_function=copied)
        if number < 0:
            if (sound := call(*kind.read(work))).status != 0:
                faults.append(f"the sound file: {sound.err}")
            continue
        change = mutate(kind, work / kind.file, rng)
        started, grown = time.perf_counter(), peak()
        status, fault = read(kind, work)
        slowest = max(slowest, time.perf_counter() - started)
        statuses.append(status)
        if not fault and peak() - grown > MEMORY:
            fault = f"took {(peak() - grown) >> 20} MiB"
        if not fault and state_of(root) != before:
            fault = "changed other files"
        if fault:
            faults.append(f"mutant {number} ({change}): {fault}")
    used = (peak() - memory) / (1 << 20)
    return Tally(statuses.count(0), statuses.count(1), slowest, used, faults)


def peak() -> int:
    """The most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main(folder: str, seed: int, count: int) -> None:
    """Print a line of JSON for each kind."""
    root = Path(folder) / "sound"
    root.mkdir()
    write_sound(root)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, resource.RLIM_INFINITY))
    for name, kind in KINDS.items():
        tally = run(kind, root, f"{seed} {name}", count)
        print(json.dumps({"kind": name, **tally._asdict()}), flush=True)
