"""What a check looks at, and what it finds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.prepare import checkup
from data.sources import Source
from data.workers import default_workers
from irv2.config import Config
from irv2.distributed import Division

OK, WARN, FAIL = "ok", "warn", "FAIL"  # WARN: the run will do, but look at it


@dataclass(frozen=True)
class Finding:
    """What a check has found: a line, what to do about it, more lines, figures for --json."""

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
    said = what.replace("{have}", in_bytes(have)).replace("{need}", in_bytes(need))
    return Finding(level, said, "" if level == OK else todo, figures={"have": have, "need": need})


def in_bytes(size: int) -> str:
    """A size in words."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: str
    overrides: list[str]
    ranks: int = 1  # of this machine
    scan: int | None = 1000  # images of each split; None: all
    seconds: float = 10.0  # for each measurement of pace
    bad_files: Path | None = None


@dataclass
class Case:
    """A run as far as it is known; a check that lacks something here is left out."""

    request: Request
    cfg: Config | None = None
    division: Division | None = None
    train: Source | None = None
    val: Source | None = None

    @property
    def cores(self) -> int:
        """That each rank has for itself."""
        return max(1, self.processes // self.request.ranks)

    @property
    def processes(self) -> int:
        """That this machine can run at once."""
        return len(os.sched_getaffinity(0))

    @property
    def workers(self) -> int:
        """Loader processes of each rank."""
        configured = self.cfg.data.workers
        return default_workers() if configured is None else configured

    @property
    def has_gpu(self) -> bool:
        return self.cfg.run.device != "cpu" and torch.cuda.is_available()

    def looked_at(self, source: Source) -> list[int]:
        """The images of a source that are asked to be looked at."""
        count = len(source) if self.request.scan is None else self.request.scan
        return checkup.sample(len(source), count, self.cfg.run.seed)
