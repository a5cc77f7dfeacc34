"""Everything that a GPU should show in a few minutes, in the order of its worth.

Each part (gpu_parts.py) is a process of its own, so that nothing runs beside it and one that hangs
can be cut. It reports each figure as it has it; what was reported before a cut counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from irv2.report import markdown

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, float | str]


class Piece(NamedTuple):
    """A part, and its share of the time; what a part leaves over goes to those behind it."""

    name: str
    share: float


PARTS = (
    Piece("ceilings", 0.04),
    Piece("eager", 0.12),
    Piece("graph", 0.24),
    Piece("identity", 0.18),
    Piece("timm-compiled", 0.18),
    Piece("inference", 0.08),
    Piece("end-to-end", 0.08),
    Piece("profile", 0.04),
    Piece("tests", 0.12),
)


class Line(NamedTuple):
    """A row of the table: our figure, the one beside it, and the least ratio that is the goal.

    A negative goal is the largest ratio.
    """

    words: str
    ours: str
    peer: str = ""
    goal: float | None = None


ROWS = (
    Line("large matrix product, bf16, TFLOP/s", "matrix_tflops"),
    Line("copy, TB/s", "copy_tb_s"),
    Line("whole step, eager, beside timm eager, images/s", "eager", "timm_eager", 2.2),
    Line("of it, forward and backward", "eager_forward_backward", "timm_eager_forward_backward"),
    Line("whole step, regions compiled, beside timm compiled", "regions", "timm_compiled"),
    Line("whole step, as CUDA graphs, beside timm compiled", "graph", "timm_compiled", 1.3),
    Line("the same beside timm eager", "graph", "timm_eager"),
    Line("compiling to the first step, seconds, beside timm's", "compile_s", "timm_compile_s"),
    Line("clipping, RMSProp, average, ms, beside timm's", "update_ms", "timm_update_ms"),
    Line("most memory, GiB, beside timm compiled", "graph_gib", "timm_compiled_gib", -0.8),
    Line("deterministic beside not, images/s", "deterministic", "not_deterministic", 0.85),
    *(
        Line(f"inference, batch {n}, compiled, images/s", f"infer_{n}", f"timm_infer_{n}", 1.15)
        for n in (128, 8, 1)
    ),
    Line("from JPEG files beside from memory, images/s", "from_files", "from_memory", 0.97),
    Line("share of the time that the GPU waits for its host", "gpu_waits"),
)
IDENTITY = {
    "identical_twice": "deterministic, the same steps in two processes",
    "identical_resumed": "deterministic, stopped, saved and resumed in a third",
    "identical_as_is": "not deterministic, in two processes",
}


class Outcome(NamedTuple):
    """End of a part: "done", "cut" or "failed", after so many seconds."""

    part: str
    how: str
    seconds: float
    reason: str = ""


def limits(minutes: float) -> Iterator[tuple[Piece, float]]:
    """Yield each part with the seconds it may take: its share of what is left by then."""
    started = time.monotonic()
    for i, part in enumerate(PARTS):
        left = 60 * minutes - (time.monotonic() - started)
        yield part, left * part.share / sum(other.share for other in PARTS[i:])


def measure(
    minutes: float, rehearsal: bool, ended: Callable[[Figures, list[Outcome]], None]
) -> tuple[Figures, list[Outcome]]:
    """Run the parts; `ended` is called after each with all that is known by then."""
    figures: Figures = {}
    outcomes: list[Outcome] = []
    for part, limit_s in limits(minutes):
        # The loader's imports take seconds, which the other parts can do without.
        module = ["end_to_end"] if part.name == "end-to-end" else ["gpu_parts", part.name]
        command = [sys.executable, "-m", f"scripts.benchmarks.{module[0]}", *module[1:]]
        command += ["--rehearsal"] if rehearsal else []
        outcomes.append(run(part.name, command, limit_s, figures))
        ended(figures, outcomes)
    return figures, outcomes


def run(name: str, command: list[str], limit_s: float, figures: Figures) -> Outcome:
    """Run a part for so long at most, and take its figures as it reports them."""
    started, chatter = time.monotonic(), deque(maxlen=40)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as program:
        cut = threading.Event()

        def end() -> None:
            cut.set()
            _kill(program)

        timer = threading.Timer(limit_s, end)
        timer.start()
        for line in map(str.strip, program.stdout):
            if line and not _take(line, figures):
                chatter.append(line)
        status = program.wait()
        timer.cancel()
    how = "cut" if cut.is_set() else "failed" if status else "done"
    if how != "done":
        print(*chatter, sep="\n  ", flush=True)
    reason = "" if how == "done" or not chatter else chatter[-1]
    return Outcome(name, how, time.monotonic() - started, reason)


def _take(line: str, figures: Figures) -> bool:
    """Take a line that is a figure; others are a part's chatter."""
    try:
        figures.update(json.loads(line))
    except (ValueError, TypeError):
        return False
    print(f"  {line}", flush=True)
    return True


