"""How long a training step takes on any number of devices, from what one device and a link do.

Closed forms, on plain numbers: seconds, bytes, images. What they leave out is said at each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FORWARD_SHARE = 1 / 3  # backward multiplies twice where forward does once: by inputs, by weights
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's message of gradients
FIRST_BUCKET_BYTES = 2**20  # but its first one is this small


@dataclass(frozen=True)
class Device:
    """Work that one device does on its own.

    Forward and backward of b images take `overhead_s + b / images_per_s`: what launching costs
    whatever the batch, and a rate that only large batches reach.
    """

    images_per_s: float
    overhead_s: float
    update_s: float  # clipping, optimizer, averages: once a step
    overlaps: bool  # gradients travel while backward computes, without taking its time
    forward_share: float = FORWARD_SHARE


@dataclass(frozen=True)
class Link:
    """Connection that carries gradients, each way at once, between two devices or two nodes."""

    bytes_per_s: float
    latency_s: float  # of one message from one end to the other


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices."""

    device: Device
    inside: Link
    between: Link
    per_node: int


@dataclass(frozen=True)
class Gradients:
    """Bytes that ranks exchange once a step."""

    size: float  # bytes
    messages: int  # in which they travel


@dataclass(frozen=True)
class Step:
    """The parts of a step, in seconds. `exchange_s` is what gradients travel in all, `exposed_s`
    the part of it during which nothing else happens."""

    compute_s: float
    exchange_s: float
    exposed_s: float
    update_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s + self.update_s

    @property
    def hidden(self) -> float:
        """Share of the exchange during which backward computes; 1 where nothing is exchanged."""
        return 1 - self.exposed_s / self.exchange_s if self.exchange_s > 0 else 1.0


def ring_bytes(ranks: int, size: float) -> float:
    """Bytes that each of `ranks` sends (and receives) for an all-reduce of `size` bytes in a ring.

    2 (n - 1) / n of them: every rank passes n - 1 of n parts on to be summed, and n - 1 of n sums.
    """
    return 2 * (ranks - 1) / ranks * size


def buckets(parameter_bytes: float) -> int:
    """Messages in which DistributedDataParallel sends the gradients of so many bytes of parameters,
    whatever it rounds the gradients to."""
    return 1 + math.ceil(max(0.0, parameter_bytes - FIRST_BUCKET_BYTES) / BUCKET_BYTES)


def all_reduce_s(ranks: int, gradients: Gradients, link: Link) -> float:
    """Seconds for all-reduces of all messages, one after another, over equal links.

    The ring's bytes over the bandwidth, and 2 ceil(log2 n) latencies an all-reduce: up and down a
    tree, which libraries take where a ring's 2 (n - 1) would matter. 0 for one rank. Traffic of
    others on the link, and ranks that are late, are left out.
    """
    if ranks == 1:
        return 0.0
    hops = 2 * math.ceil(math.log2(ranks))
    travel = ring_bytes(ranks, gradients.size) / link.bytes_per_s
    return travel + gradients.messages * hops * link.latency_s


def exchange_s(cluster: Cluster, ranks: int, gradients: Gradients) -> float:
    """Seconds for the exchange of gradients over a cluster's first `ranks`.

    Over several nodes the ring passes through all devices of a node before it leaves it, so a
    node's link carries what a device's does, and the slower of both decides.
    """
    link = cluster.inside
    if ranks > cluster.per_node:
        bandwidth = min(cluster.inside.bytes_per_s, cluster.between.bytes_per_s)
        link = Link(bandwidth, cluster.between.latency_s)
    return all_reduce_s(ranks, gradients, link)


def compute_s(device: Device, images: int) -> float:
    """Seconds for forward and backward of one micro-batch."""
    return device.overhead_s + images / device.images_per_s


def pipelined_s(backward: float, exchange: float, pieces: int) -> float:
    """Seconds from the begin of backward to the last gradient's arrival.

    Each of `pieces` equal parts of the gradients can travel when its part of backward is done, one
    at a time: a pipeline of two stages. With one piece it is the sum of both, with endlessly many
    the larger of the two.
    """
    return max(backward + exchange / pieces, backward / pieces + exchange)


def step(
    cluster: Cluster, ranks: int, micro_batch: int, accumulation: int, gradients: Gradients
) -> Step:
    """A step of `accumulation` micro-batches on each of `ranks` devices.

    Gradients travel in the last micro-batch's backward.
    """
    device = cluster.device
    one = compute_s(device, micro_batch)
    exchange = exposed = exchange_s(cluster, ranks, gradients)
    if device.overlaps:
        backward = (1 - device.forward_share) * one
        exposed = pipelined_s(backward, exchange, gradients.messages) - backward
    return Step(accumulation * one, exchange, exposed, device.update_s)


def efficiency(one: Step, many: Step, ranks: int) -> float:
    """Share of `ranks` times one device's speed at the same global batch."""
    return one.total_s / (ranks * many.total_s)
