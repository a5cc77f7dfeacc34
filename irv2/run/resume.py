"""Resuming a run: from which checkpoint, and only if it belongs to the same experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.names import are_same
from irv2.config import FIELDS, MACHINE_KEYS
from irv2.run import checkpoint
from irv2.run.checkpoint import Checkpoint, CheckpointError
from irv2.run.directory import BEST, STORE, checkpoints, software
from irv2.run.meta import Meta
from irv2.training.distributed import World
from irv2.training.schedule import length_is_free
from irv2.training.state import TrainState

RECIPE = ("optim", "schedule", "loss", "ema")  # may change when a run begins from another


class OtherExperimentError(CheckpointError):
    """A checkpoint of another network, other data or another recipe."""


@dataclass(frozen=True)
class Experiment:
    """Facts that must be the same for a run to be resumed.

    `stored`: further facts about how its training images are stored that affect the run.
    """

    config: dict[str, Any]
    classes: list[str]
    images_per_epoch: int
    stored: dict[str, int] = field(default_factory=dict)

    def changes_from(self, saved: Meta) -> list[str]:
        """Describe how the experiment of a checkpoint differs from this one."""
        changes = differences(saved["config"], self.config)
        if not are_same(saved["classes"], self.classes):
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


def differences(before: dict, after: dict) -> list[str]:
    """Keys of the experiment whose values differ, as "key: before -> after".

    A key that is absent, as `before` may be older than it, has its default.
    """
    free = set(MACHINE_KEYS)
    grows = any(tree["data"].get("train_sizes") for tree in (before, after))
    if not grows and length_is_free(before["schedule"]["kind"], after["schedule"]["kind"]):
        free.add("train.epochs")
    old, new = (
        {f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()}
        for tree in (before, after)
    )
    defaults = {key: field.default for key, field in FIELDS.items()}
    old, new = defaults | old, defaults | new
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in {**old, **new}
        if key not in free and old.get(key) != new.get(key)
    ]


def load_newest(
    directory: Path,
    say: Callable[[str], None],
    only: Iterable[str] | None = None,
    check: Callable[[Checkpoint], None] = lambda loaded: None,
) -> Checkpoint:
    """Load a run's newest usable checkpoint, or `only` some parts; says which it passes over.

    A checkpoint is usable if it is undamaged and `check` raises no CheckpointError. If none is,
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
        f"{directory}: none of its {len(paths)} checkpoints can be read", *map(str, errors)
    )


def meta(state: TrainState, experiment: Experiment) -> dict[str, Any]:
    """Metadata that a checkpoint holds beside its tensors."""
    return {
        **state.counters(),
        "config": experiment.config,
        "classes": experiment.classes,
        "images_per_epoch": experiment.images_per_epoch,
        "stored": experiment.stored,
        "software": software(),
    }


def restore(
    state: TrainState, directory: Path, resume_from: str, experiment: Experiment, world: World
) -> None:
    """Set `state` to what the run resumes from, if anything; the same on all ranks.

    resume_from: "auto", the run's newest checkpoint if it has one; "never", none; or the path of a
    checkpoint or run to begin from, possibly with another recipe; once the run has checkpoints of
    its own, it resumes from those. Raises CheckpointError if resuming would be another experiment,
    or starting would overwrite.
    """
    _restore(state, directory, resume_from, experiment, world.say)
    if not world.same(state.step):
        raise CheckpointError(
            f"{directory}: the ranks found different checkpoints in it; it must lie on a file "
            "system that all of them share"
        )


def _restore(
    state: TrainState,
    directory: Path,
    resume_from: str,
    experiment: Experiment,
    say: Callable[[str], None],
) -> None:
    own = checkpoints(directory)
    remains = [path for path in (directory / BEST, *(directory / STORE).glob("step-*")) if not own]
    if any(path.exists() for path in remains):
        raise CheckpointError(
            f"{directory}: holds {remains[-1].name}, but no checkpoint to go on from; give another "
            "run.name, or move it away"
        )
    if own and resume_from == "never":
        raise CheckpointError(
            f"{directory}: already holds a run up to step {checkpoint.step_of(own[-1])}; continue "
            "it without --resume never, or give another run.name"
        )
    if not own and resume_from in ("auto", "never"):
        return

    def check(candidate: Checkpoint) -> None:
        _check_experiment(candidate, experiment, is_own=bool(own), say=say)

    if own:
        loaded = load_newest(directory, say, check=check)
    elif Path(resume_from).is_dir() and checkpoints(Path(resume_from)):
        loaded = load_newest(Path(resume_from), say, check=check)
    else:
        loaded = checkpoint.load(Path(resume_from))
        check(loaded)
    parts = loaded.parts
    if _optimizer(loaded.meta["config"]) != _optimizer(experiment.config):
        parts = parts | {"optimizer": {}}  # which another one could not go on with
    try:
        state.load(parts, loaded.meta)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{loaded.path}: does not fit this network ({reason})") from None
    seen = f"{state.images_seen:,} images seen"
    say(f"continuing after step {state.step} ({seen}), from {loaded.path}")


def _optimizer(config: dict[str, Any]) -> str:
    """Return the kind of optimizer of a config, which may be older than that key."""
    return config.get("optim", {}).get("kind", "rmsprop_tf")


def _check_experiment(
    candidate: Checkpoint, experiment: Experiment, is_own: bool, say: Callable[[str], None]
) -> None:
    """Raise OtherExperimentError if a checkpoint does not belong to this experiment."""
    changes = experiment.changes_from(candidate.meta)
    recipe = () if is_own else tuple(f"{section}." for section in RECIPE)
    forbidden = [change for change in changes if not change.startswith(recipe)]
    if forbidden:
        advice = "undo the change" + (", or give another run.name" if is_own else "")
        raise OtherExperimentError(
            f"{candidate.path}: belongs to another experiment ({'; '.join(forbidden)}); {advice}"
        )
    for change in changes:
        say(f"with another recipe than {candidate.path}: {change}")
    trees = (candidate.meta["config"], experiment.config)
    was, now = (tree["run"].get("deterministic", False) for tree in trees)
    if was != now:
        say(f"run.deterministic: {str(was).lower()} -> {str(now).lower()}, from here on")
