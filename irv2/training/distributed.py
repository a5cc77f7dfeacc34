"""The world a process is part of: its rank, its device, and the few collectives a run needs."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import UserError
from data.names import shown

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's variables


class WorldError(UserError):
    """A request that the machine cannot fulfil."""


@dataclass(frozen=True)
class World:
    """This process among its peers. `control` is a CPU group for decisions ranks take together."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks, in one collective. All of one dtype."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])

    def same(self, value: int) -> bool:
        """True if all ranks give the same value."""
        if self.size == 1:
            return True
        bounds = torch.tensor([value, -value])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.control)
        return bool(bounds[0] == -bounds[1])

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values; the device is not touched."""
        if self.size == 1:
            return value
        least = torch.tensor([value])
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.control)
        return int(least)

    def say(self, text: str) -> None:
        """Print a line, on the main rank alone."""
        if self.is_main:
            print(shown(text), flush=True)

    def votes(self, *flags: bool) -> list[bool]:
        """True for each flag that at least one rank has set; the device is not touched."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in votes.tolist()]

    def any(self, flag: bool) -> bool:
        """True if at least one rank has set the flag; the device is not touched."""
        return self.votes(flag)[0]

    def gather(self, items: list) -> list:
        """The items of all ranks, in order of rank, on every rank; the device is not touched."""
        if self.size == 1:
            return list(items)
        lists: list = [None] * self.size
        dist.all_gather_object(lists, items, group=self.control)
        return [item for each in lists for item in each]


class Place(NamedTuple):
    """This process's place among those that a launcher has started, here and on all hosts."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def variables(self) -> dict[str, str]:
        """Environment variables by which torchrun would give a process this place."""
        return dict(zip(PLACE, map(str, self)))


def place() -> Place:
    """Return this process's place from torchrun's variables; without them it is the only process.

    Raises WorldError where the environment holds half of torchrun's variables, or nonsense: left
    over from something else, they would have a process wait for others, or hold its tongue for one.
    """
    given = {name: os.environ[name] for name in PLACE if name in os.environ}
    listed = " ".join(f"{name}={value}" for name, value in given.items())
    remedy = f"start the program by torchrun, or without them: unset {' '.join(given)}"
    if given and not {"RANK", "WORLD_SIZE"} <= given.keys():
        missing = " and ".join(name for name in ("RANK", "WORLD_SIZE") if name not in given)
        raise WorldError(f"the environment has {listed}, but no {missing}: {remedy}")
    if not all(re.fullmatch("[0-9]{1,9}", value) for value in given.values()):
        raise WorldError(f"the environment has {listed}, which are not all numbers: {remedy}")
    own = Place(*(int(given.get(name, default)) for name, default in zip(PLACE, Place())))
    if not (own.rank < own.size and own.local_rank < own.size):
        raise WorldError(f"the environment has {listed}, which do not go together: {remedy}")
    return own


def choose_device(name: str) -> torch.device:
    """Device of this process for "auto", "cpu" or "cuda". Raises WorldError if it is absent."""
    _, _, local_rank, local_ranks = place()
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and available == 0):
        return torch.device("cpu")
    if available == 0:
        raise WorldError("device cuda: this machine has no usable GPU; use cpu or auto")
    if local_ranks > available:
        raise WorldError(
            f"{local_ranks} ranks were started, but this machine has {available} GPUs: "
            f"use torchrun --nproc-per-node={available} or fewer"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of giving it back to the kernel.

    A step on the CPU allocates and frees gigabytes; getting them back as zeroed pages took a sixth
    of its time. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block comes straight from the kernel
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB at the heap's end


def _fresh_prefix(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Agree with the other ranks, through the store itself, on a prefix that no start has used.

    torchrun's store outlives a restart, and with it the addresses of dead ranks, and no variable of
    torchrun's counts the starts: each host counts its own restarts (pytorch#135712). So every rank
    calls by a name that it alone knows, and rank 0 answers with the prefix it has drawn, until each
    has confirmed it; answers to calls of dead ranks do no harm.
    Raises DistError if a rank does not come within `timeout`.
    """
    if rank > 0:
        name = secrets.token_hex(8)
        store.set(f"call/{rank}", name)
        prefix = store.get(f"answer/{name}").decode()
        store.set(f"{prefix}/has/{rank}", "")
        return prefix
    prefix, others = f"start-{secrets.token_hex(8)}", range(1, size)
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [other for other in others if not store.check([f"{prefix}/has/{other}"])]:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(
                f"ranks {missing} did not arrive within {timeout.total_seconds():g} s"
            )
        for other in missing:
            if store.check([f"call/{other}"]):
                store.set(f"answer/{store.get(f'call/{other}').decode()}", prefix)
        time.sleep(0.02)
    return prefix


def _join(device: torch.device, timeout: timedelta) -> None:
    """Join the process group of the environment: NCCL's on GPUs, gloo's on CPUs."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise WorldError(
            f"the environment has WORLD_SIZE={place().size}, but no {' and '.join(missing)}: start "
            f"the program by torchrun, or without its variables: unset {' '.join(PLACE)}"
        )
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(_fresh_prefix(store, rank, size, timeout), store)
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if is_cuda else None,
    )


def set_up(device: torch.device, deterministic: bool = False) -> None:
    """Configure the process for work on the device.

    Float32 means float32: TF32 is off, so that two devices can be compared. On CPUs all results
    repeat to the bit; on GPUs if they must be `deterministic`.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        repeat_results(deterministic)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()


def repeat_results(deterministic: bool) -> None:
    """Have operations on GPUs give the same bits each time, or else be as fast as they can.

    An operation that has no such form then raises RuntimeError, and is named in it. To be called
    before the first operation on a GPU.
    """
    torch.backends.cudnn.benchmark = not deterministic  # the fastest kernel is not always the same
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it unwritten
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def start(
    device_name: str, timeout_s: float = 600.0, deterministic: bool = False
) -> Iterator[World]:
    """Join the process group torchrun describes (none: a world of one) and leave it at the end.

    A rank that lets the others wait for `timeout_s` in a collective ends them all. deterministic:
    see `repeat_results`.
    """
    rank, size, *_ = place()
    device = choose_device(device_name)
    set_up(device, deterministic)
    if size == 1:
        yield World(0, 1, device)
        return
    _join(device, timedelta(seconds=timeout_s))
    control = dist.group.WORLD
    if device.type == "cuda":
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    yield World(rank, size, device, control)
    dist.destroy_process_group()  # not after an error: peers may wait in a collective for ever
