#!/usr/bin/env python3
"""Predict a whole training run on any number of GPUs: time, cost, traffic, loaders, storage.

  python scripts/plan.py configs/irv2_rmsprop.yaml                    a table, 1 to 1024 H100
  python scripts/plan.py configs/irv2_rmsprop.yaml --gpus 32 --device a100-80gb
  python scripts/plan.py configs/irv2_rmsprop.yaml --between ethernet-25 train.reduce_dtype=bf16
  python scripts/plan.py configs/irv2_rmsprop.yaml train.global_batch=4096 train.micro_batch=128
  python scripts/benchmark.py scaling --json cpu.json
  python scripts/plan.py configs/quickstart.yaml --images 1437 --classes 10 --device cpu \\
      --measured cpu.json --gpus 2

Devices, links, prices and their sources stand in scripts/planning/devices.yaml; every figure is
measured, published or an estimate, and a plan says which it used. The formulas, with what they
leave out, are in scripts/planning/steptime.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import UserError
from data.files import write_atomically
from irv2 import build, cli, config_file
from irv2.cli import positive
from irv2.config import Config
from irv2.network.memory import Sizes
from irv2.report import markdown
from irv2.sections import Model
from irv2.training.schedule import total_steps
from scripts.planning import devices, prediction, steptime
from scripts.planning.devices import DeviceEntry, DeviceTable, Figure, LinkEntry
from scripts.planning.prediction import Workload
from scripts.planning.steptime import Cluster, Gradients, Step

IMAGENET, CLASSES = 1_281_167, 1000
RANKS = [2**n for n in range(11)]
SENT_BYTES = {"fp32": 4, "bf16": 2}  # of one gradient, by train.reduce_dtype
COLUMNS = (
    "ranks | images at once (of full speed) | ms a step | images/s | efficiency | hours | cost, USD"
    " | sent a step and rank, MB | exchange, ms (hidden) | loader cores a node | reading, MB/s"
)


# ---------------------------------------------------------------------------------- the network


def gradients(cfg: Config, sizes: Sizes) -> Gradients:
    """Bytes that ranks exchange once a step."""
    size = sizes.trainable // 4 * SENT_BYTES[cfg.train.reduce_dtype]
    return Gradients(size, steptime.buckets(sizes.trainable))


def work_of(cfg: Config, num_classes: int, device: DeviceEntry) -> float:
    """Work of an image relative to one of the device's figure, the full network's."""
    asked = sum(
        (end - begin) * multiply_adds(cfg.model, num_classes, size)
        for (begin, size), (end, _) in pairwise([*cfg.data.sizes, (1.0, 0)])
    )
    stated = multiply_adds(Model(), CLASSES, device.image_size)
    recomputed = 4 / 3 if cfg.model.grad_checkpointing else 1.0  # forward once more
    return recomputed * asked / stated


def multiply_adds(model: Model, num_classes: int, image_size: int) -> int:
    """Multiply-adds of convolutions and classifier for one image of `image_size` px, forward."""
    with torch.device("meta"), torch.no_grad():
        network = build.network(model, num_classes).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------------- words


def cells(row: dict[str, Any]) -> str:
    """A prediction as a row under COLUMNS."""
    (micro, accumulation), step = row["division"], row["step"]
    times = f"{accumulation} x " if accumulation > 1 else ""
    cost = "-" if row["cost"] is None else f"{row['cost']:,.0f}"
    travel = f"{1e3 * step.exchange_s:.3g} ({step.hidden:.0%})" if row["ranks"] > 1 else "-"
    return (
        f"{row['ranks']} | {times}{micro} ({row['fill']:.0%}) | {1e3 * step.total_s:.4g} | "
        f"{row['images_per_s']:,.0f} | {row['efficiency']:.0%} | {row['hours']:,.1f} | {cost} | "
        f"{row['sent_bytes'] / 1e6:.0f} | {travel} | {row['loader_cores']:.1f} | "
        f"{row['read_bytes_per_s'] / 1e6:,.1f}"
    )


def batch_in_words(rows: list[dict[str, Any]], lr: float) -> str:
    """Describe how the fewest and the most ranks share a step, which has one learning rate."""
    ends = dict.fromkeys(row["division"].in_words(row["ranks"]) for row in (rows[0], rows[-1]))
    return "\n".join([*ends, f"The rate, optim.lr={lr:g}, belongs to these images, not to ranks."])


def limits(workload: Workload, steps: dict[int, Step], refused: list[int]) -> list[str]:
    """Describe where the global batch stops scaling, and why."""
    most = {share: prediction.most_ranks(steps, share) for share in (0.8, 0.5)}
    reached = ", ".join(
        f"{ranks} ranks ({workload.global_batch // ranks} images each) at {share:.0%} efficiency "
        "or more"
        for share, ranks in most.items()
    )
    lines = [f"A global batch of {workload.global_batch} scales up to {reached}."]
    if refused:
        lines.append(
            f"No row for {', '.join(map(str, refused))}: so many ranks have no equal micro-batches "
            "of these images; another train.global_batch would give them some, and is another "
            "experiment."
        )
    return lines


def precision_note(asked: str, device: DeviceEntry) -> list[str]:
    """A warning where the device's figures are of another precision than `asked`, the config's."""
    if (asked == "fp32") == (device.precision == "fp32"):
        return []
    return [
        f"Too {'fast' if asked == 'fp32' else 'slow'} a plan: the device's figures are of "
        f"{device.precision}, and the config has train.precision={asked}."
    ]


def origins(device: DeviceEntry, inside: LinkEntry, between: LinkEntry, table: DeviceTable) -> str:
    """A table of every figure that a plan rests on, with its source."""
    figures: dict[str, Figure | None] = {
        f"images/s of a device at {device.image_size} px, large batches": device.images_per_s,
        "ms of a forward and backward, whatever the batch": device.overhead_ms,
        "ms of an update": device.update_ms,
        "inside a node, GB/s": inside.gigabytes_per_s,
        "inside a node, latency, µs": inside.latency_us,
        "between nodes, GB/s": between.gigabytes_per_s,
        "between nodes, latency, µs": between.latency_us,
        "USD an hour and device": device.price_per_hour,
        "bytes of an image's file": table.images.mean_bytes,
        "images/s of a loader's core": table.images.per_core_per_s,
    }
    rows = (
        f"{name} | {figure.value:,.6g} | {figure.kind} | {' '.join(figure.source.split())}"
        for name, figure in figures.items()
        if figure is not None
    )
    return markdown.table("figure | value | | source", rows)


# ---------------------------------------------------------------------------------- program


def plan(arguments: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The text of a plan, and its rows. Raises ConfigError, UserError or WorldError."""
    cfg = config_file.load(arguments.config, arguments.overrides)
    if cfg.train.micro_batch == "auto":
        raise UserError(
            "train.micro_batch=auto is found on the device itself, which a plan has not at hand: "
            "say how many images it holds, such as train.micro_batch=80"
        )
    table = devices.load(arguments.table)
    if arguments.measured is not None:
        table = devices.with_measured(table, arguments.measured, cfg.data.image_size)
    device, inside, between = table.choose(arguments.device, arguments.between)
    cluster = Cluster(
        device.plain(work_of(cfg, arguments.classes, device)),
        inside.plain(),
        between.plain(),
        arguments.gpus_per_node,
    )
    sizes, train = build.memory_sizes(cfg, arguments.classes), cfg.train
    workload = Workload(
        total_steps(arguments.images, train.epochs, train.global_batch, train.max_steps),
        train.global_batch,
        train.micro_batch,
        gradients(cfg, sizes),
        table.images.mean_bytes.value,
        table.images.per_core_per_s.value,
        device.price_per_hour and device.price_per_hour.value,
    )
    steps = prediction.every_step(workload, cluster, RANKS[-1])
    asked = [arguments.gpus] if arguments.gpus else [n for n in RANKS if n in steps]
    refused = [] if arguments.gpus else [n for n in RANKS if n not in steps]
    rows = [prediction.predict(workload, cluster, ranks) for ranks in asked]
    parts = [
        f"{cfg.run.name}: {train.epochs:g} epochs of {arguments.images:,} images, "
        f"{cfg.data.sizes_in_words}, global batch {train.global_batch}: {workload.steps:,} steps. "
        f"{sizes.trainable // 4:,} parameters trained: {workload.gradients.size / 1e6:.0f} MB of "
        f"gradients in {workload.gradients.messages} messages ({train.reduce_dtype}); a checkpoint "
        f"has {sizes.checkpoint / 1e6:.0f} MB.",
        markdown.table(COLUMNS, map(cells, rows)),
        batch_in_words(rows, cfg.optim.lr),
        "\n".join([*limits(workload, steps, refused), *precision_note(train.precision, device)]),
        f"{arguments.device}, {arguments.gpus_per_node} a node. The plan rests on:",
        origins(device, inside, between, table),
    ]
    return "\n\n".join(parts), rows


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("config", type=cli.location, metavar="CONFIG", help="YAML file of the run")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--gpus", type=positive, metavar="N", help="for so many (default: a table, 1 to 1024)")
    add("--device", metavar="NAME", help="default: h100, or with --measured cpu")
    add("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    add("--between", metavar="LINK", help="link between nodes (default: the device's in the table)")
    add("--images", type=positive, default=IMAGENET, help="of an epoch (default: ImageNet's)")
    add("--classes", type=positive, default=CLASSES, help="default: 1000")
    add(
        "--table", type=cli.path, default=devices.TABLE, metavar="YAML", help="another devices.yaml"
    )
    add(
        "--measured",
        type=cli.path,
        metavar="FILE",
        help="device cpu, from python scripts/benchmark.py scaling --json FILE",
    )
    add("--json", type=cli.path, metavar="OUT", help="also write the rows here")
    add(
        "--page", type=cli.path, metavar="FILE", help="put the plan into this page's section 'plan'"
    )
    arguments = parser.parse_intermixed_args()
    arguments.device = arguments.device or ("h100" if arguments.measured is None else "cpu")
    return arguments


@cli.program
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    text, rows = plan(arguments)
    print(text)
    if arguments.page is not None:
        markdown.replace_section(arguments.page, "plan", text)
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(rows, indent=1, default=asdict) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
