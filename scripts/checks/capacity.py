"""Speed of this machine at a run's work, and the shared memory that its loaders need."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from data.base import Source
from irv2 import build, input_pipeline
from irv2.config import Config
from irv2.training import prepare, step
from irv2.training.distributed import World

PREFETCHED = 2  # batches of each worker that wait to be fetched, torch's prefetch_factor
CPU_PIXELS = 32 * 75**2  # in a step that is timed on a CPU, where it may take minutes


def shared_memory(cfg: Config, micro_batch: int, workers: int, ranks: int) -> int:
    """Bytes of the batches that wait in /dev/shm: while a run evaluates, training's wait, too."""
    image = 3 * cfg.data.largest_size**2  # uint8
    return ranks * workers * PREFETCHED * (micro_batch + cfg.eval.batch) * image


# ---------------------------------------------------------------------------------- pace


def rate(take: Callable[[], int], warm_up: int, seconds: float) -> float:
    """Images per second of a function that takes some and returns how many.

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
    """Images per second that training's own loader gives with so many workers. Raises DataError."""
    data = cfg.data.model_copy(update={"workers": workers})
    order = input_pipeline.training_order(cfg, source)
    batches = input_pipeline.training_batches(
        cfg.model_copy(update={"data": data}), source, order, 0, micro_batch, world
    )
    try:
        # Not counted: the workers' start, and what they have made ahead by then.
        return rate(lambda: len(next(batches).labels), PREFETCHED * workers + 1, seconds)
    finally:
        batches.close()


def model_rate(
    cfg: Config, source: Source, micro_batch: int, world: World, seconds: float
) -> float:
    """Images per second of training steps on noise in memory, without accumulation."""
    is_cpu, num_classes = world.device.type == "cpu", len(source.classes)
    state = build.new_state(cfg, num_classes, world.device)
    options = build.step_options(cfg, 1, source, world)
    size, side = micro_batch, cfg.data.largest_size
    network = prepare.network(state, size, side, options, world)
    if is_cpu:  # at least two: batch norm needs more than one value per channel
        size = max(2, min(micro_batch, CPU_PIXELS // side**2))
    images = torch.rand((size, 3, side, side), device=world.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(size, device=world.device) % num_classes
    steps = 1 if is_cpu else 20  # before the device is waited for

    def take() -> int:
        for _ in range(steps):
            batches = iter([(images, labels)])
            step.train_step(state, network, batches, cfg.optim.lr, options, world)
        state.read_bad_steps()  # waits for a GPU
        return steps * size

    return rate(take, 1, seconds)
