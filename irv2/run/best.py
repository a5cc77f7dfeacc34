"""best.safetensors: weights of the best evaluation, for other programs and for validate.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from irv2.network import weights
from irv2.run.directory import BEST
from irv2.run.jsonl import finite
from irv2.run.resume import Experiment


class BestWeights:
    """best.safetensors: weights, and in its metadata classes, blocks, view and result.

    Weights that find no room on the disk wait in memory for `flush`.
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
            "result": finite(result),
        }
        texts = {key: json.dumps(value) for key, value in metadata.items()}
        kept = {key: value for key, value in state.items() if not key.startswith("aux.")}
        self._waiting = kept, texts
        if not self.flush():  # training goes on and changes them
            self._waiting = {key: value.cpu().clone() for key, value in kept.items()}, texts

    def flush(self) -> bool:
        """Retry a pending write; True if none is left."""
        if self._waiting is not None:
            try:
                weights.write(self.path, *self._waiting)
            except OSError as error:
                self.say(f"NOT WRITTEN, will be tried again: {self.path} ({error})")
                return False
            self._waiting = None
        return True
