"""What scripts/report.py says of training runs, and the page that it makes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
import yaml
from browser import WIDTHS, assert_shown, opened

from irv2.statistics import wilson
from scripts.report import main

EXAMPLE = programs.ROOT / "docs" / "results" / "fashion_mnist"
OF_ONE = ["README.md", "config.yaml", "curves.png", "index.html", "log.jsonl", "validate.json"]


@pytest.fixture
def report(capsys, monkeypatch):
    """scripts/report.py's main in this process: arguments -> (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
        return main(), *capsys.readouterr()

    return call


def train_line(step: int, **more: Any) -> dict[str, Any]:
    line = {"kind": "train", "step": step, "images_seen": 8 * step, "epoch": step / 4}
    return {**line, "loss": 1.0 / step, "lr": 0.045, "images_per_s": 40.0, **more}


def eval_line(step: int, weights: str, top1: float) -> dict[str, Any]:
    line = {"kind": "eval", "step": step, "epoch": step / 4, "weights": weights}
    return {**line, "top1": top1, "top5": 100.0, "loss": 0.5, "images": 50}


def write_run(directory: Path, lines: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return directory


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A run of 6 steps, evaluated after each second one."""
    lines = [train_line(step, data_wait=0.25) for step in range(1, 7)]
    for step in (2, 4, 6):
        lines += [eval_line(step, "ema", 90.0 - step), eval_line(step, "raw", 20.0)]
    config = {"run": {"name": "study <b>"}, "optim": {"lr": 0.045, "eps": 1.0}}
    return write_run(tmp_path / "study", lines, config)


def test_a_run_is_summed_up_and_drawn(study, tmp_path):
    stale = {**eval_line(2, "ema", 1.0), "step": 2}
    (study / "validate.json").write_text(json.dumps(stale))
    out = tmp_path / "out"
    command = [sys.executable, "scripts/report.py", study, "--out", out]
    done = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["top-1"] == "84.00 %"  # averaged, of the last step, not of the older validate.json
    assert rows["pace"] == "40 images/s (median), 25% of the time on data"
    assert rows["time"].startswith("0 min 1 s")
    page = (out / "README.md").read_text()
    assert page.startswith("# study <b>") and "| 1.50 | ema | 84.00 |" in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == OF_ONE
    for name in ("log.jsonl", "config.yaml", "validate.json"):
        assert (out / name).read_bytes() == (study / name).read_bytes()


def test_what_validate_measured_of_the_last_step_counts(report, study):
    result = {"top1": 50.0, "top5": 75.0, "images": 40, "weights": "ema", "step": 6}
    (study / "validate.json").write_text(json.dumps(result))
    rows = dict(line.split(maxsplit=1) for line in report(study)[1].splitlines())
    assert rows["top-1"] == "50.00 %" and rows["evaluated"].startswith("40 images")
    (study / "validate.json").write_text('{"top1": 50.0, "step": 6}')
    rows = dict(line.split(maxsplit=1) for line in report(study)[1].splitlines())
    assert (rows["top-1"], rows["top-5"], rows["evaluated"]) == ("50.00 %", "\u2013", "\u2013")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_run_that_an_older_version_made(chromium, report, tmp_path, width):
    status, _, stderr = report(EXAMPLE, "--out", tmp_path)
    assert status == 0, stderr
    low, high = wilson(9008, 10_000)
    with opened(chromium, tmp_path / "index.html", width) as shown:
        assert_shown(shown, ["headline", "curves", "results"])
        assert "90.08 %" in shown.locator("#headline").inner_text()
        assert f"{low:.2f} \u2013 {high:.2f}" in shown.locator("#results").inner_text()
        assert shown.locator("#curves svg").count() == 4
        assert shown.locator("#differences").count() == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_runs_stand_side_by_side(chromium, report, study, tmp_path, width):
    config = {"run": {"name": "other"}, "optim": {"lr": 0.1, "eps": 1.0}, "ema": {"decay": 0.9}}
    other = write_run(tmp_path / "other", [train_line(1), train_line(2, loss=None)], config)
    out = tmp_path / "out"
    status, stdout, stderr = report(study, other, "--out", out)
    assert status == 0, stderr
    assert stdout.count("trained ") == 2 and "no evaluation yet" in stdout
    assert [path.name for path in out.iterdir()] == ["index.html"]
    with opened(chromium, out / "index.html", width) as shown:
        assert_shown(shown, ["headline", "curves", "results", "differences"])
        cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        differing = shown.eval_on_selector_all("#differences tbody tr", cells)
        assert differing == [
            ["run.name", "study <b>", "other"],
            ["optim.lr", "0.045", "0.1"],
            ["ema.decay", "\u2013", "0.9"],
        ]
        results = shown.eval_on_selector_all("#results tbody tr", cells)
        assert [row[0] for row in results] == ["study <b>", "other"]
        assert results[0][1] == "84.00 %" and results[1][1] == "\u2013"
        assert [row[4:6] for row in results] == [["1.5", "6"], ["0.5", "2"]]
        # A line for each run, in its own colour.
        colours = shown.eval_on_selector_all(
            "#curves .legend .swatch", "all => all.map(e => getComputedStyle(e).backgroundColor)"
        )
        drawn = shown.eval_on_selector_all(
            "#curves svg:first-of-type path", "all => all.map(e => getComputedStyle(e).stroke)"
        )
        assert len(set(colours)) == 2 and set(colours) <= set(drawn)


def test_runs_of_one_name_are_told_apart_by_their_folders(report, study, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(study, twin)
    assert report(study, twin, "--out", tmp_path / "out")[0] == 0
    html = (tmp_path / "out" / "index.html").read_text()
    assert str(twin) in html and "Nothing: every key has the same value." in html


def test_a_run_that_is_still_training_has_curves(report, tmp_path):
    run = write_run(tmp_path / "run", [train_line(1), {"kind": "bad_step", "step": 2}], {})
    status, stdout, stderr = report(run, "--out", tmp_path / "out")
    assert status == 0, stderr
    rows = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert rows["evaluated"] == "no evaluation yet" and "top-1" not in rows
    assert "no evaluation yet" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / "README.md").read_text().startswith("# run\n")


def test_the_page_may_be_written_into_the_run_itself(report, study):
    log = (study / "log.jsonl").read_bytes()
    assert report(study, "--out", study)[0] == 0
    assert (study / "log.jsonl").read_bytes() == log and (study / "index.html").exists()


@pytest.mark.parametrize("name", ["nothing", "config.yaml", "validate.json"])
def test_what_is_no_run_is_one_line(report, study, tmp_path, name):
    if name == "nothing":
        (study / "log.jsonl").unlink()
    else:
        (study / name).write_text("[a, {b: \n - c")
    status, stdout, stderr = report(EXAMPLE, study, "--out", tmp_path / "out")
    assert status == 1 and stderr.count("\n") == 1, stderr
    assert str(study) in stderr and stdout == ""
    assert not (tmp_path / "out").exists()
