"""Checks that two runs saw the same images and came to the same: batches, weights, logs."""

from __future__ import annotations

from pathlib import Path

import torch
from small_run import IMAGES, STEPS

from irv2.network import weights
from irv2.run import checkpoint, jsonl


def checkpoint_of(directory: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.load(directory / "checkpoints" / f"step-{step:09d}")


def steps(directory: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_all(directory / "checkpoints")]


def differing(ours: checkpoint.Parts, theirs: checkpoint.Parts) -> list[str]:
    """Names of tensors that are not bit-identical."""
    assert {part: set(ours[part]) for part in ours} == {part: set(theirs[part]) for part in theirs}
    return [
        f"{part}.{name}"
        for part, tensors in ours.items()
        for name, tensor in tensors.items()
        if not torch.equal(tensor, theirs[part][name])
    ]


CLOCK = ("images_per_s", "data_wait", "mfu", "memory_gb")


def timeless(directory: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key not in CLOCK}
        for line in jsonl.read(directory / "log.jsonl")
    ]


def assert_same_end(directory: Path, undisturbed: Path) -> None:
    """Weights, average, optimizer, counters and logged metrics are those of the other run."""
    ours, theirs = (checkpoint_of(d, STEPS) for d in (directory, undisturbed))
    assert differing(ours.parts, theirs.parts) == []
    counters = ("step", "images_seen", "bad_images", "bad_steps", "bad_steps_in_a_row")
    assert [ours.meta[key] for key in counters] == [theirs.meta[key] for key in counters]
    assert timeless(directory) == timeless(undisturbed)
    (best, metadata, _), (other, other_metadata, _) = (
        weights.read(str(d / "best.safetensors")) for d in (directory, undisturbed)
    )
    assert differing({"best": best}, {"best": other}) == []
    assert {**metadata, "data": ""} == {**other_metadata, "data": ""}  # workers may differ


def ledger(directory: Path) -> dict[int, list[tuple[int, int]]]:
    """step -> (image, checksum of its pixels) of the global batch, over all ranks in order."""
    batches: dict[int, list[tuple[int, int]]] = {}
    for path in sorted((directory / "ledger").iterdir()):
        for line in jsonl.read(path):
            pairs = zip(line["indices"], line["checksums"], strict=True)
            batches.setdefault(line["step"], []).extend(pairs)
    return batches


def assert_same_batches(directory: Path, undisturbed: Path) -> None:
    """The same images with the same pixels in the same steps, each image once an epoch."""
    batches = ledger(directory)
    assert batches == ledger(undisturbed)
    indices = [index for step in sorted(batches) for index, _ in batches[step]]
    assert len(indices) > IMAGES
    for begin in range(0, len(indices), IMAGES):
        epoch = indices[begin : begin + IMAGES]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(IMAGES))
