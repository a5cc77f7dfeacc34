"""Run the two programs as a user does, on a network and data small enough for a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from fork_server import OtherProgram, Program, environment
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RANKS = str(ROOT / "tests" / "ranks.py")
PATHS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
CONFIG = """
model: {blocks: [1, 1, 1], width: 0.25, bn_momentum: 0.5}
data: {image_size: 75, workers: 0}
train: {epochs: 3, global_batch: 8, micro_batch: 8}
eval: {every_epochs: 1, batch: 7}
checkpoint: {every_steps: 2}
log: {every_steps: 1, utilisation: false}
run: {device: cpu}
"""


def write_images(root: Path, classes: list[str], per_class: int, seed: int = 0) -> Path:
    """A folder of noisy one-coloured PNG files, a colour for each class."""
    rng = np.random.default_rng(seed)
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(per_class):
            pixels = np.full((40, 50, 3), 40 + 70 * i) + rng.integers(-30, 30, (40, 50, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{k}.png")
    return root


def write_project(folder: Path) -> Path:
    """Training and validation images and a config for them; returns the config's path."""
    write_images(folder / "train", ["a", "b", "c"], 7)
    write_images(folder / "val", ["a", "b", "c"], 4, seed=1)
    config = folder / "small.yaml"
    data = f"data: {{train: {folder / 'train'}, val: {folder / 'val'}, "
    run = f"run: {{dir: {folder / 'run'}, "
    config.write_text(CONFIG.replace("data: {", data).replace("run: {", run))
    return config


def start(
    program: str | Path,
    *arguments: object,
    ranks: int = 1,
    torchrun: tuple[str, ...] | None = None,
    as_user: bool = False,
    **options: object,
) -> subprocess.Popen[str]:
    """Start a program of the repository, by the fork server.

    torchrun: by torchrun, with these options of it, which is then forked as its ranks are; else
    tests/ranks.py forks several ranks. as_user: by a Python of its own, as are torchrun's ranks.
    options: of subprocess.Popen, as `cwd`, `stdin`, and `env` on top of `environment()`.
    """
    command = [str(ROOT / program), *map(str, arguments)]
    if torchrun is not None:
        forks = () if as_user else ("--run-path", "--start-method=fork")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launch, *forks, *torchrun, "--", *command]
    if as_user:
        return _start([sys.executable, *command], **options)
    if ranks > 1 and torchrun is None:
        command = [RANKS, str(ranks), *command]
    return _start(command, Program, **options)


def start_script(text: str) -> subprocess.Popen[str]:
    """Start a Python program that is a text; it can import the project and the tests' modules."""
    return _start(["-c", text], Program, env=PATHS)


def run_script_on_ranks(ranks: int, text: str) -> None:
    """Run a Python program that is a text as several ranks, to their end, which must be good."""
    result = finish(_start([RANKS, str(ranks), "-c", text], Program, env=PATHS))
    assert result.returncode == 0, result.stderr


def _start(
    command: list[str],
    kind: type[subprocess.Popen[str]] = subprocess.Popen,
    env: Mapping[str, str] = MappingProxyType({}),
    **options: object,
) -> subprocess.Popen[str]:
    """Start a command with its output in pipes, as text if nothing else is said."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return kind(command, env=environment() | env, **{**pipes, **options})


def finish(
    process: subprocess.Popen[str], timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a program; one that does not come in time is killed."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_elsewhere(
    folder: Path, *command: str, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python in another folder, to which nothing of this checkout leaks, nor back.

    command: "-m", a module and its arguments; or "-c", a text.
    """
    ours = {name: value for name, value in environment().items() if not name.startswith("PYT")}
    cache = {"XDG_CACHE_HOME": f"{folder}-cache"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return finish(OtherProgram(command, cwd=folder, env=ours | cache, **pipes), timeout_s)


def run(program: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; options as for `start`."""
    return finish(start(program, *arguments, **options))


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read a program's output up to the line that begins with `text`."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(text):
            return
    raise AssertionError(f"no line begins with {text!r}:\n{''.join(seen)}{process.stderr.read()}")


def children(pid: int) -> list[int]:
    """Processes that a process has started, their children before them."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [*children(child), child]
    return found


def is_alive(pid: int) -> bool:
    """True if a process runs; one that has ended and is still listed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def log_lines(run_directory: Path, kind: str) -> list[dict]:
    lines = (run_directory / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]
