"""log.jsonl and what else a run says."""

from __future__ import annotations

import json
from pathlib import Path

from irv2 import jsonl
from irv2.logbook import Logbook


def train_line(step: int) -> dict:
    return {
        "step": step,
        "images_seen": 8 * step,
        "epoch": step / 4,
        "loss": 1.0 / step,
        "lr": 0.045,
        "grad_norm": float("inf") if step == 2 else 1.0,
        "images_per_s": 40.0,
        "data_wait": 0.25,
    }


def eval_line(step: int, top1: float) -> dict:
    line = {"step": step, "epoch": step / 4, "weights": "ema", "top1": top1, "top5": 100.0}
    line["mean_per_class"] = top1
    return {**line, "loss": 0.5, "images": 12}


def write_run(directory: Path) -> None:
    log = Logbook(directory, step=0, total_steps=6)
    for step in range(1, 7):
        log.train(train_line(step))
        if step % 2 == 0:
            log.eval(eval_line(step, top1=90.0 - step))
    log.close()


def test_the_mean_over_classes_is_said_where_it_is_not_top1(tmp_path: Path, capsys) -> None:
    log = Logbook(tmp_path, step=0, total_steps=6)
    log.eval(eval_line(2, top1=80.0))
    log.eval({**eval_line(4, top1=80.0), "mean_per_class": 71.25})
    log.close()
    balanced, unbalanced = capsys.readouterr().out.splitlines()
    assert "classes" not in balanced
    assert "top-1 80.00 %  top-5 100.00 %  mean of classes 71.25 %" in unbalanced


def test_going_on_drops_the_lines_of_lost_steps_and_keeps_the_best(tmp_path: Path) -> None:
    write_run(tmp_path)
    log = Logbook(tmp_path, step=3, total_steps=6)
    assert log.best_top1() == 88.0
    assert log.has_eval(2, "ema") and not log.has_eval(2, "raw") and not log.has_eval(4, "ema")
    log.train(train_line(4))
    log.close()
    steps = [(line["kind"], line["step"]) for line in jsonl.read(tmp_path / "log.jsonl")]
    assert steps == [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4)]


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "log.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:20]
    path.write_text("\n".join(lines))
    assert len(jsonl.read(path)) == len(lines) - 1


def test_every_line_is_json_also_where_a_number_is_not_finite(tmp_path: Path) -> None:
    write_run(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert parsed[1]["grad_norm"] is None


def test_other_ranks_write_nothing(tmp_path: Path, capsys) -> None:
    log = Logbook(None, step=0, total_steps=6)
    log.train(train_line(1))
    log.eval(eval_line(1, 50.0))
    log.text("config", "a: 1", 0)
    with log.progress(10, "evaluating") as bar:
        bar.update(10)
    log.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_tensorboard_without_room_ends_itself_not_the_run(tmp_path, capsys) -> None:
    log = Logbook(tmp_path, step=0, total_steps=6)

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    log._board.add_scalar = fail
    for step in (1, 2):
        log.train(train_line(step))
    log.text("config", "x", 2)
    log.close()
    assert capsys.readouterr().out.count("TensorBoard shows nothing more") == 1
    assert [line["step"] for line in jsonl.read(tmp_path / "log.jsonl")] == [1, 2]


def test_a_name_that_is_no_text_can_be_said(tmp_path, capsys) -> None:
    log = Logbook(tmp_path, step=0, total_steps=6)
    log.say("caf\udce9.jpg")
    log.close()
    assert "caf\\udce9.jpg" in capsys.readouterr().out
