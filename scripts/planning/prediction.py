"""A whole training run on any number of devices: time, cost, and what it needs of its machines."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from irv2.training import batch
from irv2.training.batch import Division
from irv2.training.distributed import WorldError
from scripts.planning import steptime
from scripts.planning.steptime import Cluster, Gradients, Step


@dataclass(frozen=True)
class Workload:
    """Facts of a run that a plan rests on: its steps, and what its images and devices cost."""

    steps: int
    global_batch: int
    micro_batch: int
    gradients: Gradients
    mean_bytes: float  # of an image's file
    per_core_per_s: float  # images that one core decodes and views
    price_per_hour: float | None  # of one device; None: not known

    def step(self, cluster: Cluster, ranks: int) -> tuple[Division, Step]:
        """One step on so many ranks. Raises WorldError if they cannot share the global batch."""
        division = batch.divide(self.global_batch, self.micro_batch, ranks)
        return division, steptime.step(cluster, ranks, *division, self.gradients)


def predict(workload: Workload, cluster: Cluster, ranks: int) -> dict[str, Any]:
    """A run on so many ranks, by name. Raises WorldError if they cannot share the global batch."""
    (division, step), (_, one) = workload.step(cluster, ranks), workload.step(cluster, 1)
    device, micro_batch = cluster.device, division.micro_batch
    pace, hours = workload.global_batch / step.total_s, workload.steps * step.total_s / 3600
    return {
        "ranks": ranks,
        "division": division,
        "step": step,
        # Share of a device's speed that micro-batches of this size reach.
        "fill": micro_batch / device.images_per_s / steptime.compute_s(device, micro_batch),
        "images_per_s": pace,
        "efficiency": steptime.efficiency(one, step, ranks),
        "hours": hours,  # of steps alone: no evaluation, no start
        "cost": None
        if workload.price_per_hour is None
        else workload.price_per_hour * ranks * hours,
        "sent_bytes": steptime.ring_bytes(ranks, workload.gradients.size),  # by each rank, a step
        # Of each node, whether full or not.
        "loader_cores": pace / ranks * min(ranks, cluster.per_node) / workload.per_core_per_s,
        "read_bytes_per_s": pace * workload.mean_bytes,  # by all nodes, if nothing is cached
    }


def every_step(workload: Workload, cluster: Cluster, most: int) -> dict[int, Step]:
    """A step on each number of ranks, up to `most`, that can share the batch.

    Raises WorldError if not even one rank can take it in equal parts.
    """
    steps = {1: workload.step(cluster, 1)[1]}
    for ranks in range(2, most + 1):
        with suppress(WorldError):
            steps[ranks] = workload.step(cluster, ranks)[1]
    return steps


def most_ranks(steps: dict[int, Step], least_efficiency: float) -> int:
    """The most of these ranks that reach at least that efficiency."""
    one = steps[1]
    return max(n for n in steps if steptime.efficiency(one, steps[n], n) >= least_efficiency)
