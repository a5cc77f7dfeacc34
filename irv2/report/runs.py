"""The page of one or several training runs: curves, results, and how their configs differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter
from typing_extensions import TypedDict

from data.strict_json import Count, Percent
from irv2.report import markdown, page, plots
from irv2.report.plots import Lines, lines_of_kind
from irv2.report.statistics import wilson

UNKNOWN = "\u2013"


class _Measured(TypedDict, total=False):
    """Keys of validate.json that are shown."""

    step: Count | None
    weights: str
    images: Count
    top1: Percent
    top1_correct: Count
    top5: Percent


def _counted(measured: _Measured) -> _Measured:
    if measured.get("top1_correct", 0) > measured.get("images", math.inf):
        raise ValueError("more correct answers than images")
    return measured


MEASURED = TypeAdapter(Annotated[_Measured, AfterValidator(_counted)])


@dataclass(frozen=True)
class RunRecord:
    """Contents of a run's directory. `log` has at least one line of training."""

    directory: Path
    log: Lines  # lines of log.jsonl
    config: dict[str, dict[str, Any]]  # of config.yaml; empty if there is none
    validated: _Measured  # of validate.json; empty if there is none

    @property
    def name(self) -> str:
        """Name in the config, else the folder's."""
        stated = self.config.get("run", {}).get("name")
        return str(stated or self.directory.resolve().name)

    @property
    def last(self) -> dict[str, Any]:
        """Last logged step of training."""
        return lines_of_kind(self.log, "train")[-1]

    @property
    def result(self) -> dict[str, Any]:
        """Result of validate.py at the last step, else train.py's last evaluation, else empty."""
        if "top1" in self.validated and self.validated.get("step") == self.last["step"]:
            return self.validated
        evaluations = lines_of_kind(self.log, "eval")
        averaged = [line for line in evaluations if line.get("weights") == "ema"]
        return next(reversed(averaged or evaluations), {})

    @property
    def pace(self) -> float | None:
        """Images per second, the median of the logged steps."""
        paces = [line.get("images_per_s") for line in lines_of_kind(self.log, "train")]
        return statistics.median(known) if (known := [pace for pace in paces if pace]) else None


def summary(run: RunRecord) -> list[tuple[str, str]]:
    """Describe a run in (name, value) rows; those that its log lacks are left out."""
    last, result, pace = run.last, run.result, run.pace
    rows = []
    if result:
        images = [page.count(result["images"], "image")] if "images" in result else []
        weights = [f"{result['weights']} weights"] if "weights" in result else []
        rows += [("top-1", share(result, "top1")), ("top-5", share(result, "top5"))]
        rows.append(("evaluated", ", ".join(images + weights) or UNKNOWN))
    else:
        rows.append(("evaluated", "no evaluation yet"))
    rows.append(("trained", f"{last['epoch']:.1f} epochs, {last['step']:,} steps"))
    if pace is not None:
        wait = last.get("data_wait")
        waited = "" if wait is None else f", {wait:.0%} of the time on data"
        rows.append(("pace", f"{pace:.0f} images/s (median){waited}"))
        rows.append(("time", f"{training_time(run)} of training at that pace"))
    return [*rows, ("run", str(run.directory))]


def share(result: dict[str, Any], key: str) -> str:
    """Format a percentage of a result, "98.61 %"."""
    return f"{result[key]:.2f} %" if result.get(key) is not None else UNKNOWN


def training_time(run: RunRecord) -> str:
    """Time for all images seen, at the run's pace."""
    if run.pace is None:
        return UNKNOWN
    total = run.last["images_seen"] / run.pace
    if not math.isfinite(total):
        return UNKNOWN
    minutes, seconds = divmod(round(total), 60)
    return f"{minutes} min {seconds} s"


def interval(result: dict[str, Any]) -> str:
    """95 % interval of top-1, in percent."""
    if not result.get("images"):
        return UNKNOWN
    correct = result.get("top1_correct", round(result["top1"] * result["images"] / 100))
    return page.interval(wilson(correct, result["images"]), digits=2)


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all configs, with each run's value."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [str(config.get(key, UNKNOWN)) for config in configs] for key in keys}
    return [(key, each) for key, each in values.items() if len(set(each)) > 1]


def flat(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}."""
    return {
        f"{section}.{key}": value for section, part in config.items() for key, value in part.items()
    }


# ------------------------------------------------------------------------- pages


def write(directory: Path, runs: Sequence[RunRecord]) -> None:
    """Write index.html into `directory`, which is made if need be. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    labels = [run.name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [str(run.directory) for run in runs]
    html = page.render(
        "runs.html",
        title=" · ".join(labels) if len(runs) <= 4 else f"{len(runs)} training runs",
        labels=labels,
        colours=[plots.run_colour(number) for number in range(len(runs))],
        facts=summary(runs[0]) if len(runs) == 1 else [],
        results=[table_row(run) for run in runs],
        panels=plots.curve_panels([run.log for run in runs]),
        differences=differences(runs),
    )
    page.write(directory / "index.html", html)


def table_row(run: RunRecord) -> list[str]:
    """Cells of the table of results, after the run's name; columns as in runs.html."""
    result, last = run.result, run.last
    measured = [UNKNOWN] * 3
    if result:
        measured = [share(result, "top1"), interval(result), share(result, "top5")]
    pace = UNKNOWN if run.pace is None else f"{run.pace:.0f}"
    return [*measured, f"{last['epoch']:.1f}", f"{last['step']:,}", pace, training_time(run)]


def write_readme(directory: Path, run: RunRecord, command: str) -> None:
    """Write README.md and curves.png, for places that do not show HTML. Raises OSError."""
    page.write(directory / "curves.png", plots.png(plots.curves([run.log])))
    evaluations = [
        f"{line['epoch']:.2f} | {markdown.escaped(line['weights'])} | {line['top1']:.2f} | "
        f"{_figure(line, 'top5', '.2f')} | {_figure(line, 'loss', '.4f')} | "
        f"{_figure(line, 'images', ',')}"
        for line in lines_of_kind(run.log, "eval")
    ]
    head = "epoch | weights | top-1, % | top-5, % | loss | images"
    text = [
        f"# {markdown.escaped(run.name)}",
        "",
        f"Made by {markdown.code(command)}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {markdown.escaped(value)} |" for name, value in summary(run)),
        "",
        "![training loss, top-1, learning rate and pace over epochs](curves.png)",
        "",
        markdown.table(head, evaluations) if evaluations else "",
    ]
    page.write(directory / "README.md", "\n".join(text).rstrip() + "\n")


def _figure(line: dict[str, Any], key: str, form: str) -> str:
    """Format a number of a line, which may lack it."""
    return UNKNOWN if line.get(key) is None else format(line[key], form)
