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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irv2 import checkpoint, config, program
from irv2.config import Config, Model
from irv2.distributed import WorldError
from scripts.arguments import positive
from scripts.pages import replace_section
from scripts.planning import devices, network, prediction
from scripts.planning.devices import Device, Figure, Link, PlanError, Table
from scripts.planning.prediction import Needs, Prediction, Run
from scripts.planning.steptime import Cluster

IMAGENET, CLASSES = 1_281_167, 1000
RANKS = [2**n for n in range(11)]
LIMIT = RANKS[-1]


def choose(table: Table, name: str, between: str | None) -> tuple[Device, Link, Link]:
    """A device and its links inside a node and between nodes. Raises PlanError for a name that
    the table lacks."""
    if name == "cpu" and name not in table.devices:
        raise PlanError(
            "device cpu has to be measured where it is: python scripts/benchmark.py scaling "
            "--json cpu.json, then --measured cpu.json"
        )
    if name not in table.devices:
        raise PlanError(devices.nearest("device", name, table.devices))
    device = table.devices[name]
    if between is not None and between not in table.links:
        raise PlanError(devices.nearest("link", between, table.links))
    return device, table.links[device.inside], table.links[between or device.between]


def work_of(cfg: Config, num_classes: int, device: Device) -> float:
    """How much longer an image takes than those of the device's figure, the full network's."""
    asked = network.multiply_adds(cfg.model, num_classes, cfg.data.image_size)
    stated = network.multiply_adds(Model(), CLASSES, device.image_size)
    recomputed = 4 / 3 if cfg.model.grad_checkpointing else 1.0  # forward once more
    return recomputed * asked / stated


def predictions(
    run: Run, cluster: Cluster, needs: Needs, gpus: int | None
) -> tuple[list[Prediction], list[int]]:
    """For so many ranks, or for 1 to 1024; and the numbers of ranks that cannot share the batch.

    Raises WorldError if the one number asked for cannot.
    """
    if gpus is not None:
        return [prediction.predict(run, cluster, gpus, needs)], []
    found, refused = [], []
    for ranks in RANKS:
        try:
            found.append(prediction.predict(run, cluster, ranks, needs))
        except WorldError:
            refused.append(ranks)
    return found, refused


# ---------------------------------------------------------------------------------- words


COLUMNS = (
    "ranks | images at once (of full speed) | ms a step | images/s | efficiency | hours | cost, USD"
    " | sent a step and rank, MB | exchange, ms (hidden) | loader cores a node | reading, MB/s"
)


