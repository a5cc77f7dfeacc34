"""The checkpoints of a run: written whole or not at all, found by looking.

A checkpoint is written under a temporary name, flushed to disk and renamed, so a crash leaves
either the old set of files or the new one. Loading executes nothing (`weights_only=True`).
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

_NAME = re.compile(r"step-(\d{9})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Create or replace a file so that it is never seen half-written, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save(directory: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state of a step and remove all but the newest `keep` checkpoints.

    Raises CheckpointError, with nothing removed, if it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:09d}.pt"
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # the latter is how torch tells of a full disk
        raise CheckpointError(f"{path}: cannot be written ({error})") from None
    leftovers = directory.glob(".step-*.pt.tmp")  # of saves that were killed
    for old in (*found(directory)[:-keep], *leftovers):
        old.unlink()
    return path


def found(directory: Path) -> list[Path]:
    """The checkpoints of a directory, oldest first."""
    return sorted(p for p in directory.glob("step-*.pt") if _NAME.fullmatch(p.name))


def step_of(path: Path) -> int:
    """The step a checkpoint's name states. Raises CheckpointError for any other name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path}: not a checkpoint's name (step-000001234.pt)")
    return int(match[1])


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        return read_tensors(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, onto the CPU, without executing anything in the file.

    Raises ValueError, without the path, if it is damaged or holds more than tensors and numbers.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load compares no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("not a file of tensors and numbers only; nothing in it was run") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"damaged or not a PyTorch file ({reason})") from None
