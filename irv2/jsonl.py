"""Records as JSON lines: appended while a run goes on, cut back where it is continued."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from irv2 import checkpoint

Record = dict[str, Any]


class JsonLines:
    """A file with a JSON object a line, each with the "step" it belongs to.

    What cannot be written, on a full disk, is kept and written with a later line.
    """

    def __init__(self, path: Path, step: int, say: Callable[[str], None]) -> None:
        """The file of a run that stands at `step`; lines of later steps are dropped.

        A file that does not exist is made by its first line.
        """
        self.path, self.say = path, say
        self.kept = cut_back(path, step) if path.exists() else []
        self._file: FileIO | None = None
        self._pending = b""

    def append(self, record: Record) -> None:
        """Add a line; a number that is not finite becomes null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        is_first_failure = not self._pending
        self._pending += (json.dumps(finite, allow_nan=False) + "\n").encode()
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - see close()
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if is_first_failure:
                self.say(f"{self.path}: cannot be written ({error.strerror}); will be tried again")

    def sync(self) -> None:
        """Make sure that a power cut takes no line written so far."""
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self.say(f"{self.path}: cannot be flushed to disk ({error.strerror})")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(path: Path) -> list[Record]:
    """The lines of a file; one that a crash has cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def cut_back(path: Path, step: int) -> list[Record]:
    """Drop the lines of steps after `step` from a file; returns those that stay."""
    kept = [line for line in read(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
    return kept
