#!/usr/bin/env python3
"""Sum up runs from their logs: result, pace, where they lie; with --out also as a page.

  python scripts/report.py runs/quickstart
  python scripts/report.py runs/fashion_mnist --out docs/results/fashion_mnist
  python scripts/report.py runs/baseline runs/other_rate --out comparison

--out writes index.html, which opens from the disk: curves, results, and in which keys the configs
of several runs differ. For one run it also writes README.md, curves.png, and copies of log.jsonl,
config.yaml and validate.json. Exit status: 0 done, 1 a folder is not a run, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import strict_json
from data.errors import UserError
from data.files import read_regular
from data.names import shown
from irv2 import cli, strict_yaml
from irv2.report import page, runs
from irv2.report.runs import RunRecord
from irv2.run import jsonl

COPIED = ("log.jsonl", "config.yaml", "validate.json")
MAX_RESULT = 1 << 20  # bytes
SECTIONS = TypeAdapter(dict[str, dict[str, Any]])


class RunError(UserError):
    """A folder that is not a run."""


def read_run(directory: Path) -> RunRecord:
    """Read a run from its directory. Raises RunError."""
    log = jsonl.read(directory / "log.jsonl")
    if not runs.lines_of_kind(log, "train"):
        raise RunError(f"{directory}: no log.jsonl with a step of training in it; is it a run?")
    config, validated = {}, {}
    try:
        if (path := directory / "config.yaml").exists():
            config = strict_json.checked(strict_yaml.load(path), SECTIONS)
        if (path := directory / "validate.json").exists():
            validated = strict_json.checked(strict_json.load(path, MAX_RESULT), runs.MEASURED)
    except ValueError as error:
        raise RunError(f"{path}: cannot be read ({error})") from None
    return RunRecord(directory, log, config, validated)


def summary(run: RunRecord) -> str:
    """Return a run's summary and the command that shows more, for a terminal."""
    tensorboard = os.path.relpath(Path(sys.executable).parent / "tensorboard")
    rows = [*runs.summary(run), ("watch", f"{tensorboard} --logdir {run.directory}")]
    return "\n".join(f"{name:<10} {shown(value)}" for name, value in rows)


def write_pages(read: list[RunRecord], out: Path) -> None:
    """Write index.html; for one run also README.md and what it was made from."""
    runs.write(out, read)
    if len(read) > 1:
        return
    directory = read[0].directory
    for name in COPIED:
        if (directory / name).exists() and directory.resolve() != out.resolve():
            page.write(out / name, read_regular(directory / name))
    command = ["python", "scripts/report.py", str(directory), "--out", str(out)]
    runs.write_readme(out, read[0], shlex.join(command))


@cli.program
def main() -> int:
    """Command line -> exit status."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("run", type=cli.path, nargs="+", help="run directory")
    parser.add_argument("--out", type=cli.path, metavar="DIR", help="folder for the page")
    arguments = parser.parse_args()
    read = [read_run(directory) for directory in arguments.run]
    print("\n\n".join(map(summary, read)))
    if arguments.out is not None:
        write_pages(read, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
