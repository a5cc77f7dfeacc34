"""What a run leaves behind, and how it goes on from there.

runs/<name>/config.yaml             every key spelled out, with git revision and versions
runs/<name>/log.jsonl               a line per logged step and per evaluation
runs/<name>/tensorboard/            the same, to look at
runs/<name>/checkpoints/            the newest states to go on from
runs/<name>/best.safetensors        weights of the best evaluation, timm's names
"""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
import torchvision
import yaml
from torch import Tensor

from irv2 import checkpoint, weights
from irv2.checkpoint import CheckpointError
from irv2.config import differences
from irv2.engine import TrainState

BEST = "best.safetensors"


@dataclass(frozen=True)
class Experiment:
    """What must be the same for a run to be continued: its config, classes and number of images."""

    config: dict[str, Any]
    classes: list[str]
    images_per_epoch: int

    def changes_from(self, saved: dict[str, Any]) -> list[str]:
        """How the experiment of a checkpoint differs from this one, in words."""
        changes = differences(saved["config"], self.config)
        if saved["classes"] != self.classes:
            before, now = len(saved["classes"]), len(self.classes)
            changes.append(f"classes: {before} before, {now} now, or renamed")
        if saved["images_per_epoch"] != self.images_per_epoch:
            changes.append(
                f"training images: {saved['images_per_epoch']} -> {self.images_per_epoch}"
            )
        return changes


# ------------------------------------------------------------------------- config.yaml


def config_text(config: dict[str, Any]) -> str:
    """A resolved config as YAML, below the revision and versions it runs on."""
    versions = ", ".join(f"{name} {version}" for name, version in software().items())
    body = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return f"# git {_git_revision()}\n# {versions}\n{body}"


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write config.yaml into the run directory."""
    text = config_text(config)
    checkpoint.write_atomically(
        directory / "config.yaml", lambda file: file.write(text.encode("utf-8"))
    )


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


# ------------------------------------------------------------------------- checkpoints


def lock(directory: Path) -> BinaryIO:
    """Make the run directory and keep it for this process, as long as the result stays open.

    Raises CheckpointError where another process is at work in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / ".lock", "wb")  # noqa: SIM115 - open for the process's life
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(f"{directory}: another train.py is at work in it") from None
    return file


def checkpoints(directory: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return checkpoint.found(directory / "checkpoints")


def load_newest(directory: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """A run's newest undamaged checkpoint; says which newer ones it passes over.

    Raises CheckpointError where there is none.
    """
    paths = checkpoints(directory)
    if not paths:
        raise CheckpointError(f"{directory}: no checkpoint in it; is it a run directory?")
    for path in reversed(paths):
        try:
            return path, checkpoint.load(path)
        except CheckpointError as error:
            say(f"passed over: {error}")
    raise CheckpointError(f"{directory}: none of its {len(paths)} checkpoints can be read")


def save(state: TrainState, directory: Path, experiment: Experiment, keep: int) -> None:
    """Write a checkpoint of the run and remove all but the newest `keep`."""
    content = {
        **state.state_dict(),
        "config": experiment.config,
        "classes": experiment.classes,
        "images_per_epoch": experiment.images_per_epoch,
        "software": software(),
    }
    checkpoint.save(directory / "checkpoints", state.step, content, keep)


def restore(
    state: TrainState,
    directory: Path,
    resume: str,
    experiment: Experiment,
    say: Callable[[str], None],
) -> None:
    """Put `state` where the run goes on from, if it goes on from anything.

    `resume`: "auto", the run's newest checkpoint if it has one; "never", none; or the path of a
    checkpoint or run to begin from; once the run has checkpoints of its own, it goes on from those.
    Raises CheckpointError where going on would be another experiment, or starting would overwrite.
    """
    own = checkpoints(directory)
    if not own and (directory / BEST).exists():
        raise CheckpointError(
            f"{directory}: holds the weights of a run but none of its checkpoints, so it cannot be "
            "continued; give another run.name, or move it away"
        )
    if own and resume == "never":
        raise CheckpointError(
            f"{directory}: already holds a run up to step {checkpoint.step_of(own[-1])}; continue "
            "it without --resume never, or give another run.name"
        )
    if own:
        path, saved = load_newest(directory, say)
    elif resume in ("auto", "never"):
        return
    elif Path(resume).is_dir():
        path, saved = load_newest(Path(resume), say)
    else:
        path, saved = Path(resume), checkpoint.load(Path(resume))

    if not {"model", "ema", "optimizer", "config", "classes"} <= saved.keys():
        raise CheckpointError(f"{path}: not a checkpoint of train.py")
    changes = experiment.changes_from(saved)
    if changes:
        advice = "undo the change" + (", or give another run.name" if own else "")
        raise CheckpointError(
            f"{path}: belongs to another experiment ({'; '.join(changes)}); {advice}"
        )
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: does not fit this network ({reason})") from None
    say(f"continuing after step {state.step} ({state.images_seen:,} images seen), from {path}")


# ------------------------------------------------------------------------- best.safetensors


def write_best(
    directory: Path, state: dict[str, Tensor], experiment: Experiment, result: dict[str, Any]
) -> None:
    """Write best.safetensors: weights, and in its metadata classes, blocks, view and result."""
    metadata = {
        "classes": experiment.classes,
        "blocks": experiment.config["model"]["blocks"],
        "data": experiment.config["data"],
        "result": result,
    }
    kept = {key: value for key, value in state.items() if not key.startswith("aux.")}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    weights.write(directory / BEST, kept, texts)
