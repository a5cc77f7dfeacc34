"""Divide a global batch among ranks, and each rank's share into micro-batches."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from irv2.network import memory
from irv2.training.distributed import WorldError

# Share of a device that train.micro_batch=auto plans: sizes are estimates, and a GPU holds more, as
# gradients a second time (flat.py) and a recorded step's images.
MEMORY_SHARE = 0.85


class Division(NamedTuple):
    """Division of a rank's share of the global batch into micro-batches."""

    micro_batch: int  # images a device takes at once
    accumulation: int  # micro-batches of one update

    def in_words(self, ranks: int) -> str:
        """A step's images, and how so many ranks come to them."""
        images = ranks * self.accumulation * self.micro_batch
        of_ranks = f"{ranks:,} rank{'s' if ranks > 1 else ''}"
        return (
            f"{images:,} images a step = {of_ranks} x {self.accumulation} accumulated x "
            f"{self.micro_batch}"
        )


def divide(global_batch: int, micro_batch: int, ranks: int, in_pairs: bool = False) -> Division:
    """Divide a global batch into the largest equal parts of at most `micro_batch` images.

    in_pairs: mixup or cutmix mix the images of a micro-batch in pairs. Raises WorldError, naming
    possible values, where ranks cannot have equal shares, or a share has no equal parts of at least
    half of `micro_batch`.
    """
    share = rank_share(global_batch, micro_batch, ranks)
    sizes = [n for n in range(1, share + 1) if share % n == 0]
    size = max(n for n in sizes if n <= micro_batch)
    if size < min(micro_batch, share) / 2:
        above = next(n for n in sizes if n > micro_batch)
        fitting = -(-share // micro_batch) * micro_batch * ranks
        raise WorldError(
            f"{share} images a rank (train.global_batch={global_batch} on {ranks}) have no "
            f"equal parts near train.micro_batch={micro_batch}: set train.micro_batch={size} or "
            f"{above}, or train.global_batch={fitting}"
        )
    if in_pairs and size % 2:
        raise WorldError(
            f"data.mixup and data.cutmix mix pairs, and micro-batches of {size} images "
            "cannot be paired: choose another train.micro_batch"
        )
    return Division(size, share // size)


def rank_share(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Images of a global batch that each rank takes.

    Raises WorldError where shares would not be equal, naming values that `micro_batch` divides.
    """
    if global_batch % ranks == 0:
        return global_batch // ranks
    possible = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
    below = max(n for n in possible if n < ranks)
    above = next((n for n in possible if n > ranks), None)
    near = f"{below} or {above}" if above else f"{below}"
    unit = ranks * max(1, min(micro_batch, round(global_batch / ranks)))
    fitting = max(1, round(global_batch / unit)) * unit
    raise WorldError(
        f"train.global_batch={global_batch} cannot be divided among {ranks} ranks: "
        f"start {near} ranks, or set train.global_batch={fitting}"
    )


def largest_micro_batch(
    share: int, sizes: memory.Sizes, room: int, in_pairs: bool = False, before: int | None = None
) -> int:
    """Largest equal part of a rank's share of the batch that should fit into `room` bytes.

    Prefers the run's micro-batch `before` if it still is a part and fits: batch norm depends on it.
    Raises WorldError where nothing fits.
    """
    least = 2 if in_pairs else 1
    parts = [n for n in range(share, 0, -1) if share % n == 0 and n % least == 0]
    if before in parts:
        parts.insert(0, before)
    fitting = next((n for n in parts if sizes.training(n) <= room), None)
    if fitting is None:
        raise WorldError(
            f"train.micro_batch=auto: a step of {least} images needs about "
            f"{sizes.training(least) / 2**30:.1f} GiB, and there are {room / 2**30:.1f}: set "
            "model.grad_checkpointing=true or a smaller data.image_size"
        )
    return fitting


def memory_room(device: torch.device, ranks: int) -> int:
    """Bytes that a step may take on this rank, which shares a CPU's memory with its neighbours."""
    neighbours = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return int(MEMORY_SHARE * memory.device_memory(device) / neighbours)
