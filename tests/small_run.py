"""A small run that faults are injected into, and what must be the same at its end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from programs import children, finish, log_lines, start, wait_for

from irv2 import checkpoint, jsonl, weights

Inject = Callable[[str], None]
HARMED = "tests/harmed.py"
STEPS, IMAGES = 6, 14
CONFIG = """
model: {{blocks: [1, 1, 1], bn_momentum: 0.5}}
data: {{image_size: 75, workers: 0, train: {data}/train, val: {data}/val, max_bad_fraction: 1}}
train: {{epochs: 1.7, global_batch: 4, micro_batch: 4}}
eval: {{every_epochs: 1, batch: 2}}
checkpoint: {{every_steps: 2}}
log: {{every_steps: 1, ledger: true}}
run: {{device: cpu}}
"""


def arguments(config: Path, directory: Path, *overrides: object) -> list[object]:
    return ["--config", config, f"run.dir={directory}", *overrides]


def checkpoint_of(directory: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.load(directory / "checkpoints" / f"step-{step:09d}")


def steps(directory: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.found(directory / "checkpoints")]


def differing(ours: checkpoint.Parts, theirs: checkpoint.Parts) -> list[str]:
    """Names of tensors that are not bit-identical."""
    assert {part: set(ours[part]) for part in ours} == {part: set(theirs[part]) for part in theirs}
    return [
        f"{part}.{name}"
        for part, tensors in ours.items()
        for name, tensor in tensors.items()
        if not torch.equal(tensor, theirs[part][name])
    ]


def timeless(directory: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key not in ("images_per_s", "data_wait")}
        for line in jsonl.read(directory / "log.jsonl")
    ]


def assert_same_end(directory: Path, undisturbed: Path) -> None:
    """Weights, average, optimizer, counters and logged metrics are those of the other run."""
    ours, theirs = (checkpoint_of(d, STEPS) for d in (directory, undisturbed))
    assert differing(ours.parts, theirs.parts) == []
    counters = ("step", "images_seen", "bad_images", "bad_steps", "bad_steps_in_a_row")
    assert [ours.meta[key] for key in counters] == [theirs.meta[key] for key in counters]
    assert timeless(directory) == timeless(undisturbed)
    (best, metadata), (other, other_metadata) = (
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


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a program and everything it has started."""
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def assert_same_batches(directory: Path, undisturbed: Path) -> None:
    """The same images with the same pixels in the same steps, each image once an epoch."""
    batches = ledger(directory)
    assert batches == ledger(undisturbed)
    indices = [index for step in sorted(batches) for index, _ in batches[step]]
    assert len(indices) > IMAGES
    for begin in range(0, len(indices), IMAGES):
        epoch = indices[begin : begin + IMAGES]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(IMAGES))


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks that torchrun has started, in order."""
    pids = {}
    for pid in children(process.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [entry for entry in environment if entry.startswith(b"RANK=")]
        is_rank = Path(f"/proc/{pid}/stat").read_text().split()[3] == str(process.pid)
        if rank and is_rank:
            pids[int(rank[0][5:])] = pid
    return [pids[rank] for rank in sorted(pids)]


def lose_a_rank(config: Path, tmp_path: Path, inject: Inject, number: signal.Signals) -> None:
    """Send a signal to one of two ranks: the run must come back by itself and end."""
    inject(f"{number.name} of a rank under --max-restarts")
    place = arguments(config, tmp_path / "run", "run.timeout_s=30")
    process = start("train.py", *place, ranks=2, torchrun=("--max-restarts=1",))
    wait_for(process, "step 3/")
    os.kill(rank_pids(process)[1], number)
    result = finish(process)
    assert result.returncode == 0, result.stderr
    assert "continuing after step" in result.stdout
    assert f"finished: step {STEPS} of {STEPS}" in result.stdout
    assert [line["step"] for line in log_lines(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]
