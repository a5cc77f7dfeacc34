"""Pictures of a result: the confusion matrix, and the most confident mistakes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from irv2.training.metrics import Predictions

MOST_CLASSES = 50  # of a confusion matrix that is still readable
MOST_NUMBERED = 20  # of one with numbers in it
COLUMNS = 6  # of pictures
DPI = 100


def confusion_matrix(result: Predictions, classes: Sequence[str]) -> np.ndarray:
    """Draw the confusion matrix, one row per true class: uint8 [H, W, 3]."""
    count = len(classes)
    cells = result.confusion_matrix(count)
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    side = 2.5 + max(3.0, 0.26 * count if count > MOST_NUMBERED else 0.42 * count)
    figure = Figure((side + 0.8, side), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, 0, 1)  # so that what is rare can be seen
    image = axes.imshow(shares, cmap="Blues", norm=norm)
    names = [_printable(name, 24) for name in classes]
    axes.set_xticks(range(count), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(count), names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"{result.images:,} images, {result.top1:.2f} % correct", fontsize=10)
    bar = figure.colorbar(image, shrink=0.7, label="share of the true class")
    bar.ax.tick_params(labelsize=8)
    if count <= MOST_NUMBERED:
        for row, column in np.argwhere(cells):
            colour = "white" if norm(shares[row, column]) > 0.5 else "black"
            number = f"{cells[row, column]}"
            axes.text(column, row, number, ha="center", va="center", fontsize=7, color=colour)
    return _drawn(figure)


def most_confident_mistakes(result: Predictions, count: int = 24) -> list[int]:
    """Numbers of the images with wrong answers, the most confident first."""
    return result.index[result.mistakes()[:count]].tolist()


def mistakes(
    result: Predictions, pictures: Mapping[int, np.ndarray], classes: Sequence[str]
) -> np.ndarray:
    """Draw a grid of pictures, uint8 [h, w, 3] by their images' numbers: uint8 [H, W, 3].

    Above each stand the true class, the predicted one and its probability.
    """
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure((max(1.9 * columns, 4.0), 0.5 + 2.35 * rows), dpi=DPI, layout="constrained")
    wrong = result.images - result.top1_correct
    title = f"{len(pictures)} of {wrong:,} wrong answers to {result.images:,} images, surest first"
    figure.suptitle(title, fontsize=10)
    for place, (index, picture) in enumerate(pictures.items(), 1):
        row = np.searchsorted(result.index, index)
        true, predicted = classes[result.label[row]], classes[result.top[row, 0]]
        percent = f"({100 * result.probability[row, 0]:.0f} %)"
        caption = f"{_printable(true, 24)}\n→ {_printable(predicted, 17)} {percent}"
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(picture)
        axes.set_title(caption, fontsize=8, parse_math=False)
        axes.set_axis_off()
    return _drawn(figure)


def _printable(name: str, width: int) -> str:
    """Make a name drawable, and at most `width` characters long."""
    name = name.encode("utf-8", "replace").decode("utf-8")
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _drawn(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # it draws a box
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
