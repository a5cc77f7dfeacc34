"""A whole training run on any number of devices: time, cost, and what it needs of its machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from irv2 import distributed
from scripts.planning import steptime
from scripts.planning.steptime import Cluster, Gradients, Step


@dataclass(frozen=True)
class Run:
    """What of a config a plan rests on."""

    images: int  # of one epoch
    epochs: float
    global_batch: int
    micro_batch: int
    gradients: Gradients
    max_steps: int | None = None

    @property
    def steps(self) -> int:
        """Updates until the run's end, as train.py counts them."""
        steps = math.ceil(self.epochs * self.images / self.global_batch)
        return min(steps, self.max_steps or steps)


@dataclass(frozen=True)
class Needs:
    """What images cost and devices do, beside a step."""

    mean_bytes: float  # of an image's file
    per_core_per_s: float  # images that one core decodes and views
    price_per_hour: float | None  # of one device


@dataclass(frozen=True)
class Prediction:
    """A run on `ranks` devices."""

    ranks: int
    division: distributed.Division
    step: Step
    fill: float  # share of a device's speed that micro-batches of this size reach
    images_per_s: float
    efficiency: float  # share of `ranks` times one device's speed
    hours: float  # of steps alone: no evaluation, no start
    cost: float | None  # None: the price is not known
    sent_bytes: float  # by each rank, a step
    loader_cores: float  # of each node, whether full or not
    read_bytes_per_s: float  # from storage, by all nodes, if nothing is cached

    @property
    def hidden(self) -> float:
        """Share of the exchange during which backward computes; 1 where nothing is exchanged."""
        travels = self.step.exchange_s
        return 1 - self.step.exposed_s / travels if travels > 0 else 1.0


def predict(run: Run, cluster: Cluster, ranks: int, needs: Needs) -> Prediction:
    """A run on so many ranks. Raises WorldError if they cannot share the global batch."""
    division = distributed.divide_batch(run.global_batch, run.micro_batch, ranks)
    step, one = _step(run, cluster, ranks), _step(run, cluster, 1)
    pace = run.global_batch / step.total_s
    hours = run.steps * step.total_s / 3600
    wanted = division.micro_batch / cluster.device.images_per_s
    price = needs.price_per_hour
    return Prediction(
        ranks=ranks,
        division=division,
        step=step,
        fill=wanted / steptime.compute_s(cluster.device, division.micro_batch),
        images_per_s=pace,
        efficiency=steptime.efficiency(one, step, ranks),
        hours=hours,
        cost=None if price is None else price * ranks * hours,
        sent_bytes=steptime.ring_bytes(ranks, run.gradients.size),
        loader_cores=pace / ranks * min(ranks, cluster.per_node) / needs.per_core_per_s,
        read_bytes_per_s=pace * needs.mean_bytes,
    )


def _step(run: Run, cluster: Cluster, ranks: int) -> Step:
    division = distributed.divide_batch(run.global_batch, run.micro_batch, ranks)
    return steptime.step(cluster, ranks, *division, run.gradients)


def most_ranks(run: Run, cluster: Cluster, least_efficiency: float, limit: int) -> int:
    """The most ranks, up to `limit`, that share the batch with at least that efficiency."""
    one, most = _step(run, cluster, 1), 1
    for ranks in range(2, limit + 1):
        try:
            many = _step(run, cluster, ranks)
        except distributed.WorldError:
            continue
        if steptime.efficiency(one, many, ranks) >= least_efficiency:
            most = ranks
    return most
