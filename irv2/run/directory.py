"""The directory of a run, file by file.

runs/<name>/config.yaml             every key spelled out, with git revision and versions
runs/<name>/log.jsonl               a line per logged step and per evaluation
runs/<name>/tensorboard/            the same, for TensorBoard
runs/<name>/tracked                 the run's id for other trackers, with log.to
runs/<name>/checkpoints/            the newest states to resume from
runs/<name>/bad_images.jsonl        images that training could not use, if there were any
runs/<name>/profile/                traces of the steps of log.profile, by rank
runs/<name>/ledger/                 the images of every step, by rank, with log.ledger=true
runs/<name>/best.safetensors        weights of the best evaluation, timm's names
"""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
import torchvision
import yaml

from data import files
from data.files import open_own, remove_leftovers, write_atomically
from irv2 import strict_yaml
from irv2.run import checkpoint, jsonl
from irv2.run.checkpoint import CheckpointError
from irv2.run.jsonl import JsonLines
from irv2.training.distributed import World, WorldError

BEST = "best.safetensors"
STORE, LEDGER, TENSORBOARD = "checkpoints", "ledger", "tensorboard"
APPEARS_WITHIN_S = 10.0  # what a host writes is visible to the others; NFS takes its time


def lock(directory: Path) -> BinaryIO:
    """Make the run directory and lock it for this process, as long as the result stays open.

    Raises CheckpointError where another process is at work in it, and for links within it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_links(directory)
    file = open_own(directory / ".lock", "rb+")
    if reason := files.lock(file, "another train.py is at work in it"):
        file.close()
        raise CheckpointError(f"{directory}: {reason}")
    remove_leftovers(directory)
    return file


def _refuse_links(directory: Path) -> None:
    """Raise CheckpointError for links by which a run could change files that are not its own."""
    if directory.is_symlink() and directory.lstat().st_uid not in (0, os.geteuid()):
        raise CheckpointError(f"{directory}: a link of another user's; choose another run.dir")
    for name in (STORE, LEDGER, TENSORBOARD):
        if (directory / name).is_symlink():
            raise CheckpointError(
                f"{directory / name}: a symbolic link; remove it, and if a run is to lie elsewhere "
                "set run.dir"
            )


def check_shared(directory: Path, world: World) -> None:
    """Raise WorldError, on all ranks, unless all of them see rank 0's directory under this path.

    A rank with a directory of its own would start from zero, or resume from something else. Rank 0
    leaves a mark in its directory, which the others must find in time.
    """
    if world.size == 1:
        return
    mark = directory / f".mark-{world.gather([secrets.token_hex(8)])[0]}"
    if world.is_main:
        mark.touch()
    world.gather([])  # the mark is there
    deadline = time.monotonic() + APPEARS_WITHIN_S
    while not (is_seen := _is_listed(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    blind = world.gather([] if is_seen else [f"rank {world.rank} (host {platform.node()})"])
    if world.is_main:
        mark.unlink()
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        raise WorldError(
            f"{directory}: {blind[0]}{more} sees another directory there than rank 0, or none; put "
            "it on a file system that all hosts share, mounted at the same path on each"
        )


def _is_listed(path: Path) -> bool:
    """True if a file is in its folder. Listing makes NFS look again; a lookup by name may not."""
    try:
        return path.name in os.listdir(path.parent)
    except OSError:
        return False


def checkpoints(directory: Path) -> list[Path]:
    """List a run's checkpoints, oldest first."""
    return checkpoint.list_all(directory / STORE)


def set_aside_unusable(directory: Path, step: int) -> None:
    """Rename the unusable checkpoints after the one of `step`, so that they no longer count."""
    for path in checkpoints(directory):
        if checkpoint.step_of(path) > step:
            names = (f"{path.name}.unusable{n}" for n in ("", *map(str, range(2, 10**6))))
            path.rename(next(n for n in map(path.with_name, names) if not n.exists()))


# ------------------------------------------------------------------------- config.yaml


def config_text(config: dict[str, Any]) -> str:
    """Return a resolved config as YAML, below the revision and versions it runs on."""
    versions = ", ".join(f"{name} {version}" for name, version in software().items())
    body = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return f"# git {_git_revision()}\n# {versions}\n{body}"


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write config.yaml into the run directory."""
    write_atomically(directory / "config.yaml", config_text(config))


def micro_batch_before(directory: Path) -> int | None:
    """Micro-batch with which the run was last started; None if it was not."""
    try:
        config = strict_yaml.load(directory / "config.yaml")
        micro_batch = config["train"]["micro_batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return micro_batch if type(micro_batch) is int and micro_batch > 0 else None


def software() -> dict[str, str]:
    """Versions of the software that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def _git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    here = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


# ------------------------------------------------------------------------- ledger


def open_ledger(
    directory: Path, rank: int, world_size: int, step: int, say: Callable[[str], None]
) -> JsonLines:
    """Open a rank's file of the images of every step, in a run that stands at `step`."""
    folder = directory / LEDGER
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        current = {f"rank-{other}.jsonl" for other in range(world_size)}
        for path in folder.glob("rank-*.jsonl"):
            if path.name not in current:  # of a rank that no longer exists
                jsonl.cut_back(path, step)
    return JsonLines(folder / f"rank-{rank}.jsonl", step, say)
