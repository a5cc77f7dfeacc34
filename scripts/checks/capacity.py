"""What a run needs of a machine, and how fast that machine is: bytes and images a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import feed
import recipe
from data.sources import Source
from irv2 import engine
from irv2.config import Config
from irv2.distributed import World
from irv2.model import InceptionResnetV2

MEMINFO = Path("/proc/meminfo")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
SLOTS = 2  # that RMSpropTF keeps of each trainable parameter: mean square and momentum
UPDATE_COPIES = 3  # of all gradients, that it makes for the length of an update
PREFETCHED = 2  # batches of each worker that wait to be fetched, torch's prefetch_factor
DEVICE_OVERHEAD = 1 << 30  # CUDA's context, cuDNN's workspaces, fragmentation: about
CPU_PIXELS = 32 * 75**2  # of the images of a step that is timed on a CPU, where it may take minutes


@dataclass(frozen=True)
class Sizes:
    """Bytes of what training holds. Activations are those of one image."""

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
        """Most of it at once, about: at the start of backward or in the update.

        Backward adds the gradients of two activations while it goes from one to the next.
        """
        backward = (self.activations + 2 * self.largest_activation) * micro_batch
        passing = max(backward + self.cast_weights, UPDATE_COPIES * self.trainable)
        return self.checkpoint + self.trainable + passing


def sizes(cfg: Config, num_classes: int) -> Sizes:
    """Of the config's network at its image size and precision; computes with shapes alone."""
    section = cfg.model.model_copy(update={"grad_checkpointing": False})
    with torch.device("meta"):
        model = recipe.network(section, num_classes)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    low_precision = engine.PRECISIONS[cfg.train.precision]
    activations, largest = activation_bytes(
        model.to(low_precision or torch.float32), cfg.data.image_size, cfg.model.grad_checkpointing
    )
    cast_weights = trainable // 2 if low_precision else 0
    return Sizes(weights, trainable, activations, largest, cast_weights)


def activation_bytes(
    model: InceptionResnetV2, image_size: int, checkpointing: bool
) -> tuple[int, int]:
    """(all, the largest) of what autograd keeps of one image in training, the model's dtype.

    The model lies on the meta device. With gradient checkpointing the repeated blocks keep their
    inputs, and one of them at a time the rest.
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
        if key not in own:  # several operations may keep the same
            kept.setdefault(key, (storage.nbytes(), current))
        return tensor

    blocks = [*model.repeat, *model.repeat_1, *model.repeat_2]
    if checkpointing:
        for block in blocks:
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave)
    images = 2  # batch norm wants more than one value a channel
    x = torch.empty(
        (images, 3, image_size, image_size), dtype=next(model.parameters()).dtype, device="meta"
    )
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = model(x)  # holds what is kept while it is counted
    outside = sum(size for size, block in kept.values() if block is None)
    inside = [sum(size for size, of in kept.values() if of is block) for block in blocks]
    largest = max(size for size, _ in kept.values())
    return (outside + inputs + max(inside)) // images, largest // images


def shared_memory(cfg: Config, micro_batch: int, workers: int, ranks: int) -> int:
    """Bytes of the batches that wait in /dev/shm: while a run evaluates, training's wait, too."""
    image = 3 * cfg.data.image_size**2  # uint8
    return ranks * workers * PREFETCHED * (micro_batch + cfg.eval.batch) * image


def available_memory() -> int:
    """Bytes of RAM that can still be had, within the limit of a container (cgroup v2), if any."""
    lines = MEMINFO.read_text().splitlines()
    free_kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
    return int(free_kib) * 1024 if limit == "max" else min(int(free_kib) * 1024, int(limit))


# ---------------------------------------------------------------------------------- pace


def rate(take: Callable[[], int], warm_up: int, seconds: float) -> float:
    """Images a second of a function that takes some and returns how many.

    The first `warm_up` calls do not count, unless they have lasted for `seconds` themselves.
    """
    started = time.perf_counter()
    images = sum(take() for _ in range(warm_up))
    elapsed = time.perf_counter() - started
    if elapsed < seconds:
        started, images, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        images += take()
        elapsed = time.perf_counter() - started
    return images / elapsed


def loader_rate(
    cfg: Config, source: Source, micro_batch: int, world: World, workers: int, seconds: float
) -> float:
    """Images a second that training's own loader gives with so many workers. Raises DataError."""
    data = cfg.data.model_copy(update={"workers": workers})
    order = feed.training_order(cfg, source)
    batches = feed.training_batches(
        cfg.model_copy(update={"data": data}), source, order, 0, micro_batch, world
    )
    try:
        # Not counted: the workers' start, and what they have made ahead by then.
        return rate(lambda: len(next(batches).labels), PREFETCHED * workers + 1, seconds)
    finally:
        batches.close()


def model_rate(
    cfg: Config, num_classes: int, micro_batch: int, world: World, seconds: float
) -> float:
    """Images a second of training steps on noise that lies in memory, without accumulation."""
    is_cpu = world.device.type == "cpu"
    state = recipe.new_state(cfg, num_classes, world.device)
    network = state.model
    if cfg.train.compile:
        network.compile_regions()
    size = micro_batch
    if is_cpu:  # at least two: batch norm wants more than one value a channel
        size = max(2, min(micro_batch, CPU_PIXELS // cfg.data.image_size**2))
    images = torch.rand((size, 3, cfg.data.image_size, cfg.data.image_size), device=world.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(size, device=world.device) % num_classes
    options = engine.StepOptions(
        loss=engine.Loss(**cfg.loss.model_dump(exclude={"class_weights"})),
        clip_norm=cfg.optim.clip_norm,
        precision=cfg.train.precision,
        freeze_bn=cfg.model.freeze_bn,
    )
    steps = 1 if is_cpu else 5  # before the device is waited for

    def take() -> int:
        for _ in range(steps):
            batches = iter([(images, labels)])
            engine.train_step(state, network, batches, cfg.optim.lr, options, world)
        engine.read_bad_steps(state)  # waits for a GPU
        return steps * size

    return rate(take, 1, seconds)
