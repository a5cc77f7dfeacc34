"""log.jsonl, whose records outlive full disks and crashes, and what else a run says."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter
from written_runs import eval_line, train_line

from irv2.run.jsonl import JsonLines, cut_back, read
from irv2.run.logbook import Logbook

PICTURE = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def write(path: Path, *records: dict[str, Any], step: int = 0) -> JsonLines:
    """Append records to a file; returns what was open."""
    lines = JsonLines(path, step, say=print)
    for record in records:
        lines.append(record)
    lines.close()
    return lines


def losses(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": step / 3} for step in steps]


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read(path)]


# ---------------------------------------------------------------------------------- JSON lines


def test_a_sync_takes_every_line_to_the_disk(path, monkeypatch):
    sizes, fsync = [], os.fsync

    def spy(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    lines = JsonLines(path, step=0, say=print)
    lines.append({"step": 1})
    lines.append({"step": 2})
    assert sizes == []
    lines.sync()
    assert sizes == [len(b'{"step": 1}\n{"step": 2}\n')]
    lines.close()


def test_lines_come_back_as_they_were(path):
    write(path, *losses(1, 2))
    assert read(path) == losses(1, 2)
    assert read(path.with_name("absent.jsonl")) == []


def test_no_file_is_made_before_there_is_a_line(path):
    lines = JsonLines(path, step=0, say=print)
    lines.sync()
    lines.close()
    assert list(path.parent.iterdir()) == []


def test_going_on_drops_the_lines_of_later_steps(path):
    write(path, *losses(1, 2, 3, 4))
    lines = write(path, {"step": 3}, step=2)
    assert [line["step"] for line in lines.kept] == [1, 2]
    assert steps_of(path) == [1, 2, 3]
    assert [line["step"] for line in cut_back(path, 1)] == [1]
    assert steps_of(path) == [1]


def test_a_line_that_a_crash_cut_short_is_dropped_where_the_run_goes_on(path):
    write(path, *losses(1, 2))
    path.write_bytes(path.read_bytes()[:-7])
    write(path, {"step": 2}, step=2)
    assert read(path) == [*losses(1), {"step": 2}]
    assert path.read_text().count("\n") == 2


def test_numbers_that_are_not_finite_are_null(path):
    write(path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    text = path.read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    assert "NaN" not in text and "Infinity" not in text


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Files may not grow past so many bytes: a write fails part of the way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:  # before pytest reports, perhaps into a file
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("then", ["append", "sync", "close"])
def test_lines_wait_until_the_disk_has_room_again(path, then):
    said = []
    lines = JsonLines(path, step=0, say=said.append)
    with small_files(40):
        for step in (1, 2, 3):
            lines.append({"step": step, "text": "x" * 8})
    assert path.stat().st_size == 40
    assert len(said) == 1 and "log.jsonl: cannot be written" in said[0]
    if then == "append":
        lines.append({"step": 4, "text": ""})
        assert steps_of(path) == [1, 2, 3, 4]
    elif then == "sync":
        lines.sync()
        assert steps_of(path) == [1, 2, 3]
    lines.close()
    assert steps_of(path)[:3] == [1, 2, 3]
    assert len(said) == 1


def test_lines_that_are_lost_are_told(path):
    said = []
    lines = JsonLines(path, step=0, say=said.append)
    with small_files(40):
        lines.append({"step": 1, "text": "x" * 80})
        lines.close()
    assert "LOST" in said[-1]


def test_what_is_no_record_is_left_out(path):
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n3\n{"no": "step"}\n{"step": "x"}\n{"step": 2}\n')
    assert steps_of(path) == [1, 2]


STRANGE_LINES = [
    *('{"step": true}', '{"step": -1}', '{"step": 1.5}', '{"step": 1e400}', '{"step": NaN}'),
    *(
        "[" * 100_000,
        '{"step": ' + "1" * 5000 + "}",
        '{"step": 1, "a": ' + "[" * 40 + "]" * 40 + "}",
    ),
    '{"step": 1, "kind": "train"}',
    '{"step": 1, "kind": "train", "epoch": "x", "images_seen": 8}',
    '{"step": 1, "kind": "train", "epoch": 1, "images_seen": 8, "loss": "x"}',
    '{"step": 1, "kind": "train", "epoch": 1, "images_seen": 8, "images_per_s": -1}',
    '{"step": 1, "kind": "eval", "epoch": 1, "weights": "ema", "top1": null}',
    '{"step": 1, "kind": "eval", "epoch": 1, "weights": "ema", "top1": 101}',
    '{"step": 1, "kind": "eval", "epoch": 1, "weights": 7, "top1": 1}',
    '{"step": 1, "kind": "eval", "epoch": 1, "weights": "ema", "top1": 1, "top5": "x"}',
]


@pytest.mark.parametrize("line", STRANGE_LINES)
def test_a_line_of_wrong_values_is_left_out(path, line):
    path.write_text(f"{line}\n" + json.dumps({"kind": "eval", **eval_line(2, "ema", 50.0)}))
    assert steps_of(path) == [2]
    log = Logbook(path.parent, step=2, total_steps=6)
    assert log.best_top1() == 50.0
    log.close()


# ---------------------------------------------------------------------------------- the logbook


def test_a_log_that_no_run_writes_is_refused_by_its_size(path):
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match=r"over 17,179,869,184 bytes: .*log\.jsonl"):
        read(path)


def test_a_line_without_a_kind_keeps_no_run_from_going_on(path):
    path.write_text('{"step": 1}\n{"step": 1, "kind": ["eval"]}\n{"step": 1, "kind": "else"}\n')
    log = Logbook(path.parent, step=1, total_steps=6)
    log.close()
    assert log.evals == [] and steps_of(path) == [1, 1, 1]


def trained(step: int) -> dict[str, Any]:
    return train_line(step, grad_norm=math.inf if step == 2 else 1.0, data_wait=0.25)


def evaluated(step: int, top1: float) -> dict[str, Any]:
    return eval_line(step, "ema", top1, mean_per_class=top1)


@pytest.fixture
def run(path: Path) -> Path:
    """The log of a run of 6 steps, evaluated after each second one."""
    log = Logbook(path.parent, step=0, total_steps=6)
    for step in range(1, 7):
        log.train(trained(step))
        if step % 2 == 0:
            log.eval(evaluated(step, top1=90.0 - step))
    log.close()
    return path


def test_the_mean_over_classes_is_said_where_it_is_not_top1(tmp_path, capsys):
    log = Logbook(tmp_path, step=0, total_steps=6)
    log.eval(evaluated(2, top1=80.0))
    log.eval({**evaluated(4, top1=80.0), "mean_per_class": 71.25})
    log.eval(evaluated(6, top1=80.0), interval=(49.02, 94.33))
    log.close()
    balanced, unbalanced, few = capsys.readouterr().out.splitlines()
    assert "classes" not in balanced
    assert "top-1 80.00 %  top-5 100.00 %  mean of classes 71.25 %" in unbalanced
    assert "top-1 80.00 % (49.0 to 94.3)  top-5" in few


def test_going_on_drops_the_lines_of_lost_steps_and_keeps_the_best(run):
    log = Logbook(run.parent, step=3, total_steps=6)
    assert log.best_top1() == 88.0
    assert log.has_eval(2, "ema") and not log.has_eval(2, "raw") and not log.has_eval(4, "ema")
    log.train(trained(4))
    log.close()
    steps = [(line["kind"], line["step"]) for line in read(run)]
    assert steps == [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4)]


def test_a_damaged_line_costs_only_itself(run):
    lines = run.read_text().splitlines()
    lines[1] = lines[1][:20]
    run.write_text("\n".join(lines))
    assert len(read(run)) == len(lines) - 1


def test_every_line_is_json_also_where_a_number_is_not_finite(run):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    parsed = [json.loads(line, parse_constant=refuse) for line in run.read_text().splitlines()]
    assert parsed[1]["grad_norm"] is None


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = Logbook(None, step=0, total_steps=6)
    log.train(trained(1))
    log.eval(evaluated(1, 50.0))
    log.figure("picture", PICTURE, 0)
    with log.progress(10, "evaluating") as bar:
        bar.update(10)
    log.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_tensorboard_without_room_ends_itself_not_the_run(path, capsys, monkeypatch):
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    log = Logbook(path.parent, step=0, total_steps=6)
    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    for step in (1, 2):
        log.train(trained(step))
    log.figure("picture", PICTURE, 2)
    log.close()
    assert capsys.readouterr().out.count("tensorboard shows nothing more") == 1
    assert steps_of(path) == [1, 2]


def test_a_replaced_image_is_said_in_one_line_and_recorded_whole(tmp_path, capsys):
    log = Logbook(tmp_path, step=0, total_steps=6)
    log.bad_image(2, {"name": "a\x1b[2J\n.jpg", "reason": "cannot be decoded (x)"})
    log.close()
    said = r"step 2 took another image of its class for a\x1b[2J\n.jpg: cannot be decoded (x)"
    assert capsys.readouterr().out == f"{said}\n"
    assert read(tmp_path / "bad_images.jsonl")[0]["name"] == "a\x1b[2J\n.jpg"
