"""Trackers of others, as stand-ins: what they are told, how a run goes on, what failing does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from calling import call
from programs import log_lines
from small_run import arguments
from written_runs import eval_line, train_line

import train
from data.errors import UserError
from irv2.run import trackers
from irv2.run.logbook import Logbook

PICTURE = np.zeros((4, 4, 3), np.uint8)
CONFIG = {"optim": {"lr": 0.1}}
OTHERS = ("wandb", "mlflow", "trackio")


class Store:
    """Tracked runs by their id, as each library keeps them: what was shown, and how often begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scalars: dict[str, dict[tuple[str, int], float]] = {}
        self.images: dict[str, list[tuple[str, int]]] = {}
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.options: dict[str, Any] = {}
        self.tags: dict[str, str] = {}  # MLflow's run -> our id
        modules = {
            "wandb": SimpleNamespace(init=self.init, Settings=dict, Image=lambda pixels: PICTURE),
            "trackio": SimpleNamespace(init=self.init, Image=lambda pixels: PICTURE),
            "mlflow": SimpleNamespace(MlflowClient=lambda: self),
        }
        for name, module in modules.items():
            module.__spec__ = importlib.util.spec_from_loader(name, None)
            monkeypatch.setitem(sys.modules, name, module)

    def init(self, *_: object, **options: Any) -> SimpleNamespace:
        """Begin or go on with a run, as wandb and trackio do."""
        self.options, key = options, options.get("id", options["name"])
        self.begun.append(key)
        return SimpleNamespace(
            log=lambda values, step: self.log(key, values, step),
            finish=lambda: self.ended.append(key),
        )

    def log(self, key: str, values: dict[str, Any], step: int) -> None:
        for tag, value in values.items():
            if value is PICTURE:
                self.images.setdefault(key, []).append((tag, step))
            else:
                self.scalars.setdefault(key, {})[tag, step] = value

    # As mlflow.MlflowClient

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "1"

    def search_runs(self, experiments: list[str], query: str) -> list[SimpleNamespace]:
        ids = [run for run, tag in self.tags.items() if query == f"tags.irv2_id = '{tag}'"]
        return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run in ids]

    def create_run(self, experiment: str, tags: dict, run_name: str) -> SimpleNamespace:
        run = f"{run_name}-{len(self.tags)}"
        self.tags[run] = tags["irv2_id"]
        self.begun.append(run)
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def update_run(self, run: str, status: str) -> None:
        self.begun.append(run)

    def log_dict(self, run: str, content: dict, name: str) -> None:
        self.options = {"config": content}

    def log_metric(self, run: str, key: str, value: float, step: int) -> None:
        self.log(run, {key: value}, step)

    def log_image(self, run: str, pixels: np.ndarray, name: str) -> None:
        self.images.setdefault(run, []).append((name.partition("/")[0], int(Path(name).stem)))

    def set_terminated(self, run: str) -> None:
        self.ended.append(run)


@pytest.fixture
def store(monkeypatch) -> Store:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return Store(monkeypatch)


def show(directory: Path, name: str, *steps: int) -> None:
    """Log steps, an evaluation and a picture, as a run does."""
    directory.mkdir(exist_ok=True)
    log = Logbook(directory, steps[0] - 1, 6, [name], CONFIG)
    for step in steps:
        log.train(train_line(step, grad_norm=1.0, data_wait=0.0))
    log.eval(eval_line(steps[-1], "ema", 90.0, mean_per_class=90.0))
    log.figure("a figure", PICTURE, steps[-1])
    log.close()


@pytest.mark.parametrize("name", OTHERS)
def test_a_resumed_run_goes_on_with_the_same_tracked_run(store, tmp_path, name):
    show(tmp_path / "a", name, 1, 2)
    show(tmp_path / "b", name, 1)
    show(tmp_path / "a", name, 3)
    first, other, again = store.begun
    assert first == again != other
    assert store.ended == store.begun
    assert {step for tag, step in store.scalars[first] if tag == "train/loss"} == {1, 2, 3}
    assert store.scalars[first]["train/loss", 2] == 0.5
    assert store.scalars[first]["eval_ema/top1", 3] == 90.0
    assert [step for _, step in store.images[first]] == [2, 3]
    assert store.options["config"] == CONFIG


@pytest.mark.parametrize(
    "variables, mode",
    [({}, "offline"), ({"WANDB_API_KEY": "k"}, "online"), ({"WANDB_MODE": "online"}, "online"),
     ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline")],
)  # fmt: skip
def test_wandb_is_offline_unless_the_environment_says_otherwise(
    store, tmp_path, monkeypatch, variables, mode
):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    show(tmp_path / "a", "wandb", 1)
    assert store.options["mode"] == mode and store.options["resume"] == "allow"


@pytest.mark.parametrize("method", ["__init__", "scalars", "image", "close"])
@pytest.mark.parametrize("error", [RuntimeError("the server\nis gone"), TypeError()])
def test_a_tracker_that_fails_ends_itself_not_the_run(
    store, tmp_path, monkeypatch, capsys, method, error
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(trackers.Wandb, method, fail)
    (tmp_path / "a").mkdir()
    log = Logbook(tmp_path / "a", 0, 6, ["wandb", "trackio"], CONFIG)
    for step in (1, 2):
        log.train(train_line(step, grad_norm=1.0, data_wait=0.0))
        log.figure("a figure", PICTURE, step)
    log.close()
    assert capsys.readouterr().out.count("wandb shows nothing more") == 1
    assert [line["step"] for line in log_lines(tmp_path / "a", "train")] == [1, 2]
    (trackio,) = (key for key in store.scalars if key.startswith("a-"))
    assert ("train/loss", 2) in store.scalars[trackio] and trackio in store.ended


@pytest.mark.parametrize("content", [b"", b"../../x\n", b"\xff\xfe", b"a" * 100, None])
def test_an_id_that_no_run_wrote_is_drawn_anew(tmp_path, content):
    if content is not None:
        (tmp_path / trackers.ID).write_bytes(content)
    tracked = trackers.Tracked(tmp_path, 0, {})
    assert len(tracked.id) == 16 and tracked.id == tracked.id


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(config, tmp_path):
    missing = [name for name in OTHERS if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed here")
    run = arguments(config, tmp_path / "run", f"log.to=[tensorboard, {missing[0]}]")
    status, out, error = call(train, *run)
    assert (status, out) == (1, "") and f"pip install {missing[0]}" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=f"log.to={missing[0]}: is not installed"):
        trackers.check_installed(missing)


def test_nothing_is_tracked_where_nothing_is_asked_for(tmp_path, store):
    log = Logbook(tmp_path, 0, 6, [], CONFIG)
    log.train(train_line(1, grad_norm=1.0, data_wait=0.0))
    log.close()
    assert store.begun == []
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
