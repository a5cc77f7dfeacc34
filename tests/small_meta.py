"""The meta.json that train.py writes in a run of batches of 4."""

from __future__ import annotations

from typing import Any

BATCH = 4


def meta(step: int, **changes: Any) -> dict[str, Any]:
    """Make the content of meta.json, but for its parts; `changes` are keys and their values."""
    counted = {"bad_images": 0, "bad_steps": 0, "bad_steps_in_a_row": 0, "scaler": {}}
    return {
        "step": step,
        "images_seen": BATCH * step,
        **counted,
        "config": config(),
        "classes": ["a", "b"],
        "images_per_epoch": 14,
        "stored": {},
        "software": {"torch": "2"},
        **changes,
    }


def config(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Make the sections of a config that a checkpoint must have; `changes` are sections."""
    return {
        "model": {"blocks": [1, 1, 1]},
        "data": {"image_size": 75, "val": "val"},
        "train": {"global_batch": BATCH},
        "schedule": {"kind": "staircase"},
        **changes,
    }