def table_of(found: list[Prediction]) -> list[str]:
    lines = [f"| {COLUMNS} |", f"|{'---|' * (COLUMNS.count('|') + 1)}"]
    for row in found:
        micro, accumulation = row.division
        times = f"{accumulation} x " if accumulation > 1 else ""
        travel = f"{1e3 * row.step.exchange_s:.3g} ({row.hidden:.0%})" if row.ranks > 1 else "-"
        cells = (
            f"{row.ranks}",
            f"{times}{micro} ({row.fill:.0%})",
            f"{1e3 * row.step.total_s:.4g}",
            f"{row.images_per_s:,.0f}",
            f"{row.efficiency:.0%}",
            f"{row.hours:,.1f}",
            "-" if row.cost is None else f"{row.cost:,.0f}",
            f"{row.sent_bytes / 1e6:.0f}",
            travel,
            f"{row.loader_cores:.1f}",
            f"{row.read_bytes_per_s / 1e6:,.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def limits(run: Run, cluster: Cluster, refused: list[int]) -> list[str]:
    """Where the global batch stops scaling, and why."""
    most = {share: prediction.most_ranks(run, cluster, share, LIMIT) for share in (0.8, 0.5)}
    told = ", ".join(
        f"{ranks} ranks ({run.global_batch // ranks} images each) at {share:.0%} efficiency or more"
        for share, ranks in most.items()
    )
    lines = [f"A global batch of {run.global_batch} scales up to {told}."]
    if refused:
        numbers = ", ".join(map(str, refused))
        lines.append(
            f"No row for {numbers}: so many ranks have no equal micro-batches of these images; "
            "another train.global_batch would give them some, and is another experiment."
        )
    return lines


def precision_note(cfg: Config, device: Device) -> list[str]:
    """A warning where the device's figures are of another precision than the config's."""
    asked = "fp32" if cfg.train.precision == "fp32" else "bf16"
    if asked == device.precision:
        return []
    which = "fast" if asked == "fp32" else "slow"
    return [
        f"Too {which} a plan: the device's figures are of {device.precision}, and the config has "
        f"train.precision={cfg.train.precision}."
    ]


def figures(device: Device, inside: Link, between: Link, table: Table) -> dict[str, Figure | None]:
    """What a plan rests on, by name."""
    return {
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


def origins(chosen: dict[str, Figure | None]) -> list[str]:
    """Every figure that a plan rests on, with its source."""
    lines = ["| figure | value | | source |", "|---|---|---|---|"]
    for name, figure in chosen.items():
        if figure is not None:
            source = " ".join(figure.source.split())
            lines.append(f"| {name} | {figure.value:,.6g} | {figure.kind} | {source} |")
    return lines


def describe(cfg: Config, run: Run, weight: network.Weight) -> list[str]:
    return [
        f"{cfg.run.name}: {run.epochs:g} epochs of {run.images:,} images, {cfg.data.image_size} px,"
        f" global batch {run.global_batch}: {run.steps:,} steps. {weight.parameters:,} parameters "
        f"trained: {run.gradients.size / 1e6:.0f} MB of gradients in "
        f"{run.gradients.messages} messages ({cfg.train.reduce_dtype}); a checkpoint has "
        f"{weight.checkpoint_bytes / 1e6:.0f} MB."
    ]


# ---------------------------------------------------------------------------------- program


def plan(arguments: argparse.Namespace) -> tuple[str, list[Prediction]]:
    """The text of a plan, and its rows. Raises ConfigError, PlanError or WorldError."""
    cfg = config.load(arguments.config, arguments.overrides)
    if cfg.train.micro_batch == "auto":
        raise PlanError(
            "train.micro_batch=auto is found on the device itself, which a plan has not at hand: "
            "say how many images it holds, such as train.micro_batch=80"
        )
    table = devices.load(arguments.table)
    if arguments.measured is not None:
        table = devices.with_measured(table, arguments.measured, cfg.data.image_size)
    device, inside, between = choose(table, arguments.device, arguments.between)
    work = work_of(cfg, arguments.classes, device)
    cluster = Cluster(device.plain(work), inside.plain(), between.plain(), arguments.gpus_per_node)
    weight = network.weigh(cfg, arguments.classes)
    run = Run(
        images=arguments.images,
        epochs=cfg.train.epochs,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
        gradients=weight.gradients,
        max_steps=cfg.train.max_steps,
    )
    needs = Needs(
        table.images.mean_bytes.value,
        table.images.per_core_per_s.value,
        None if device.price_per_hour is None else device.price_per_hour.value,
    )
    found, refused = predictions(run, cluster, needs, arguments.gpus)
    parts = [
        describe(cfg, run, weight),
        table_of(found),
        [*limits(run, cluster, refused), *precision_note(cfg, device)],
        [f"{arguments.device}, {arguments.gpus_per_node} a node. The plan rests on:"],
        origins(figures(device, inside, between, table)),
    ]
    return "\n\n".join("\n".join(part) for part in parts), found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="for so many (default: a table, 1 to 1024)"
    )
    parser.add_argument("--device", metavar="NAME", help="default: h100, or with --measured cpu")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--between", metavar="LINK", help="link between nodes (default: the device's in the table)"
    )
    parser.add_argument(
        "--images", type=positive, default=IMAGENET, help="of an epoch (default: ImageNet's)"
    )
    parser.add_argument("--classes", type=positive, default=CLASSES, help="default: 1000")
    parser.add_argument(
        "--table", type=Path, default=devices.TABLE, metavar="YAML", help="another devices.yaml"
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="device cpu, from python scripts/benchmark.py scaling --json FILE",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows here")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="put the plan into this page's section 'plan'"
    )
    arguments = parser.parse_intermixed_args()
    arguments.device = arguments.device or ("h100" if arguments.measured is None else "cpu")
    return arguments


def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()

    def body() -> int:
        text, found = plan(arguments)
        print(text)
        if arguments.page is not None:
            replace_section(arguments.page, "plan", text)
        if arguments.json is not None:
            content = json.dumps([asdict(row) for row in found], indent=1) + "\n"
            checkpoint.write_atomically(arguments.json, lambda file: file.write(content.encode()))
        return 0

    mistakes = (config.ConfigError, PlanError, WorldError, OSError)
    return program.exit_status(body, mistakes, of_one_rank=())


if __name__ == "__main__":
    sys.exit(main())
