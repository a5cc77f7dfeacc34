"""Memory that training takes, and memory that this machine has."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from irv2.network.model import InceptionResnetV2

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
SLOTS = 2  # of RMSpropTF for each trainable parameter: mean square and momentum
UPDATE_COPIES = 3  # of all gradients, which RMSpropTF holds during an update
DEVICE_OVERHEAD = 1 << 30  # about: CUDA's context, cuDNN's workspaces, fragmentation


@dataclass(frozen=True)
class Sizes:
    """Bytes that training holds. Activations are those of one image."""

    weights: int  # with running statistics
    trainable: int
    activations: int
    largest_activation: int
    cast_weights: int  # copies for a lower precision

    @property
    def checkpoint(self) -> int:
        """Weights, their average and the optimizer's slots."""
        return 2 * self.weights + SLOTS * self.trainable

    def training(self, micro_batch: int) -> int:
        """Estimate of the peak: at the start of backward or in the update.

        Backward adds the gradients of two activations as it moves from one to the next.
        """
        backward = (self.activations + 2 * self.largest_activation) * micro_batch
        passing = max(backward + self.cast_weights, UPDATE_COPIES * self.trainable)
        return self.checkpoint + self.trainable + passing


def activation_bytes(
    model: InceptionResnetV2, image_size: int, checkpointing: bool
) -> tuple[int, int]:
    """Return the bytes that autograd keeps for one image in training: (all, the largest tensor).

    The model lies on the meta device and has the dtype of training. With gradient checkpointing the
    repeated blocks keep only their inputs, and one block at a time everything.
    """
    own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    kept: dict[StorageWeakRef, tuple[int, nn.Module | None]] = {}  # bytes, block they arise in
    current: nn.Module | None = None
    inputs = 0

    def enter(block: nn.Module, arguments: tuple[Tensor]) -> None:
        nonlocal current, inputs
        current = block
        inputs += arguments[0].nbytes

    def leave(*_: object) -> None:
        nonlocal current
        current = None

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in own:  # several operations may keep the same storage
            kept.setdefault(key, (storage.nbytes(), current))
        return tensor

    blocks = model.residual_blocks()
    if checkpointing:
        for block in blocks:
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave)
    images = 2  # batch norm needs more than one value per channel
    x = torch.empty(
        (images, 3, image_size, image_size), dtype=next(model.parameters()).dtype, device="meta"
    )
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = model(x)  # keeps the graph alive while it is counted
    outside = sum(size for size, block in kept.values() if block is None)
    inside = [sum(size for size, owner in kept.values() if owner is block) for block in blocks]
    largest = max(size for size, _ in kept.values())
    return (outside + inputs + max(inside, default=0)) // images, largest // images


def available_memory() -> int:
    """Bytes of RAM still available, within the limits of this process's control groups (version 2).

    Schedulers and containers set those limits. The file cache makes way, so it counts as free.
    """
    fields = (line.split() for line in MEMINFO.read_text().splitlines())
    free = next(1024 * int(kib) for name, kib, *_ in fields if name == "MemAvailable:")
    return max(0, min([free, *map(_group_room, _limited_groups())]))


def _limited_groups() -> list[Path]:
    """Folders of the control groups that contain this process and have a limit."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    around = [GROUPS / own, *(GROUPS / own).parents]
    folders = [folder for folder in around if folder.is_relative_to(GROUPS)]
    return [f for f in folders if _text(f / "memory.max") not in ("", "max")]


def _group_room(folder: Path) -> int:
    limit, used = (int(_text(folder / name)) for name in ("memory.max", "memory.current"))
    fields = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    return limit - used + int(fields["active_file"]) + int(fields["inactive_file"])


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def device_memory(device: torch.device) -> int:
    """Bytes that a process can use on a device: all of a GPU, the free part of RAM."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory - DEVICE_OVERHEAD
    return available_memory()


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had at most: of a GPU since the last call, of RAM since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)  # replayed graphs allocate nothing
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
