"""Diagrams: as inline SVG whose text and lines follow the page's colours, or as PNG.

No text that a user chose is drawn: names stand in the page, beside the diagrams.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from irv2.report.statistics import Bin, wilson

Lines = list[dict[str, Any]]
Draw = Callable[[Axes], None]

INK, FAINT = "#24292e", "#d5d9dd"  # in an SVG they become the page's own
COLOURS = ("#3d7ab8", "#d9822b", "#3c9d7a", "#c2527f", "#8368c4", "#9a8c3c", "#5b9fb5", "#b05a43")
STYLE = {
    "font.size": 9.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Panel:
    """A diagram with its title."""

    title: str
    svg: Markup


def run_colour(number: int) -> str:
    """Colour of run `number`, counted from 0."""
    return COLOURS[number % len(COLOURS)]


# ------------------------------------------------------------------------- formats


def inline_svg(draw: Draw, description: str, size: tuple[float, float] = (4.4, 2.9)) -> Markup:
    """Draw a diagram as an <svg> element that is as wide as its place. `size` in inches."""
    style = STYLE | {"svg.hashsalt": description}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    head, body = re.fullmatch(r".*?<svg ([^>]*)>(.*)", text, re.DOTALL).groups()
    view = re.search(r'viewBox="[^"]*"', head).group()
    prefix = re.sub(r"\W+", "-", description)  # of ids, which diagrams of a page must not share
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = body.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    opening = Markup('<svg role="img" aria-label="{}" {}>').format(description, Markup(view))
    return opening + Markup(body)


def png(draws: dict[str, Draw]) -> bytes:
    """Draw titled diagrams, two per row, on white."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2 * math.ceil(len(draws) / 2)), layout="constrained")
        grid = figure.subplots(math.ceil(len(draws) / 2), 2, squeeze=False)
        for axes, (title, draw) in zip(grid.flat, draws.items()):
            draw(axes)
            axes.set_title(title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


# ------------------------------------------------------------------------- training runs


def curves(logs: list[Lines]) -> dict[str, Draw]:
    """Title -> diagram over epochs; run i has `run_colour(i)`. Logs: lines of log.jsonl."""

    def line(key: str, label: str) -> Draw:
        return lambda axes: _training_lines(axes, logs, key, label)

    return {
        "Training loss": line("loss", "loss"),
        "Validation top-1": lambda axes: _top1(axes, logs),
        "Learning rate": line("lr", "rate"),
        "Throughput": line("images_per_s", "images/s"),
    }


def curve_panels(logs: list[Lines]) -> list[Panel]:
    """`curves` as inline SVG."""
    return [
        Panel(title, inline_svg(draw, f"{title} over epochs"))
        for title, draw in curves(logs).items()
    ]


def lines_of_kind(lines: Lines, kind: str) -> Lines:
    """Lines of a log of one kind, "train" or "eval"."""
    return [line for line in lines if line.get("kind") == kind]


def _column(lines: Lines, key: str) -> list[float]:
    """Values of a key; NaN where a line lacks it or it was not finite."""
    return [math.nan if line.get(key) is None else line[key] for line in lines]


def _training_lines(axes: Axes, logs: list[Lines], key: str, label: str) -> None:
    for number, lines in enumerate(logs):
        training = lines_of_kind(lines, "train")
        style = "-" if len(training) > 1 else "o"
        axes.plot(
            _column(training, "epoch"),
            _column(training, key),
            style,
            color=run_colour(number),
            lw=1,
        )
    axes.set(xlabel="epoch", ylabel=label)
    axes.set_xlim(left=0)
    if key != "loss":
        axes.set_ylim(bottom=0)


def _top1(axes: Axes, logs: list[Lines]) -> None:
    """Draw averaged weights filled and solid, raw weights hollow and dashed."""
    styles = {"ema": ("averaged weights", "o-", "full"), "raw": ("raw weights", "o--", "none")}
    for which, (label, style, fill) in styles.items():
        for number, lines in enumerate(logs):
            evals = [e for e in lines_of_kind(lines, "eval") if e.get("weights") == which]
            x, y = _column(evals, "epoch"), _column(evals, "top1")
            axes.plot(x, y, style, fillstyle=fill, color=run_colour(number))
        axes.plot([], [], style, fillstyle=fill, color=INK, label=label)
    axes.set(xlabel="epoch", ylabel="top-1, %")
    axes.set_xlim(left=0)
    if any(lines_of_kind(lines, "eval") for lines in logs):
        axes.legend(loc="best")
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", transform=axes.transAxes)


# ------------------------------------------------------------------------- evaluations


def reliability(bins: list[Bin], images: int) -> Draw:
    """Accuracy of each bin, with its interval, over mean confidence; bars: its share of images."""

    def draw(axes: Axes) -> None:
        x = np.array([100 * b.confidence for b in bins])
        y = np.array([100 * b.accuracy for b in bins])
        ends = np.array([wilson(round(b.accuracy * b.images), b.images) for b in bins])
        share = [100 * b.images / images for b in bins]
        axes.bar(x, share, width=3.5, color=FAINT)
        axes.plot([0, 100], [0, 100], "--", color=INK, lw=0.8, alpha=0.6)
        below, above = np.maximum(y - ends[:, 0], 0), np.maximum(ends[:, 1] - y, 0)
        axes.errorbar(x, y, [below, above], fmt="o", color=run_colour(0), elinewidth=1)
        axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="confidence, %", ylabel="accuracy, %")

    return draw
