"""Records as JSON lines, on disks that fill up and after crashes."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from irv2.jsonl import JsonLines, cut_back, read


def write(path: Path, *steps: int) -> None:
    lines = JsonLines(path, step=0, say=print)
    for step in steps:
        lines.append({"step": step, "loss": step / 3})
    lines.close()


def test_lines_come_back_as_they_were(tmp_path):
    write(tmp_path / "log.jsonl", 1, 2)
    assert read(tmp_path / "log.jsonl") == [{"step": n, "loss": n / 3} for n in (1, 2)]
    assert read(tmp_path / "absent.jsonl") == []


def test_no_file_is_made_before_there_is_a_line(tmp_path):
    lines = JsonLines(tmp_path / "bad.jsonl", step=0, say=print)
    lines.sync()
    lines.close()
    assert list(tmp_path.iterdir()) == []


def test_going_on_drops_the_lines_of_later_steps(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, 1, 2, 3, 4)
    lines = JsonLines(path, step=2, say=print)
    assert [line["step"] for line in lines.kept] == [1, 2]
    lines.append({"step": 3})
    lines.close()
    assert [line["step"] for line in read(path)] == [1, 2, 3]
    assert [line["step"] for line in cut_back(path, 1)] == [1]
    assert [line["step"] for line in read(path)] == [1]


def test_a_line_that_a_crash_cut_short_is_dropped_where_the_run_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-7])
    lines = JsonLines(path, step=2, say=print)
    lines.append({"step": 2})
    lines.close()
    assert read(path) == [{"step": 1, "loss": 1 / 3}, {"step": 2}]
    assert path.read_text().count("\n") == 2


def test_numbers_that_are_not_finite_are_null(tmp_path):
    lines = JsonLines(tmp_path / "log.jsonl", step=0, say=print)
    lines.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    lines.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    assert "NaN" not in text and "Infinity" not in text


@pytest.fixture
def small_files() -> Iterator[int]:
    """Files may not grow past so many bytes: a write fails part of the way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    yield 40
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("then", ["append", "sync", "close"])
def test_lines_wait_until_the_disk_has_room_again(tmp_path, small_files, then):
    said = []
    lines = JsonLines(tmp_path / "log.jsonl", step=0, say=said.append)
    for step in (1, 2, 3):
        lines.append({"step": step, "text": "x" * 8})
    assert (tmp_path / "log.jsonl").stat().st_size == small_files
    assert len(said) == 1 and "log.jsonl: cannot be written" in said[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    if then == "append":
        lines.append({"step": 4, "text": ""})
        assert [line["step"] for line in read(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    elif then == "sync":
        lines.sync()
        assert [line["step"] for line in read(tmp_path / "log.jsonl")] == [1, 2, 3]
    lines.close()
    assert [line["step"] for line in read(tmp_path / "log.jsonl")][:3] == [1, 2, 3]
    assert len(said) == 1


def test_lines_that_are_lost_are_told(tmp_path, small_files):
    said = []
    lines = JsonLines(tmp_path / "log.jsonl", step=0, say=said.append)
    lines.append({"step": 1, "text": "x" * 2 * small_files})
    lines.close()
    assert "LOST" in said[-1]


def test_what_is_no_record_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n3\n{"no": "step"}\n{"step": "x"}\n{"step": 2}\n')
    assert [line["step"] for line in read(path)] == [1, 2]
