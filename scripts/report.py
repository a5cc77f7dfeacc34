#!/usr/bin/env python3
"""Sum up a run from its log: result, pace, where it lies; with --out also a page and its curves.

  python scripts/report.py runs/quickstart
  python scripts/report.py runs/fashion_mnist --out docs/results/fashion_mnist

--out writes README.md, curves.png, and copies of log.jsonl, config.yaml and validate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irv2 import jsonl

Lines = list[dict[str, Any]]
COPIED = ("log.jsonl", "config.yaml", "validate.json")


def summary(run: Path, lines: Lines) -> list[tuple[str, str]]:
    """(name, value) rows; the result is validate.py's of the last step, else train.py's."""
    last = next(line for line in reversed(lines) if line["kind"] == "train")
    result = next(line for line in reversed(lines) if line["kind"] == "eval")
    if (run / "validate.json").exists():
        validated = json.loads((run / "validate.json").read_text(encoding="utf-8"))
        result = validated if validated.get("step") == last["step"] else result
    pace = statistics.median(line["images_per_s"] for line in lines if line["kind"] == "train")
    minutes, seconds = divmod(round(last["images_seen"] / pace), 60)
    tensorboard = os.path.relpath(Path(sys.executable).parent / "tensorboard")
    return [
        ("top-1", f"{result['top1']:.2f} %"),
        ("top-5", f"{result['top5']:.2f} %"),
        ("evaluated", f"{result['images']:,} images, {result['weights']} weights"),
        ("trained", f"{last['epoch']:.1f} epochs, {last['step']:,} steps"),
        ("pace", f"{pace:.0f} images/s (median), {last['data_wait']:.0%} of the time on data"),
        ("time", f"{minutes} min {seconds} s of training at that pace"),
        ("run", f"{run}"),
        ("watch", f"{tensorboard} --logdir {run}"),
    ]


def draw_curves(lines: Lines, path: Path) -> None:
    """Training loss and rate, and top-1 of averaged and raw weights, over epochs."""
    training = [line for line in lines if line["kind"] == "train"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    epochs = [line["epoch"] for line in training]
    left.plot(epochs, [line["loss"] for line in training], linewidth=0.8, color="tab:blue")
    left.set(xlabel="epoch", ylabel="training loss", title="Loss (with label smoothing)")
    rate = left.twinx()
    rate.plot(epochs, [line["lr"] for line in training], linewidth=0.8, color="tab:orange")
    rate.set_ylabel("learning rate", color="tab:orange")
    rate.set_ylim(bottom=0)
    for which, label in (("ema", "averaged weights"), ("raw", "raw weights")):
        evals = [e for e in lines if e["kind"] == "eval" and e["weights"] == which]
        right.plot([e["epoch"] for e in evals], [e["top1"] for e in evals], "o-", label=label)
    right.set(xlabel="epoch", ylabel="top-1, %", title="Validation")
    right.legend()
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_page(run: Path, lines: Lines, out: Path) -> None:
    """README.md with the summary, curves and evaluations, beside what they were made from."""
    out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (run / name).exists():
            shutil.copyfile(run / name, out / name)
    draw_curves(lines, out / "curves.png")
    name = yaml.safe_load((run / "config.yaml").read_text())["run"]["name"]
    rows = [f"| {key} | {value} |" for key, value in summary(run, lines)]
    evals = [
        f"| {e['epoch']:.2f} | {e['weights']} | {e['top1']:.2f} | {e['top5']:.2f} "
        f"| {e['loss']:.4f} | {e['images']:,} |"
        for e in lines
        if e["kind"] == "eval"
    ]
    page = [
        f"# {name}",
        "",
        f"Made by `python scripts/report.py {run} --out {out}`.",
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
        "![training loss, learning rate and top-1 over epochs](curves.png)",
        "",
        "| epoch | weights | top-1, % | top-5, % | loss | images |",
        "|---|---|---|---|---|---|",
        *evals,
        "",
    ]
    (out / "README.md").write_text("\n".join(page), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, help="folder for the page")
    arguments = parser.parse_args()
    lines = jsonl.read(arguments.run / "log.jsonl")
    if not {"train", "eval"} <= {line["kind"] for line in lines}:
        print(f"report.py: {arguments.run}: no log of an evaluated run in it", file=sys.stderr)
        return 1
    print("\n".join(f"{key:<10} {value}" for key, value in summary(arguments.run, lines)))
    if arguments.out is not None:
        write_page(arguments.run, lines, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
