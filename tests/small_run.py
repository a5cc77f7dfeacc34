"""A small run that faults are injected into."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from programs import children, finish, log_lines, start, wait_for

Inject = Callable[[str], None]
HARMED = "tests/harmed.py"
STEPS, IMAGES = 6, 14
CONFIG = """
model: {{blocks: [1, 1, 1], width: 0.25, bn_momentum: 0.5}}
data: {{image_size: 75, workers: 0, train: {data}/train, val: {data}/val, max_bad_fraction: 1}}
train: {{epochs: 1.7, global_batch: 4, micro_batch: 4}}
eval: {{every_epochs: 1, batch: 2}}
checkpoint: {{every_steps: 2}}
log: {{every_steps: 1, ledger: true, utilisation: false}}
run: {{device: cpu}}
"""


def arguments(config: Path, directory: Path, *overrides: object) -> list[object]:
    return ["--config", config, f"run.dir={directory}", *overrides]


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a program and everything it has started."""
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks that torchrun has started, in order."""
    own = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, own.split()))


def lose_a_rank(config: Path, tmp_path: Path, inject: Inject, number: signal.Signals) -> None:
    """Send a signal to one of two ranks: the run must come back by itself and end."""
    inject(f"{number.name} of a rank under --max-restarts")
    place = arguments(config, tmp_path / "run", "run.timeout_s=30")
    process = start("train.py", *place, ranks=2, torchrun=("--max-restarts=1",))
    wait_for(process, "step 3/")
    os.kill(rank_pids(process)[1], number)
    result = finish(process)
    assert result.returncode == 0, result.stderr
    assert "continuing after step" in result.stdout
    assert f"finished: step {STEPS} of {STEPS}" in result.stdout
    assert [line["step"] for line in log_lines(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]
