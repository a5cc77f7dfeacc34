"""What a run leaves behind, and how it goes on from there.

runs/<name>/config.yaml             every key spelled out, with git revision and versions
runs/<name>/log.jsonl               a line per logged step and per evaluation
runs/<name>/tensorboard/            the same, to look at
runs/<name>/checkpoints/            the newest states to go on from
runs/<name>/bad_images.jsonl        images that training could not use, if there were any
runs/<name>/ledger/                 the images of every step, by rank, with log.ledger=true
runs/<name>/best.safetensors        weights of the best evaluation, timm's names
"""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
import torchvision
import yaml
from torch import Tensor

from irv2 import checkpoint, jsonl, weights
from irv2.checkpoint import Checkpoint, CheckpointError
from irv2.config import differences
from irv2.engine import TrainState
from irv2.jsonl import JsonLines

BEST = "best.safetensors"
STORE = "checkpoints"
RECIPE = ("optim", "schedule", "loss", "ema")  # what may change where a run begins from another


class OtherExperimentError(CheckpointError):
    """A checkpoint of another network, other data or another recipe."""


@dataclass(frozen=True)
class Experiment:
    """What must be the same for a run to be continued.

    `stored`: what else is known of how its training images are stored and bears on the run.
    """

    config: dict[str, Any]
    classes: list[str]
    images_per_epoch: int
    stored: dict[str, int] = field(default_factory=dict)

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
        before = saved.get("stored", {})
        for key in sorted(before.keys() | self.stored.keys()):
            if before.get(key) != self.stored.get(key):
                was, now = before.get(key, "none"), self.stored.get(key, "none")
                changes.append(f"training images, {key}: {was} -> {now}")
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


