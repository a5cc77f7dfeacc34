"""The run that checks look at, and their findings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.base import Source
from data.prepare import checkup
from data.workers import default_workers, usable_cores
from irv2.config import Config
from irv2.training.batch import Division

OK, WARN, FAIL = "ok", "warn", "FAIL"  # WARN: the run will do, but look at it


@dataclass(frozen=True)
class Finding:
    """Finding of a check: a line, what to do about it, more lines, figures for --json."""

    level: str
    what: str
    todo: str = ""
    details: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def room(what: str, have: int, need: int, ample: float, todo: str) -> Finding:
    """Judge bytes: FAIL if there are fewer than needed, WARN below `ample` times as many.

    `what`: the place, and "{have}" and "{need}" for the sizes.
    """
    level = FAIL if have < need else WARN if have < ample * need else OK
    text = what.replace("{have}", in_bytes(have)).replace("{need}", in_bytes(need))
    return Finding(level, text, "" if level == OK else todo, figures={"have": have, "need": need})


def in_bytes(size: int) -> str:
    """Format a size."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class CheckOptions:
    """Options of the command line."""

    config: str
    overrides: list[str]
    ranks: int = 1  # of this machine
    scan: int | None = 1000  # images of each split; None: all
    seconds: float = 10.0  # for each measurement of pace
    bad_files: Path | None = None
    near_duplicates: bool = False  # also look for images that look alike


@dataclass
class Case:
    """A run as far as it is known; a check that lacks something here is skipped."""

    options: CheckOptions
    cfg: Config | None = None
    division: Division | None = None
    train: Source | None = None
    val: Source | None = None

    @property
    def cores(self) -> int:
        """Cores that each rank has for itself."""
        return max(1, usable_cores() // self.options.ranks)

    @property
    def workers(self) -> int:
        """Loader processes of each rank."""
        configured = self.cfg.data.workers
        return default_workers() if configured is None else configured

    @property
    def has_gpu(self) -> bool:
        return self.cfg.run.device != "cpu" and torch.cuda.is_available()

    def selected(self, source: Source) -> list[int]:
        """Numbers of the images of a source that --scan selects."""
        count = len(source) if self.options.scan is None else self.options.scan
        return checkup.sample(len(source), count, self.cfg.run.seed)
