#!/usr/bin/env python3
"""Train one config, or two, with several seeds, and say how far the results spread.

  python scripts/seeds.py --config configs/quickstart.yaml --seeds 3 --out runs/seeds
  python scripts/seeds.py --config A.yaml B.yaml --seeds 5 --out runs/a-and-b train.epochs=4
  sbatch --array=0-9 --wrap "python scripts/seeds.py --config A.yaml B.yaml --seeds 5 \\
      --out runs/a-and-b --task \\$SLURM_ARRAY_TASK_ID"

Each run lies in DIR/CONFIG/seed-N and is evaluated by validate.py --report there. Runs that have
ended are passed over and others go on where they were, so that the same command, without --task,
writes DIR/index.html after an array: mean, standard deviation and, of two configs, McNemar's test
and a bootstrapped interval on the same images. Exit status: 0 done, that of a program that failed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import UserError
from irv2 import cli, config_file
from irv2.config import Config
from irv2.report import seeds
from irv2.report.seeds import Seeds
from irv2.run import resume

ROOT = Path(__file__).resolve().parent.parent


class Task(NamedTuple):
    """One run: a config with a seed."""

    config: Path
    seed: int
    directory: Path

    @property
    def evaluation(self) -> Path:
        """Folder of validate.py's page."""
        return self.directory / "evaluation"


def tasks(arguments: argparse.Namespace) -> list[Task]:
    """List the runs, config by config. Raises UserError where two configs would share a folder."""
    names = [config.stem for config in arguments.config]
    if len(set(names)) < len(names):
        raise UserError(f"--config: two files are called {names[0]}; give one another name")
    return [
        Task(config, seed, arguments.out / config.stem / f"seed-{seed}")
        for config in arguments.config
        for seed in range(arguments.first, arguments.first + arguments.seeds)
    ]


def run(task: Task, overrides: list[str]) -> int:
    """Train and evaluate one run, unless that is done; returns the first status that is not 0."""
    own = [f"run.seed={task.seed}", f"run.dir={task.directory}"]
    if (task.evaluation / seeds.PREDICTIONS).exists():
        check_same(task.directory, config_file.load(task.config, [*overrides, *own]))
        print(f"{task.directory}: done", flush=True)
        return 0
    train = ["train.py", "--config", str(task.config), *overrides, *own]
    validate = ["validate.py", "--run", str(task.directory), "--report", str(task.evaluation)]
    for command in (train, validate):
        command = [sys.executable, str(ROOT / command[0]), *command[1:]]
        if status := subprocess.run(command).returncode:
            return status
    return 0


def check_same(place: Path, asked: Config) -> None:
    """Raise UserError if the run that was trained there is another than the one asked for."""
    trained = config_file.load(place / "config.yaml")
    changed = resume.differences(trained.model_dump(), asked.model_dump())
    changed += [
        f"train.{key}: {before} -> {after}"
        for key in ("epochs", "max_steps")
        if (before := getattr(trained.train, key)) != (after := getattr(asked.train, key))
    ]
    if changed:
        raise UserError(
            f"{place}: was trained otherwise ({'; '.join(changed)}); give another --out, or remove "
            "it to train it anew"
        )


def write_page(arguments: argparse.Namespace, of: list[Task]) -> None:
    """Read all evaluations, say what they come to and write the page."""
    configs = [
        Seeds(
            config.stem,
            {task.seed: seeds.read(task.evaluation) for task in of if task.config == config},
        )
        for config in arguments.config
    ]
    compared = seeds.compare(*configs) if len(configs) == 2 else None
    command = shlex.join(["python", "scripts/seeds.py", *sys.argv[1:]])
    seeds.write(arguments.out, configs, compared, command)
    print(seeds.in_words(configs, compared))


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--config", type=cli.path, nargs="+", required=True, metavar="YAML")
    parser.add_argument("--seeds", type=cli.whole(1), required=True, metavar="N", help="how many")
    parser.add_argument("--first", type=cli.whole(0), default=0, metavar="N", help="default: 0")
    parser.add_argument("--out", type=cli.path, required=True, metavar="DIR")
    parser.add_argument(
        "--task", type=cli.whole(0), metavar="N", help="only run number N, and write no page"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace keys of the YAML files"
    )
    arguments = parser.parse_intermixed_args()
    if len(arguments.config) > 2:
        parser.error("--config: one file, or two to compare")
    if arguments.task is not None and arguments.task >= len(arguments.config) * arguments.seeds:
        parser.error(f"--task {arguments.task}: they are numbered from 0")
    return arguments


@cli.program
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    for config in arguments.config:
        config_file.load(config, arguments.overrides)  # every mistake before the first run
    listed = tasks(arguments)
    for task in listed if arguments.task is None else [listed[arguments.task]]:
        if status := run(task, arguments.overrides):
            return status
    if arguments.task is None:
        write_page(arguments, listed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
