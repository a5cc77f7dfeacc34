"""Steps of two hosts over limited and delayed links, beside what scripts/plan.py's model predicts:

python -m pytest -m cluster tests/cluster/test_links.py --report docs/reliability.md
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from namespaces import finished, hosts
from programs import ROOT, finish, log_lines, start
from small_run import arguments

from irv2 import build, config_file
from irv2.report.markdown import replace_section
from scripts import plan
from scripts.planning import steptime

RESULTS = "results/links.json"  # beside the page
WITHIN = 0.25  # of what was measured, the model must predict
MICRO_BATCH, CLASSES = 4, 2
RECIPE = (
    f"train.micro_batch={MICRO_BATCH}",
    "model.width=1",  # so that there is something to send
    "train.max_steps=10",
    "train.epochs=99",
    "eval.every_epochs=99",
    "checkpoint.every_steps=99",
)
ETHERNET = 8948 / 9014  # bytes of TCP's in a frame of 9000, and the bytes tbf counts for it


@dataclass(frozen=True)
class Case:
    """A link, and what is sent over it."""

    mbit_s: int | None  # None: as fast as this machine carries it
    delay_ms: float = 0.0  # each way
    reduce_dtype: str = "fp32"
    accumulation: int = 1

    @property
    def recipe(self) -> tuple[str, ...]:
        batch = 2 * MICRO_BATCH * self.accumulation
        return (*RECIPE, f"train.global_batch={batch}", f"train.reduce_dtype={self.reduce_dtype}")


CASES = [
    Case(None),
    Case(1000),
    Case(200),
    Case(200, reduce_dtype="bf16"),
    Case(200, accumulation=4),
    Case(200, delay_ms=5),
]


def step_s(directory: Path) -> float:
    """Median time of a step, after the first three."""
    lines = log_lines(directory, "train")
    batch = lines[0]["images_seen"]
    return statistics.median(batch / line["images_per_s"] for line in lines[3:])


def two_apart_s(config: Path, folder: Path, accumulation: int) -> float:
    """A step of two runs of one rank at once, which exchange nothing but share this machine."""
    batch = f"train.global_batch={MICRO_BATCH * accumulation}"
    places = [folder / f"apart-{accumulation}-{which}" for which in "ab"]
    runs = [start("train.py", *arguments(config, place, *RECIPE, batch)) for place in places]
    results = [finish(process) for process in runs]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    return statistics.mean(step_s(place) for place in places)


def two_hosts_s(config: Path, folder: Path, case: Case) -> float:
    """A step of two hosts, one rank each."""
    folder.mkdir()
    command = ("train.py", *arguments(config, folder / "run", *case.recipe))
    with hosts(2, case.delay_ms) as made:
        if case.mbit_s is not None:
            for host in made:
                host.limit(case.mbit_s)
        logs = [folder / f"host{host.number}.log" for host in made]
        started = [host.start(log, *command, nnodes="2") for host, log in zip(made, logs)]
        for process, log in zip(started, logs):
            assert finished(process, log) == 0, log.read_text()
    return step_s(folder / "run")


def predicted_s(config: Path, case: Case, device: steptime.Device) -> float:
    """Prediction of the model of scripts/plan.py for a link with a limit."""
    cfg = config_file.load(config, list(case.recipe))
    bytes_per_s = case.mbit_s * 1e6 / 8 * ETHERNET
    link = steptime.Link(bytes_per_s, case.delay_ms / 1e3)
    cluster = steptime.Cluster(device, link, link, per_node=1)
    gradients = plan.gradients(cfg, build.memory_sizes(cfg, CLASSES))
    return steptime.step(cluster, 2, MICRO_BATCH, case.accumulation, gradients).total_s


def table(found: dict[str, Any]) -> str:
    lines = [
        "| link, each way | gradients | accumulation | images/s | predicted, ms | measured, ms | "
        "difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["cases"]:
        link = "not limited" if row["mbit_s"] is None else f"{row['mbit_s']} Mbit/s"
        link += f", {row['delay_ms']:g} ms" if row["delay_ms"] else ""
        measured, expected = row["measured_s"], row["predicted_s"]
        images = 2 * MICRO_BATCH * row["accumulation"] / measured
        difference = "" if expected is None else f"{expected / measured - 1:+.0%}"
        shown = "" if expected is None else f"{1e3 * expected:,.0f}"
        lines.append(
            f"| {link} | {row['reduce_dtype']} | {row['accumulation']} | {images:.1f} | {shown} | "
            f"{1e3 * measured:,.0f} | {difference} |"
        )
    alone = ", ".join(f"{1e3 * found[key]:,.0f} ms" for key in ("compute_s", "update_s"))
    return "\n".join([*lines, "", f"Forward and backward, and the rest of a step, apart: {alone}."])


def of_this_machine(compute_s: float, update_s: float) -> steptime.Device:
    return steptime.Device(
        MICRO_BATCH / compute_s, overhead_s=0.0, update_s=update_s, overlaps=False
    )


@pytest.mark.cluster
@pytest.mark.usefixtures("network_namespaces")
def test_steps_over_limited_links(config, tmp_path, request):
    """Times go into the report, and as JSON beside it, before they are compared."""
    once, four = (two_apart_s(config, tmp_path, accumulation) for accumulation in (1, 4))
    compute_s = (four - once) / 3
    device = of_this_machine(compute_s, max(0.0, once - compute_s))
    found: dict[str, Any] = {"compute_s": compute_s, "update_s": device.update_s, "cases": []}
    for number, case in enumerate(CASES):
        measured = two_hosts_s(config, tmp_path / f"case{number}", case)
        expected = None if case.mbit_s is None else predicted_s(config, case, device)
        row = {**asdict(case), "measured_s": measured, "predicted_s": expected}
        found["cases"].append(row)
    print(table(found))
    if (page := request.config.getoption("--report")) is not None:
        replace_section(page, "links", table(found))
        text = json.dumps(found, indent=2) + "\n"
        (page.parent / RESULTS).write_text(text, encoding="utf-8")
    for row in found["cases"]:
        if row["predicted_s"] is not None:
            assert row["predicted_s"] == pytest.approx(row["measured_s"], rel=WITHIN), row


@pytest.mark.slow
def test_the_model_predicts_the_steps_that_were_measured(config):
    found = json.loads((ROOT / "docs" / RESULTS).read_text(encoding="utf-8"))
    device = of_this_machine(found["compute_s"], found["update_s"])
    names = [field.name for field in fields(Case)]
    limited = [row for row in found["cases"] if row["mbit_s"] is not None]
    assert len(limited) == len(CASES) - 1
    for row in limited:
        predicted = predicted_s(config, Case(**{name: row[name] for name in names}), device)
        assert predicted == pytest.approx(row["measured_s"], rel=WITHIN), row
