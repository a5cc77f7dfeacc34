"""Files that are damaged, or made by somebody who means harm, of every kind that is read.

A few of each kind in every run of the suite; 2,000 and more, for docs/reliability.md, by

python -m pytest -m soak tests/test_fuzz.py --report docs/reliability.md
"""

from __future__ import annotations

import json
import time

import fuzzing
import pytest
from programs import start_script

from irv2.report.markdown import replace_section, table

SEED, FEW, MANY = 0, 2, 100


def tallies(folder, count: int) -> list[dict]:
    """Outcomes of `count` mutants of each kind."""
    process = start_script(f"import fuzzing; fuzzing.main({str(folder)!r}, {SEED}, {count})")
    out, err = process.communicate()  # each mutant has its own limit of time
    assert process.returncode == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [tally["kind"] for tally in found] == list(fuzzing.KINDS)
    return found


def refuse_faults(found: list[dict]) -> None:
    faults = [f"{tally['kind']}: {fault}" for tally in found for fault in tally["faults"]]
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.mark.slow
def test_damaged_files_of_each_kind_end_in_a_line_or_do_no_harm(tmp_path):
    refuse_faults(tallies(tmp_path, FEW))


@pytest.mark.soak
def test_two_thousand_damaged_files(tmp_path, request):
    found = tallies(tmp_path, MANY)
    refuse_faults(found)
    assert sum(tally["read"] + tally["refused"] for tally in found) >= 2000
    if (page := request.config.getoption("--report")) is not None:
        replace_section(page, "fuzz", report(found))


def report(found: list[dict]) -> str:
    """The table of docs/reliability.md."""
    total = sum(tally["read"] + tally["refused"] for tally in found)
    head = "file | mutants | refused in a line | read all the same | slowest, s | memory, MiB"
    rows = (
        f"{each['kind']} | {each['read'] + each['refused']} | {each['refused']} | {each['read']} "
        f"| {each['slowest_s']:.1f} | {each['memory_mib']:.0f}"
        for each in found
    )
    day = time.strftime("%Y-%m-%d")
    return f"**{total:,} mutants, seed {SEED}, {day}**\n\n{table(head, rows)}"