def _kill(program: subprocess.Popen) -> None:
    """Kill a part with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)


# ----------------------------------------------------------------------------------- what it says


def table(figures: Figures, outcomes: list[Outcome]) -> str:
    """Make the page's section of what is known."""
    head = "bf16, 299 px, batch 128 | ours | beside it | ratio | goal"
    parts = [markdown.table(head, [_cells(row, figures) for row in ROWS])]
    parts += [
        markdown.table(
            "the same bits | tensors",
            [f"{words} | {figures.get(key, 'not measured')}" for key, words in IDENTITY.items()],
        )
    ]
    families = {key[7:]: ms for key, ms in figures.items() if key.startswith("family ")}
    if families:
        rows = sorted(families.items(), key=lambda pair: -pair[1])
        rows = [f"{name} | {ms:.2f}" for name, ms in rows]
        parts.append(markdown.table("kernels of a step as CUDA graphs | ms", rows))
    if "tests" in figures:
        parts.append(f"`pytest -m gpu`: {figures['tests']}")
    cut = [f"{o.part} {o.how} after {o.seconds:.0f} s" for o in outcomes if o.how != "done"]
    return "\n\n".join([*parts, *([f"Not whole: {'; '.join(cut)}."] if cut else [])])


def _cells(row: Line, figures: Figures) -> str:
    ours, peer, ratio = figures.get(row.ours), figures.get(row.peer), _ratio(row, figures)
    goal = "-" if row.goal is None else f"{'≥' if row.goal > 0 else '≤'} {abs(row.goal):g}"
    shown = [f"{v:.4g}" if v is not None else "not measured" for v in (ours, peer)]
    shown[1] = shown[1] if row.peer else ""
    return f"{row.words} | {shown[0]} | {shown[1]} | {f'**{ratio:.2f}**' if ratio else ''} | {goal}"


def _ratio(row: Line, figures: Figures) -> float | None:
    ours, peer = figures.get(row.ours), figures.get(row.peer)
    return ours / peer if ours and peer else None


def look_first(figures: Figures, outcomes: list[Outcome]) -> list[str]:
    """List what to look at, the most important first."""
    lines = [f"{o.part} failed: {o.reason}" for o in outcomes if o.how == "failed"]
    for key, words in IDENTITY.items():
        same, _, total = str(figures.get(key, "")).partition(" of ")
        if key != "identical_as_is" and same != total:
            lines.append(f"not identical: {words}: {figures[key]} tensors")
    short = []
    for row in ROWS:
        ratio = _ratio(row, figures)
        if row.goal is not None and ratio is not None:
            reached = ratio / row.goal if row.goal > 0 else -row.goal / ratio
            if reached < 1:
                short.append((reached, f"{row.words}: {ratio:.2f}, goal {abs(row.goal):g}"))
    lines += [words for _, words in sorted(short)]
    return lines + [f"{o.part} was cut: {o.reason}" for o in outcomes if o.how == "cut"]
