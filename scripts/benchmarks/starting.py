"""Time from starting train.py to the end of its first step, without a compiler and with one."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from irv2.report import markdown
from irv2.run import jsonl

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
SMALL = ["data.train=synthetic:320x10", "data.val=synthetic:20x10", "train.max_steps=1"]
# The peer: timm compiled as a whole, for the first step on images that lie in memory.
PEER = """
import timm, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
model = timm.create_model("inception_resnet_v2").to(device, memory_format=torch.channels_last)
x = torch.rand({batch}, 3, {size}, {size}, device=device)
x = x.contiguous(memory_format=torch.channels_last)
with torch.autocast(device, torch.bfloat16):
    loss = torch.compile(model)(x).float().logsumexp(1).sum()
loss.backward()
print(float(loss))
"""


def measure(rounds: int, compiled: bool) -> dict[str, Any]:
    """Measure seconds to the first step of the quickstart; `compiled`: cold, and warm."""
    figures: dict[str, Any] = {"rounds": rounds, "compiled": compiled}
    if not compiled:
        seconds = [first_step([]) for _ in range(rounds)]
        return figures | {"start_s": statistics.median(seconds), "range_s": sorted(seconds)}
    with tempfile.TemporaryDirectory() as cold, tempfile.TemporaryDirectory() as other:
        options = ["train.compile=true", "train.precision=bf16"]
        figures["cold_s"] = first_step(options, cold)
        figures["warm_s"] = first_step(options, cold)
        figures["peer_cold_s"] = timms_first_step(other)
    return figures


def first_step(options: list[str], cache: str | None = None) -> float:
    """Seconds from starting train.py to the line of its first step."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory, "run")
        command = [sys.executable, "train.py", *QUICKSTART, *SMALL, *options, f"run.dir={run}"]
        started = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, env=_environment(cache), stdout=subprocess.DEVNULL
        ) as program:
            while not jsonl.read(run / "log.jsonl"):
                if program.poll() not in (None, 0):
                    raise RuntimeError(f"train.py ended with status {program.returncode}")
                time.sleep(0.02)
            seconds = time.perf_counter() - started
            program.kill()
    return seconds


def timms_first_step(cache: str) -> float:
    script = PEER.format(batch=32, size=75)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", script], env=_environment(cache), check=True, capture_output=True
    )
    return time.perf_counter() - started


def _environment(cache: str | None) -> dict[str, str]:
    return os.environ | ({} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": cache})


def table(figures: dict[str, Any]) -> str:
    if figures["compiled"]:
        cold, warm, peer = (figures[key] for key in ("cold_s", "warm_s", "peer_cold_s"))
        rows = [
            f"timm, compiled as a whole, nothing cached | {peer:.0f} | -",
            f"compiled by blocks, nothing cached | {cold:.0f} = **{cold / peer:.2f}** of it | "
            "≤ 0.5",
            f"compiled by blocks, cached | {warm:.0f} = **{warm / peer:.2f}** of it | ≤ 0.15",
        ]
    else:
        low, high = figures["range_s"][0], figures["range_s"][-1]
        rows = [f"without compiler | **{figures['start_s']:.1f}** ({low:.1f} to {high:.1f}) | < 15"]
    return markdown.table("start of train.py to its first step | seconds | goal", rows)
