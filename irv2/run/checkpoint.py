"""The durable store of a run: checkpoints that are written whole or not at all.

A checkpoint is a folder, `step-000001234/`: a safetensors file for each part of the state,
`meta.json` for everything that is not a tensor, and `SHA256SUMS` over them, which `sha256sum -c`
reads too. It is written under a hidden name, flushed to disk and renamed, so that a crash leaves
either the old set of checkpoints or the new one. Reading compares every byte that it uses with
its checksum and executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from data.errors import UserError, panics_as_errors
from data.files import NotAFileError, read_regular, sync_folder, write_through
from irv2.run.meta import Meta, parse_meta

Parts = dict[str, dict[str, Tensor]]

META, SUMS = "meta.json", "SHA256SUMS"
_NAME = re.compile(r"step-(\d{9})")
_HIDDEN = re.compile(r"\.step-\d{9}\.(new|old)")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: named tensors by part, on the CPU, the rest, and file -> SHA-256."""

    path: Path
    parts: Parts
    meta: Meta
    sums: dict[str, str]


# ---------------------------------------------------------------------------------- writing


def save(directory: Path, step: int, parts: Parts, meta: dict[str, Any]) -> Path:
    """Write the checkpoint of a step; an unusable one of the same step is replaced.

    Raises CheckpointError, with every other checkpoint as it was, if it cannot be written.
    """
    path = directory / f"step-{step:09d}"
    new, old = (directory / f".{path.name}.{age}" for age in ("new", "old"))
    try:
        if not directory.exists():
            directory.mkdir(parents=True)
            sync_folder(directory.parent)
        _remove_leftovers(directory)
        new.mkdir()
        sums = {}
        for name, content in _files(parts, meta):
            sums[name] = hashlib.sha256(content).hexdigest()
            write_through(new / name, content)
        write_through(new / SUMS, _sums_text(sums))
        sync_folder(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync_folder(directory)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise CheckpointError(f"{path}: cannot be written ({error})") from None
    shutil.rmtree(old, ignore_errors=True)
    return path


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, once two of those (or one, if `keep` is 1) read
    back whole; until then also keep older ones."""
    newest_first = list_all(directory)[::-1]
    if len(newest_first) <= keep:
        return
    wanted = min(keep, 2)
    for i, path in enumerate(newest_first):
        if wanted > 0 and is_whole(path):
            wanted -= 1
        elif wanted == 0 and i >= keep:
            hidden = path.with_name(f".{path.name}.old")
            path.rename(hidden)  # so that one that is half removed is never listed
            shutil.rmtree(hidden, ignore_errors=True)


def _files(parts: Parts, meta: dict[str, Any]) -> Iterable[tuple[str, bytes]]:
    """(name, content) of a checkpoint's files, one in memory at a time."""
    for part, tensors in parts.items():
        yield f"{part}.safetensors", safetensors.torch.save(tensors)
    yield META, (json.dumps({**meta, "parts": list(parts)}, indent=1) + "\n").encode()


def _sums_text(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def _remove_leftovers(directory: Path) -> None:
    """Remove what killed saves and removals have left behind."""
    for path in directory.iterdir():
        if _HIDDEN.fullmatch(path.name):
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------- reading


def list_all(directory: Path) -> list[Path]:
    """List the checkpoints of a directory, oldest first.

    Raises OSError for a directory that is there but cannot be listed: it must not look empty.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(directory / name for name in names if _NAME.fullmatch(name))


def step_of(path: Path) -> int:
    """The step a checkpoint's name states. Raises CheckpointError for any other name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: not a checkpoint's name (step-000001234)")
    return int(match[1])


def load(path: Path, only: Iterable[str] | None = None) -> Checkpoint:
    """Read a checkpoint, or `only` some of its parts, comparing what is read with its checksums.

    Raises CheckpointError if it is missing or anything in it is damaged, OSError if it cannot be
    read now.
    """
    if not path.is_dir():
        words = "a file, not a checkpoint's folder" if path.exists() else "no such checkpoint"
        raise CheckpointError(f"{path}: {words}")
    sums = _read_sums(path)
    meta = _read_meta(path, sums)
    names = meta["parts"] if only is None else only
    parts = {}
    for part in names:
        content = _read(path, f"{part}.safetensors", sums)
        try:
            with panics_as_errors():
                parts[part] = safetensors.torch.load(content)
        except Exception as error:  # safetensors has its own types of errors
            raise CheckpointError(f"{path}: {part} cannot be read ({error})") from None
    return Checkpoint(path, parts, meta, sums)


def is_whole(path: Path) -> bool:
    """True if every byte of a checkpoint is as it was saved."""
    try:
        sums = _read_sums(path)
        for part in _read_meta(path, sums)["parts"]:
            _read(path, f"{part}.safetensors", sums)
    except CheckpointError:
        return False
    return True


def _read_sums(path: Path) -> dict[str, str]:
    content = _read_file(path, SUMS)
    lines = content.decode("utf-8", "replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not sums or _sums_text(sums).encode() != content:
        raise CheckpointError(f"{path}: {SUMS} is damaged")
    return sums


def _read_meta(path: Path, sums: dict[str, str]) -> Meta:
    content = _read(path, META, sums)
    try:
        meta = parse_meta(content, step_of(path) if _NAME.fullmatch(path.name) else None)
    except ValueError as error:
        raise CheckpointError(f"{path}: {META} is not train.py's ({error})") from None
    if set(sums) != {META, *(f"{part}.safetensors" for part in meta["parts"])}:
        raise CheckpointError(f"{path}: {SUMS} does not name the parts that {META} names")
    return meta


def _read(path: Path, name: str, sums: dict[str, str]) -> bytes:
    """Read a file of a checkpoint. Raises CheckpointError if it is not what was saved."""
    content = _read_file(path, name)
    if hashlib.sha256(content).hexdigest() != sums.get(name):
        raise CheckpointError(f"{path}: {name} does not match its SHA-256")
    return content


def _read_file(path: Path, name: str) -> bytes:
    try:
        return read_regular(path / name)
    except MemoryError:
        raise CheckpointError(f"{path}: {name} is larger than the memory here") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, NotAFileError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror})") from None
