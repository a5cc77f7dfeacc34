"""Lines of a run's log, and a run directory made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def train_line(step: int, **more: Any) -> dict[str, Any]:
    line = {"step": step, "images_seen": 8 * step, "epoch": step / 4}
    return {**line, "loss": 1.0 / step, "lr": 0.045, "images_per_s": 40.0, **more}


def eval_line(step: int, weights: str, top1: float, **more: Any) -> dict[str, Any]:
    line = {"step": step, "epoch": step / 4, "weights": weights}
    return {**line, "top1": top1, "top5": 100.0, "loss": 0.5, "images": 50, **more}


def write_run(directory: Path, lines: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    """Write a run's log and config; a line that names weights is an evaluation's."""
    directory.mkdir()
    records = [{"kind": "eval" if "weights" in line else "train", **line} for line in lines]
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return directory
