"""Records as JSON lines: appended during a run, cut back when it is resumed.

A line that is not as this project writes it, such as one cut short by a crash, is skipped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from data import strict_json
from data.files import open_own, open_regular, write_atomically
from data.strict_json import Count, NonNegative, Number, Percent

MAX_BYTES, MAX_LINE = 1 << 34, 1 << 24  # of a file, of a line: ledgers of months hold less

Record = dict[str, Any]


class _Line(TypedDict):
    """A line of any file; `append` makes null of a number that is not finite."""

    step: Count


class _TrainingLine(_Line):
    """A line of log.jsonl, of a step."""

    epoch: NonNegative
    images_seen: Count
    loss: NotRequired[Number | None]
    lr: NotRequired[NonNegative | None]
    grad_norm: NotRequired[Number | None]
    images_per_s: NotRequired[NonNegative | None]
    data_wait: NotRequired[NonNegative | None]
    mfu: NotRequired[NonNegative | None]
    memory_gb: NotRequired[NonNegative | None]


class _EvaluationLine(_Line):
    """A line of log.jsonl, of an evaluation."""

    epoch: NonNegative
    weights: str
    top1: Percent
    top5: NotRequired[Percent]
    mean_per_class: NotRequired[Percent]
    loss: NotRequired[Number | None]
    images: NotRequired[Count]


_LINE = TypeAdapter(_Line)
_OF_KIND = {"train": TypeAdapter(_TrainingLine), "eval": TypeAdapter(_EvaluationLine)}


class JsonLines:
    """A file with a JSON object a line, each with the "step" it belongs to.

    Lines for which a full disk has no room are kept and written with a later line.
    """

    def __init__(self, path: Path, step: int, say: Callable[[str], None]) -> None:
        """Open the file of a run that stands at `step`; lines of later steps are dropped.

        A file that does not exist is made by its first line.
        """
        self.path, self.say = path, say
        self.kept = cut_back(path, step) if path.exists() else []
        self._file: FileIO | None = None
        self._pending = b""
        self._is_reported = False  # that writing fails

    def append(self, record: Record) -> None:
        """Add a line, `finite`."""
        self._pending += (json.dumps(finite(record), allow_nan=False) + "\n").encode()
        self._write()

    def _write(self) -> None:
        """Write what waits, as far as the disk has room."""
        try:
            while self._pending:
                self._pending = self._pending[self._write_bytes(self._pending) :]
            self._is_reported = False
        except OSError as error:
            if not self._is_reported:
                self.say(f"{self.path}: cannot be written ({error.strerror}); will be tried again")
            self._is_reported = True

    def _write_bytes(self, content: bytes) -> int:
        """Write what there is room for; returns how much that was."""
        if self._file is None:
            self._file = open_own(self.path, "ab")
        return self._file.write(content)

    def sync(self) -> None:
        """Make sure that a power cut takes no line written so far."""
        self._write()
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self.say(f"{self.path}: cannot be flushed to disk ({error.strerror})")

    def close(self) -> None:
        """Write what waits and close the file; says so if lines are lost."""
        self._write()
        if self._pending:
            self.say(f"{self.path}: its last lines are LOST, there was no room for them")
        if self._file is not None:
            self._file.close()


def finite(record: Record) -> Record:
    """Return a record with null for numbers that are not finite, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def read(path: Path) -> list[Record]:
    """Read a file's records, those of log.jsonl with a "kind"."""
    if not path.exists():
        return []
    records = []
    with open_regular(path, MAX_BYTES) as file:
        for text in iter(lambda: file.readline(MAX_LINE), b""):
            with suppress(ValueError):
                records.append(_record(text))
    return records


def _record(text: bytes) -> Record:
    """Read a line. Raises ValueError for one that is not as this project writes it."""
    record = strict_json.parse(text)
    strict_json.checked(record, _LINE)
    kind = record.get("kind")
    if kind in ("train", "eval"):
        strict_json.checked(record, _OF_KIND[kind])
    return record


def cut_back(path: Path, step: int) -> list[Record]:
    """Drop the lines of steps after `step` from a file; returns those that stay."""
    kept = [line for line in read(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
