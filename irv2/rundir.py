"""What a run leaves behind: its resolved config and its checkpoints, and where to go on from.

runs/<name>/config.yaml             every key spelled out, with git revision and versions
runs/<name>/log.jsonl               a line per logged step and per evaluation
runs/<name>/tensorboard/            the same, to look at
runs/<name>/checkpoints/            the newest states to go on from
runs/<name>/best.safetensors        weights of the best evaluation, timm's names
"""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml

from irv2 import checkpoint, weights
from irv2.checkpoint import CheckpointError
from irv2.config import Config, differences
from irv2.engine import TrainState

BEST = "best.safetensors"


def config_text(cfg: Config) -> str:
    """The resolved config as YAML, below the revision and versions it runs on."""
    versions = ", ".join(f"{name} {version}" for name, version in software().items())
    body = yaml.safe_dump(cfg.model_dump(), sort_keys=False, allow_unicode=True)
    return f"# git {_git_revision()}\n# {versions}\n{body}"


def write_config(cfg: Config) -> None:
    """Write config.yaml into the run directory, making the directory if needed."""
    cfg.directory.mkdir(parents=True, exist_ok=True)
    text = config_text(cfg)
    path = cfg.directory / "config.yaml"
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def software() -> dict[str, str]:
    """Versions of what a result depends on."""
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


def checkpoints(directory: Path) -> Path:
    """The folder of a run's checkpoints."""
    return directory / "checkpoints"


def newest(directory: Path) -> Path | None:
    """A run's newest checkpoint, or None where there is none."""
    return next(reversed(checkpoint.found(checkpoints(directory))), None)


def origin(directory: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: "auto" the run's newest, "never" none, or a path.

    Raises CheckpointError where the answer would overwrite what is already there.
    """
    own = newest(directory)
    if own is None and (directory / BEST).exists():
        raise CheckpointError(
            f"{directory}: holds the weights of a run but none of its checkpoints, so it cannot be "
            "continued; give another run.name, or move it away"
        )
    if resume == "auto":
        return own
    if resume == "never":
        if own is not None:
            raise CheckpointError(
                f"{directory}: already holds a run up to step {checkpoint.step_of(own)}; continue "
                "it without --resume never, or give another run.name"
            )
        return None
    path = Path(resume)
    if path.is_dir():
        path = newest(path) or path
    if own is not None and path.resolve() != own.resolve():
        raise CheckpointError(
            f"{directory}: already holds a run up to step {checkpoint.step_of(own)}; "
            f"to start from {path}, give another run.name"
        )
    return path


def save(state: TrainState, cfg: Config, classes: list[str], images_per_epoch: int) -> None:
    """Write a checkpoint of the run and remove those beyond checkpoint.keep."""
    content = {
        **state.state_dict(),
        "config": cfg.model_dump(),
        "classes": classes,
        "images_per_epoch": images_per_epoch,
        "software": software(),
    }
    checkpoint.save(checkpoints(cfg.directory), state.step, content, cfg.checkpoint.keep)


def restore(
    state: TrainState, path: Path, cfg: Config, classes: list[str], images_per_epoch: int
) -> None:
    """Put `state` where a checkpoint left off.

    Raises CheckpointError if the checkpoint is of another experiment, with what differs.
    """
    saved = checkpoint.load(path)
    if not {"model", "ema", "optimizer", "config", "classes"} <= saved.keys():
        raise CheckpointError(f"{path}: not a checkpoint of train.py")
    changes = differences(saved["config"], cfg.model_dump())
    if saved["classes"] != classes:
        changes.append(f"classes: {len(saved['classes'])} before, {len(classes)} now, or renamed")
    if saved["images_per_epoch"] != images_per_epoch:
        changes.append(f"training images: {saved['images_per_epoch']} -> {images_per_epoch}")
    if changes:
        raise CheckpointError(
            f"{path}: belongs to another experiment ({'; '.join(changes)}); "
            "undo the change, or give another run.name"
        )
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: does not fit this network ({reason})") from None


def write_best(state: dict[str, Any], cfg: Config, classes: list[str], line: dict) -> None:
    """Write best.safetensors: weights, and in its metadata classes, blocks, view and result."""
    metadata = {
        "classes": json.dumps(classes),
        "blocks": json.dumps(cfg.model.blocks),
        "data": json.dumps(cfg.data.model_dump()),
        "result": json.dumps(line),
    }
    kept = {key: value for key, value in state.items() if not key.startswith("aux.")}
    weights.write(cfg.directory / BEST, kept, metadata)
