"""One process with one thread against two of them that share gradients over gloo, on the CPU."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from irv2.report import markdown
from scripts.planning import devices, steptime

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [10, 20, 9]
SIZES = ((75, 32), (299, 4))  # px, and images of each process
GOAL = 1.7


def measure(rounds: int) -> dict[str, Any]:
    """Time, for each size and `rounds` times in turn, a step of one process and one of two, and
    separately forward, backward and the exchange."""
    cases = [{"image_size": px, "batch": batch, "blocks": BLOCKS} for px, batch in SIZES]
    measured = run_ranks(cases, rounds)
    return {"cases": [{**case, **summary(times)} for case, times in zip(cases, measured)]}


def run_ranks(cases: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Measure in two ranks under torchrun. Raises RuntimeError if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        ranks = ["-m", "scripts.benchmarks.scaling_ranks", "--cases", json.dumps(cases)]
        finished = subprocess.run(
            [sys.executable, *torchrun, *ranks, "--rounds", str(rounds), "--out", str(out)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if finished.returncode != 0:
            raise RuntimeError("the two processes failed; their messages stand above")
        return json.loads(out.read_text(encoding="utf-8"))


def summary(times: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds, of seconds and of how much faster two processes are than one."""
    medians = {k: statistics.median(v) for k, v in times.items() if isinstance(v, list)}
    ratios = sorted(2 * one / two for one, two in zip(times["one_s"], times["two_s"]))
    size = times["gradient_bytes"]
    rest = (
        one - f - b for one, f, b in zip(times["one_s"], times["forward_s"], times["backward_s"])
    )
    return {
        **medians,
        "update_s": max(0.0, statistics.median(rest)),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "gradient_bytes": size,
        "reduce_bytes_per_s": size / medians["reduce_s"],
        "reduce_of_one_bytes_per_s": size / medians["reduce_of_one_s"],
        "rounds": len(ratios),
    }


def predicted_s(case: dict[str, Any], source: str) -> float:
    """Predict a step of two processes from the parts of one and the exchange alone."""
    device, link = devices.measured(case, source)
    cluster = steptime.Cluster(device.plain(1.0), link.plain(), link.plain(), per_node=2)
    size = case["gradient_bytes"]
    gradients = steptime.Gradients(size, steptime.buckets(size))
    return steptime.step(cluster, 2, case["batch"], 1, gradients).total_s


def table(figures: dict[str, Any]) -> str:
    return "\n\n".join(part(figures["cases"]) for part in (speeds, parts, exchanges, predictions))


def speeds(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        (low, high), batch = case["ratio_range"], case["batch"]
        rows.append(
            f"{named(case)} | {batch / case['one_s']:.3g} | {2 * batch / case['two_s']:.3g} | "
            f"**{case['ratio']:.2f}** ({low:.2f} to {high:.2f}) | ≥ {GOAL}"
        )
    return markdown.table("network | one process, images/s | two | ratio (range) | goal", rows)


def parts(cases: list[dict[str, Any]]) -> str:
    names = {
        "forward_s": "forward",
        "backward_s": "backward",
        "half_batch_s": "both, half the batch",
        "update_s": "rest of the step",
        "apart_s": "both in two processes at once, no exchange",
    }
    rows = (
        " | ".join([named(case), *(f"{1e3 * case[key]:.0f}" for key in names)]) for case in cases
    )
    return markdown.table(" | ".join(["parts", *(f"{name}, ms" for name in names.values())]), rows)


def exchanges(cases: list[dict[str, Any]]) -> str:
    case, rows = cases[0], []  # the same bytes whatever the size of images
    for key, words, width in (
        ("reduce_of_one_s", "one process, float32", 1.0),
        ("reduce_s", "two processes, float32", 1.0),
        ("reduce_bf16_s", "two processes, bfloat16", 0.5),
    ):
        megabytes, seconds = width * case["gradient_bytes"] / 1e6, case[key]
        rate = f"{1e3 * seconds:.3g} | {megabytes / seconds:,.0f}"
        rows.append(f"{words}, {megabytes:.0f} MB | {rate}")
    rows.append(f"two processes, 4 kB | {1e3 * case['message_s']:.2g} |")
    return markdown.table("exchange of the gradients alone | ms | MB/s", rows)


def predictions(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        expected, measured = predicted_s(case, "this run"), case["two_s"]
        rows.append(
            f"{named(case)} | {1e3 * expected:.0f} | {1e3 * measured:.0f} | "
            f"{expected / measured - 1:+.0%}"
        )
    return markdown.table(
        "a step of two processes | predicted, ms | measured, ms | difference", rows
    )


def named(case: dict[str, Any]) -> str:
    return f"{case['image_size']} px, {case['batch']} images a process"
