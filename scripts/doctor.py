#!/usr/bin/env python3
"""Find what would go wrong with a run before it does: its config, its images, its machine.

  python scripts/doctor.py configs/irv2_rmsprop.yaml data.train=… data.val=… --ranks 8
  python scripts/doctor.py configs/quickstart.yaml --scan full --bad-files bad.txt

Prints a line for each finding: ok, warn (the run will do, but look at it) or FAIL (it will not do),
with what to do about it. Nothing is written but what --bad-files and --json name, and images of
an object store into data.cache_dir. The run's own loader and network are timed for --seconds each;
on a GPU the last line says what to expect: pace, an epoch's time, what bounds it, which batch fits.
Exit status: 0 no FAIL, 1 a FAIL, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.errors import DataError
from data.files import write_atomically
from data.names import shown
from data.optional import needed
from irv2 import build, cli, config_file
from irv2.config_file import ConfigError
from irv2.training import batch, distributed
from irv2.training.distributed import Place, WorldError
from scripts.checks import images, machine
from scripts.checks.case import FAIL, OK, WARN, Case, CheckOptions, Finding


def check_config(case: Case) -> Iterator[Finding]:
    """Check the config, its batch and its device; sets `case.cfg` and `case.division`."""
    asked = case.options
    try:
        case.cfg = config_file.load(asked.config, asked.overrides)
        train = case.cfg.train
        device = distributed.choose_device(case.cfg.run.device)
        micro_batch = train.micro_batch
        if micro_batch == "auto":
            room = batch.memory_room(device, asked.ranks)
            micro_batch = build.fitting_micro_batch(case.cfg, 1000, asked.ranks, room)
        pairs = case.cfg.data.mixes_pairs
        division = batch.divide(train.global_batch, micro_batch, asked.ranks, pairs)
    except (ConfigError, WorldError) as error:
        yield Finding(FAIL, str(error), "train.py would refuse it with the same words")
        return
    case.division = division
    yield Finding(OK, f"{asked.config}: {division.in_words(asked.ranks)}, {device.type}")


Check = Callable[[Case], Iterable[Finding]]
CHECKS: list[tuple[str, Check, tuple[str, ...]]] = [
    # name, check, what it needs of the case
    ("config", check_config, ()),
    ("data", images.check_sources, ("cfg",)),
    ("counts", images.check_counts, ("train", "val")),
    ("decoding", images.check_decoding, ("train", "val")),
    ("duplicates", images.check_duplicates, ("train", "val")),
    ("disk", machine.check_disk, ("cfg", "train")),
    ("cache", machine.check_cache, ("cfg",)),
    ("shm", machine.check_shared_memory, ("cfg", "division")),
    ("memory", machine.check_memory, ("division", "train")),
    ("pace", machine.check_pace, ("division", "train")),
]


def show(name: str, finding: Finding) -> None:
    margin = " " * 18
    what = f"\n{margin}".join(map(shown, finding.what.split("\n")))
    print(f"{finding.level:<5} {name:<11} {what}")
    for line in finding.details:
        print(f"{margin}  {shown(line)}")
    if finding.todo:
        print(f"{margin}-> {shown(finding.todo)}")
    sys.stdout.flush()


def examine(case: Case) -> list[tuple[str, Finding]]:
    """Run every check whose needs are met, showing what it finds."""
    findings = []
    for name, check, needs in CHECKS:
        if any(getattr(case, need) is None for need in needs):
            print(f"-     {name:<11} not looked at: needs what failed above", flush=True)
            continue
        for finding in outcome(check, case):
            show(name, finding)
            findings.append((name, finding))
    return findings


def outcome(check: Check, case: Case) -> Iterator[Finding]:
    """Yield a check's findings; data that it cannot use is a FAIL."""
    try:
        yield from check(case)
    except DataError as error:
        yield Finding(FAIL, str(error), "training would end with the same words")


def scan_size(text: str) -> int | None:
    """Parse the value of --scan: a number, None for "full". Raises ValueError."""
    if text == "full":
        return None
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("config", type=cli.location, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="ranks this machine will run (default: 1)"
    )
    parser.add_argument(
        "--scan",
        type=scan_size,
        default=1000,
        metavar="N|full",
        help="images of each split to decode and compare, evenly spread (default: 1000)",
    )
    parser.add_argument(
        "--near-duplicates",
        action="store_true",
        help="also find val images that look like train images, by a perceptual hash (imagehash)",
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="for each measurement of pace (default: 10)"
    )
    parser.add_argument(
        "--bad-files",
        type=cli.path,
        metavar="OUT",
        help="write all bad files here: name, tab, reason",
    )
    parser.add_argument("--json", type=cli.path, metavar="OUT", help="write all findings here")
    arguments = parser.parse_intermixed_args()
    if arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: at least 1")
    for path in (arguments.bad_files, arguments.json):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: no such folder to write it into")
    return arguments


@cli.program
def main() -> int:
    """Command line -> exit status."""
    options = vars(parse_arguments())
    report = options.pop("json")
    asked = CheckOptions(**options)
    if asked.near_duplicates:
        needed("imagehash", "--near-duplicates")
    distributed.place()  # what train.py would find, before a first rank's place is taken
    os.environ.update(Place(local_size=asked.ranks).variables())  # alone, with a rank's share
    findings = examine(Case(asked))
    levels = [finding.level for _, finding in findings]
    print(f"{levels.count(FAIL)} FAIL, {levels.count(WARN)} warn, {levels.count(OK)} ok")
    if report is not None:
        lines = [{"check": name, **asdict(finding)} for name, finding in findings]
        write_atomically(report, json.dumps(lines, indent=1) + "\n")
    return 1 if FAIL in levels else 0


if __name__ == "__main__":
    sys.exit(main())
