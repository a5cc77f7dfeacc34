"""Checks of the machine: disk, shared memory, memory, and whether the loader keeps up."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from data.shards import disk_cache
from data.workers import worker_errors
from irv2 import build
from irv2.network import memory
from irv2.run import directory
from irv2.training import batch, distributed
from scripts.checks import capacity
from scripts.checks.case import FAIL, OK, WARN, Case, Finding, in_bytes, room

SHM = Path("/dev/shm")
LITTLE_WAIT = 0.03  # share of the time
HEADROOM = 1.1  # the loader's pace over the model's where workers are suggested


def check_disk(case: Case) -> Iterator[Finding]:
    """Check that the disk has room for checkpoints and best weights."""
    own = case.cfg.directory
    place = next(p for p in (own, *own.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        yield Finding(FAIL, f"{place}: may not be written", "set run.dir=… to another place")
        return
    sizes = build.memory_sizes(case.cfg, len(case.train.classes))
    keep = case.cfg.checkpoint.keep
    there = sum(path.stat().st_size for old in directory.checkpoints(own) for path in old.iterdir())
    # One more checkpoint than kept is being written, one is being removed; best weights likewise.
    need = max(0, (keep + 2) * sizes.checkpoint - there) + 2 * sizes.weights
    yield room(
        f"{place}: {{have}} free, {{need}} needed for {keep} + 2 checkpoints of "
        f"{sizes.checkpoint / 1e6:,.0f} MB and best.safetensors",
        shutil.disk_usage(place).free,
        need,
        2.0,
        "make room, set run.dir=… to another disk, or keep fewer (checkpoint.keep)",
    )


def check_cache(case: Case) -> Iterator[Finding]:
    """Check that images of an object store are cached on a disk with room for them."""
    data = case.cfg.data
    if not any("://" in spec for spec in (data.train, data.val)):
        yield Finding(OK, "not used: the images lie in folders")
        return
    if data.cache_dir is None:
        what = "data.cache_dir is not set: every epoch will fetch all images anew"
        yield Finding(WARN, what, "set data.cache_dir=… to a folder of a local disk")
        return
    folder = Path(data.cache_dir)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        yield Finding(FAIL, f"{place}: may not be written", "set data.cache_dir=… to another place")
        return
    have = shutil.disk_usage(place).free + disk_cache.size_of(str(folder))
    need = int(data.cache_gb * 1e9)
    what = f"{folder}: {in_bytes(have)} free or in the cache, {in_bytes(need)} allowed to it"
    todo = "the run will go on without a cache when the disk is full: set a smaller data.cache_gb"
    is_enough = have >= need
    figures = {"have": have, "need": need}
    yield Finding(OK if is_enough else WARN, what, "" if is_enough else todo, figures=figures)


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """Check that /dev/shm has room for the batches that workers prepare."""
    ranks = case.options.ranks
    need = capacity.shared_memory(case.cfg, case.division.micro_batch, case.workers, ranks)
    if need == 0 or not SHM.is_dir():
        yield Finding(OK, "not used" if need == 0 else f"{SHM}: not on this system")
        return
    yield room(
        f"{SHM}: {{have}} free, {{need}} needed for the batches of {ranks} x {case.workers} "
        "workers",
        shutil.disk_usage(SHM).free,
        need,
        2.0,
        "make it larger (docker run --shm-size=…, or mount -o remount,size=… /dev/shm), or set "
        "fewer data.workers, or a smaller train.micro_batch and eval.batch",
    )


def check_memory(case: Case) -> Iterator[Finding]:
    """Compare RAM and a GPU's memory with an estimate of what training holds."""
    micro, ranks = case.division.micro_batch, case.options.ranks
    sizes = build.memory_sizes(case.cfg, len(case.train.classes))
    on_gpu = sizes.training(micro) + memory.DEVICE_OVERHEAD
    at = f"at train.micro_batch={micro}, {case.cfg.train.precision}"
    # The saver's copy on the host, and a part of it as the bytes of a file.
    need = sizes.checkpoint + memory.SLOTS * sizes.trainable
    smaller = "a smaller train.micro_batch, or model.grad_checkpointing=true"
    if case.has_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        what = f"GPU: {{have}}, about {{need}} needed {at}"
        yield room(what, total, on_gpu, 1.1, f"set {smaller}")
    else:
        figures = {"need": on_gpu}
        yield Finding(OK, f"a GPU would need about {in_bytes(on_gpu)} {at}", figures=figures)
        need += ranks * sizes.training(micro)
    what = "RAM: {have} available, about {need} needed"
    yield room(what, memory.available_memory(), need, 1.25, f"free some, or set {smaller}")


