"""One outlet for everything a run reports: log.jsonl, trackers, progress bar or plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from data.names import shown
from irv2.run.jsonl import JsonLines
from irv2.run.trackers import Tracked, Trackers

# Of a step's line, what trackers show.
SHOWN = ("loss", "lr", "grad_norm", "images_per_s", "data_wait", "mfu", "memory_gb")


class Logbook:
    """Records of the main rank; on other ranks (`directory=None`) every call does nothing."""

    def __init__(
        self,
        directory: Path | None,
        step: int,
        total_steps: int,
        to: Sequence[str] = ("tensorboard",),
        config: dict[str, Any] | None = None,
    ) -> None:
        """Open the log of a run that stands at `step`; lines of later steps are dropped.

        to: trackers; config: what they show as the run's.
        """
        self.active = directory is not None
        self.total_steps = total_steps
        self.evals: list[dict[str, Any]] = []
        self._bar: tqdm | None = None
        if directory is None:
            return
        self._lines = JsonLines(directory / "log.jsonl", step, self.say)
        self._bad_images = JsonLines(directory / "bad_images.jsonl", step, self.say)
        self.evals = [line for line in self._lines.kept if line.get("kind") == "eval"]
        self._trackers = Trackers(to, Tracked(directory, step, config or {}), self.say)
        self._start_step, self._started = step, time.perf_counter()
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=total_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout
            )

    def say(self, text: str) -> None:
        """Print a line."""
        if self.active:
            tqdm.write(shown(text), file=sys.stdout)
            sys.stdout.flush()

    def stepped(self) -> None:
        """Advance the bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def train(self, line: dict[str, Any]) -> None:
        """Record a logged step, with the keys of a "train" line of log.jsonl."""
        if not self.active:
            return
        self._lines.append({"kind": "train", **line})
        values = {f"train/{key}": line[key] for key in SHOWN if key in line}
        self._trackers.scalars(values, line["step"])
        words = f"loss {line['loss']:.3f}  lr {line['lr']:.4g}  {in_words(line)}"
        if self._bar is not None:
            self._bar.set_postfix_str(words)
        else:
            self.say(
                f"step {line['step']}/{self.total_steps}  epoch {line['epoch']:.2f}  {words}  "
                f"{self._time_left(line['step'])} left"
            )

    def eval(self, line: dict[str, Any], interval: tuple[float, float] | None = None) -> None:
        """Record an evaluation: step, epoch, weights ("ema" or "raw"), top1, top5, mean_per_class,
        loss, images. The mean over classes is shown where it is not top-1 itself, and top-1's 95 %
        interval where it is given."""
        if not self.active:
            return
        line = {"kind": "eval", **line}
        self._lines.append(line)
        self.evals.append(line)
        keys = ("top1", "top5", "mean_per_class", "loss")
        values = {f"eval_{line['weights']}/{key}": line[key] for key in keys}
        self._trackers.scalars(values, line["step"])
        top1, mean = f"{line['top1']:.2f} %", f"{line['mean_per_class']:.2f} %"
        between = f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
        per_class = f"  mean of classes {mean}" if mean != top1 else ""
        self.say(
            f"epoch {line['epoch']:.2f}  {line['weights']:>3}  top-1 {top1}{between}  "
            f"top-5 {line['top5']:.2f} %{per_class}  loss {line['loss']:.3f}  "
            f"({line['images']} images)"
        )

    def bad_step(self, step: int, images: list[int]) -> None:
        """Record a step that was left out, with the indices of its images."""
        if not self.active:
            return
        self._lines.append({"kind": "bad_step", "step": step, "images": images})
        self.say(f"step {step} was left out: its loss or gradient is not finite")

    def bad_image(self, step: int, line: dict[str, Any]) -> None:
        """Record an image that was replaced in a step: epoch, index, name, reason, replacement."""
        if not self.active:
            return
        self._bad_images.append({"step": step, **line})
        what = f"{line['name']}: {line['reason']}"
        self.say(f"step {step} took another image of its class for {what}")

    def sync(self) -> None:
        """Make sure that a power cut takes no line recorded so far."""
        if self.active:
            self._lines.sync()
            self._bad_images.sync()

    def has_eval(self, step: int, weights: str) -> bool:
        """True if that evaluation is already in the log."""
        return any(e["step"] == step and e["weights"] == weights for e in self.evals)

    def best_top1(self) -> float:
        """Highest top-1 so far, percent; -1 before the first evaluation."""
        return max((e["top1"] for e in self.evals), default=-1.0)

    def images(self, tag: str, pixels: Tensor, names: list[str]) -> None:
        """Show a grid of images [B, 3, H, W] in [0, 1] with class names."""
        self.figure(tag, _grid(pixels, names), self._start_step)

    def figure(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Show a figure uint8 [H, W, 3] in the trackers."""
        if self.active:
            self._trackers.image(tag, pixels, step)

    @contextmanager
    def progress(self, total: int, title: str) -> Iterator[tqdm]:
        """Show a second bar, for an evaluation; none where the output is not a terminal."""
        hidden = not (self.active and sys.stdout.isatty())
        with tqdm(
            total=total, desc=title, unit="image", leave=False, disable=hidden, file=sys.stdout
        ) as bar:
            yield bar

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.close()
        if self.active:
            self._lines.close()
            self._bad_images.close()
            self._trackers.close()

    def _time_left(self, step: int) -> str:
        elapsed = time.perf_counter() - self._started
        return tqdm.format_interval(
            elapsed / max(1, step - self._start_step) * (self.total_steps - step)
        )


def in_words(line: dict[str, Any]) -> str:
    """The pace of a logged step: "40 images/s (data 2 %, MFU 41 %, 1.9 GB)"."""
    parts = [f"{word} {line[key]:.0%}".replace("%", " %")
             for key, word in (("data_wait", "data"), ("mfu", "MFU")) if key in line]  # fmt: skip
    parts += [f"{line['memory_gb']:.1f} GB"] if "memory_gb" in line else []
    return f"{line['images_per_s']:.0f} images/s" + (f" ({', '.join(parts)})" if parts else "")


def _grid(pixels: Tensor, names: list[str], columns: int = 8, caption_px: int = 14) -> np.ndarray:
    """Images and captions -> uint8 [H, W, 3]."""
    tiles = pixels.clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    count, height, width = tiles.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    cell = height + caption_px
    canvas = Image.new("RGB", (columns * width, rows * cell), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (tile, name) in enumerate(zip(tiles, names)):
        left, top = i % columns * width, i // columns * cell
        canvas.paste(Image.fromarray(tile), (left, top + caption_px))
        draw.text((left + 2, top + 1), name[: width // 6], fill="black")
    return np.asarray(canvas)