def micro_batch_before(directory: Path) -> int | None:
    """Images that a device took at once when the run was last started; None: it was not."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        found = config["train"]["micro_batch"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


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
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would live on in loader workers
    except OSError as error:
        file.close()
        is_held = isinstance(error, (BlockingIOError, PermissionError))
        reason = "another train.py is at work in it" if is_held else f"cannot be locked ({error})"
        raise CheckpointError(f"{directory}: {reason}") from None
    return file


def checkpoints(directory: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return checkpoint.found(directory / STORE)


def load_newest(
    directory: Path,
    say: Callable[[str], None],
    only: Iterable[str] | None = None,
    check: Callable[[Checkpoint], None] = lambda found: None,
) -> Checkpoint:
    """A run's newest usable checkpoint, or `only` some of its parts; says which it passes over.

    A checkpoint is usable if it is undamaged and `check` raises no CheckpointError. Where none is,
    raises `check`'s error on the newest, or else CheckpointError.
    """
    paths = checkpoints(directory)
    if not paths:
        raise CheckpointError(f"{directory}: no checkpoint in it; is it a run directory?")
    errors = []
    for path in reversed(paths):
        try:
            loaded = checkpoint.load(path, only)
            check(loaded)
        except CheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            say(f"passed over: {error}")
        return loaded
    for error in errors:
        if isinstance(error, OtherExperimentError):
            raise error
    raise CheckpointError(
        "\n".join(
            [f"{directory}: none of its {len(paths)} checkpoints can be read", *map(str, errors)]
        )
    )


def meta(state: TrainState, experiment: Experiment) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    return {
        **state.counters(),
        "config": experiment.config,
        "classes": experiment.classes,
        "images_per_epoch": experiment.images_per_epoch,
        "stored": experiment.stored,
        "software": software(),
    }


def restore(
    state: TrainState,
    directory: Path,
    resume: str,
    experiment: Experiment,
    say: Callable[[str], None],
) -> None:
    """Put `state` where the run goes on from, if it goes on from anything.

    `resume`: "auto", the run's newest checkpoint if it has one; "never", none; or the path of a
    checkpoint or run to begin from, possibly with another recipe; once the run has checkpoints of
    its own, it goes on from those. Raises CheckpointError where going on would be another
    experiment, or starting would overwrite.
    """
    own = checkpoints(directory)
    remains = [path for path in (directory / BEST, *(directory / STORE).glob("step-*")) if not own]
    if any(path.exists() for path in remains):
        raise CheckpointError(
            f"{directory}: holds {remains[-1].name}, but no checkpoint to go on from; give another "
            "run.name, or move it away"
        )
    if own and resume == "never":
        raise CheckpointError(
            f"{directory}: already holds a run up to step {checkpoint.step_of(own[-1])}; continue "
            "it without --resume never, or give another run.name"
        )
    if not own and resume in ("auto", "never"):
        return

    def check(found: Checkpoint) -> None:
        _check_experiment(found, experiment, is_own=bool(own), say=say)

    if own:
        found = load_newest(directory, say, check=check)
    elif Path(resume).is_dir() and checkpoints(Path(resume)):
        found = load_newest(Path(resume), say, check=check)
    else:
        found = checkpoint.load(Path(resume))
        check(found)
    try:
        state.load(found.parts, found.meta)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{found.path}: does not fit this network ({reason})") from None
    say(
        f"continuing after step {state.step} ({state.images_seen:,} images seen), from {found.path}"
    )


def _check_experiment(
    found: Checkpoint, experiment: Experiment, is_own: bool, say: Callable[[str], None]
) -> None:
    """Raise OtherExperimentError if a checkpoint does not belong to this experiment."""
    if not {"config", "classes", "images_per_epoch"} <= found.meta.keys():
        raise CheckpointError(f"{found.path}: not a checkpoint of train.py")
    changes = experiment.changes_from(found.meta)
    recipe = () if is_own else tuple(f"{section}." for section in RECIPE)
    forbidden = [change for change in changes if not change.startswith(recipe)]
    if forbidden:
        advice = "undo the change" + (", or give another run.name" if is_own else "")
        raise OtherExperimentError(
            f"{found.path}: belongs to another experiment ({'; '.join(forbidden)}); {advice}"
        )
    for change in changes:
        say(f"with another recipe than {found.path}: {change}")


def set_aside_unusable(directory: Path, step: int) -> None:
    """Rename what was passed over for the checkpoint of `step`, so that none of it counts."""
    for path in checkpoints(directory):
        if checkpoint.step_of(path) > step:
            names = (f"{path.name}.unusable{n}" for n in ("", *map(str, range(2, 10**6))))
            path.rename(next(n for n in map(path.with_name, names) if not n.exists()))


# ------------------------------------------------------------------------- ledger


def open_ledger(
    directory: Path, rank: int, world_size: int, step: int, say: Callable[[str], None]
) -> JsonLines:
    """A rank's file of the images of every step, in a run that stands at `step`."""
    folder = directory / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        current = {f"rank-{other}.jsonl" for other in range(world_size)}
        for path in folder.glob("rank-*.jsonl"):
            if path.name not in current:  # of a rank that has gone
                jsonl.cut_back(path, step)
    return JsonLines(folder / f"rank-{rank}.jsonl", step, say)


# ------------------------------------------------------------------------- best.safetensors


class BestWeights:
    """best.safetensors: weights, and in its metadata classes, blocks, view and result.

    What there is no room for waits in memory for `flush`.
    """

    def __init__(self, directory: Path, experiment: Experiment, say: Callable[[str], None]) -> None:
        self.path, self.experiment, self.say = directory / BEST, experiment, say
        self._waiting: tuple[dict[str, Tensor], dict[str, str]] | None = None

    def write(self, state: dict[str, Tensor], result: dict[str, Any]) -> None:
        """Replace the file by these weights, whole or not at all."""
        metadata = {
            "classes": self.experiment.classes,
            "blocks": self.experiment.config["model"]["blocks"],
            "data": self.experiment.config["data"],
            "result": result,
        }
        texts = {key: json.dumps(value) for key, value in metadata.items()}
        kept = {key: value for key, value in state.items() if not key.startswith("aux.")}
        self._waiting = kept, texts
        if not self.flush():  # training goes on and changes them
            self._waiting = {key: value.cpu().clone() for key, value in kept.items()}, texts

    def flush(self) -> bool:
        """Whether nothing waits any more."""
        if self._waiting is not None:
            try:
                weights.write(self.path, *self._waiting)
            except OSError as error:
                self.say(f"NOT WRITTEN, will be tried again: {self.path} ({error})")
                return False
            self._waiting = None
        return True