def check_pace(case: Case) -> Iterator[Finding]:
    """Compare the loader's images per second with the network's."""
    cfg, micro, seconds = case.cfg, case.division.micro_batch, case.options.seconds
    try:
        with distributed.start(cfg.run.device, cfg.run.timeout_s, cfg.run.deterministic) as world:
            with worker_errors():
                loads = {
                    workers: capacity.loader_rate(cfg, case.train, micro, world, workers, seconds)
                    for workers in sorted({1, case.workers})
                }
            model = capacity.model_rate(cfg, case.train, micro, world, seconds)
    except torch.OutOfMemoryError:
        todo = "set a smaller train.micro_batch, or model.grad_checkpointing=true"
        yield Finding(FAIL, f"a step of {micro} images does not fit into the GPU", todo)
        return
    yield pace_finding(model, loads, case.workers, case.cores, shares_cores=not case.has_gpu)
    if case.has_gpu:
        ranks, classes = case.options.ranks, len(case.train.classes)
        free = batch.memory_room(world.device, ranks)
        fits = build.fitting_micro_batch(cfg, classes, ranks, free)
        yield expectation(model, loads, case.workers, case.cores, fits, len(case.train) / ranks)


def expectation(
    model: float, loads: dict[int, float], workers: int, cores: int, fits: int, images: float
) -> Finding:
    """Say what a rank on a GPU will do: its pace, an epoch of so many images, and what bounds it.

    loads: as in `pace_finding`; fits: the largest micro-batch that memory should hold.
    """
    now = loads[workers]
    pace = min(model, now) if workers else 1 / (1 / model + 1 / now)
    bound = "the GPU" if now >= model and workers else "the loader"
    minutes = math.ceil(images / pace / 60)
    what = (
        f"expect {digits(pace)} images/s on each GPU, an epoch in {minutes // 60}:{minutes % 60:02}"
        f" h: it takes {digits(model)}, the loader gives {digits(now)}, all {cores} cores could "
        f"give about {digits(loads[1] * cores)}; {bound} is the bottleneck; "
        f"micro-batches of {fits} fit"
    )
    figures = {"images_per_s": pace, "bottleneck": bound, "micro_batch_fits": fits}
    return Finding(OK, what, figures=figures)


def pace_finding(
    model: float, loads: dict[int, float], workers: int, cores: int, shares_cores: bool
) -> Finding:
    """Judge images per second of one rank: the network's, and the loader's by its workers.

    `loads` has 1 worker and as many as are configured; 0 of them take turns with the network.
    """
    one, now = loads[1], loads[workers]
    wait = max(0.0, 1 - now / model) if workers else model / (model + now)
    needed = math.ceil(HEADROOM * model / one)
    figures = {
        "model_images_per_s": model,
        "loader_images_per_s": {str(count): pace for count, pace in loads.items()},
        "workers": workers,
        "workers_needed": needed,
        "waiting": wait,
    }
    paces = f"1 worker gives {digits(one)} images/s"
    if workers != 1:
        paces += f", {workers} give {digits(now)}"
    paces += f", the model takes {digits(model)}"
    if shares_cores:
        paces += " (both on the same cores)"
    if wait == 0:
        return Finding(OK, f"the loader keeps up: {paces}", figures=figures)
    what = f"the model will wait {wait:.0%} of the time: {paces}"
    if needed <= workers:
        todo = "more workers will not help, storage or memory holds them up: use shards, local disk"
    elif needed <= cores:
        todo = f"set data.workers={needed}"
    else:
        left = max(0.0, 1 - one * cores / model)
        todo = (
            f"set data.workers={cores}, the cores of a rank: it will still wait about {left:.0%}; "
            "more cores, or training images made smaller beforehand, would help"
        )
    is_little = wait < LITTLE_WAIT
    return Finding(OK if is_little else WARN, what, "" if is_little else todo, figures=figures)


def digits(pace: float) -> str:
    """Format images per second with at least two digits."""
    return f"{pace:,.0f}" if pace >= 10 else f"{pace:.2g}"
