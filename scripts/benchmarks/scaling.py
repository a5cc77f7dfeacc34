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

from scripts.planning import devices, steptime

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [10, 20, 9]
SIZES = ((75, 32), (299, 4))  # px, and images of each process
GOAL = 1.7


def measure(rounds: int) -> dict[str, Any]:
    """For each size, in turn and `rounds` times: a step of one process and one of two, and apart
    from them forward, backward and the exchange."""
    cases = [{"image_size": px, "batch": batch, "blocks": BLOCKS} for px, batch in SIZES]
    found = run_ranks(cases, rounds)
    return {"cases": [{**case, **summary(times)} for case, times in zip(cases, found)]}


def run_ranks(cases: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """What two ranks under torchrun measure. Raises RuntimeError if they fail, having said why."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        ranks = ["-m", "scripts.benchmarks.scaling_ranks", "--cases", json.dumps(cases)]
        finished = subprocess.run(
            [sys.executable, *torchrun, *ranks, "--rounds", str(rounds), "--out", str(out)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if finished.returncode != 0:
            raise RuntimeError("the two processes failed; what they said stands above")
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
    """A step of two processes, from one process's parts and the exchange measured alone."""
    device = devices.measured_device(case, source).plain(1.0)
    link = devices.measured_link(case, source).plain()
    cluster = steptime.Cluster(device, link, link, per_node=2)
    size = case["gradient_bytes"]
    gradients = steptime.Gradients(size, steptime.buckets(size))
    return steptime.step(cluster, 2, case["batch"], 1, gradients).total_s


def table(found: dict[str, Any]) -> str:
    return "\n\n".join(
        "\n".join(part(found["cases"])) for part in (speeds, parts, exchanges, predictions)
    )


def speeds(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| network | one process, images/s | two | ratio (range) | goal |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        low, high = case["ratio_range"]
        batch = case["batch"]
        lines.append(
            f"| {named(case)} | {batch / case['one_s']:.3g} | {2 * batch / case['two_s']:.3g} | "
            f"**{case['ratio']:.2f}** ({low:.2f} to {high:.2f}) | ≥ {GOAL} |"
        )
    return lines


def parts(cases: list[dict[str, Any]]) -> list[str]:
    names = {
        "forward_s": "forward",
        "backward_s": "backward",
        "half_batch_s": "both, half the batch",
        "update_s": "rest of the step",
        "apart_s": "both in two processes at once, no exchange",
    }
    head = " | ".join(f"{name}, ms" for name in names.values())
    lines = [f"| parts | {head} |", f"|{'---|' * (len(names) + 1)}"]
    for case in cases:
        values = " | ".join(f"{1e3 * case[key]:.0f}" for key in names)
        lines.append(f"| {named(case)} | {values} |")
    return lines


def exchanges(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| exchange of the gradients alone | ms | MB/s |",
        "|---|---|---|",
    ]
    case = cases[0]  # the same bytes whatever the size of images
    for key, words, width in (
        ("reduce_of_one_s", "one process, float32", 1.0),
        ("reduce_s", "two processes, float32", 1.0),
        ("reduce_bf16_s", "two processes, bfloat16", 0.5),
    ):
        size = width * case["gradient_bytes"]
        rate = size / case[key] / 1e6
        lines.append(f"| {words}, {size / 1e6:.0f} MB | {1e3 * case[key]:.3g} | {rate:,.0f} |")
    lines.append(f"| two processes, 4 kB | {1e3 * case['message_s']:.2g} | |")
    return lines


def predictions(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| a step of two processes | predicted, ms | measured, ms | difference |",
        "|---|---|---|---|",
    ]
    for case in cases:
        expected = predicted_s(case, "this run")
        lines.append(
            f"| {named(case)} | {1e3 * expected:.0f} | {1e3 * case['two_s']:.0f} | "
            f"{expected / case['two_s'] - 1:+.0%} |"
        )
    return lines


def named(case: dict[str, Any]) -> str:
    return f"{case['image_size']} px, {case['batch']} images a process"
