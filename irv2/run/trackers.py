"""Where a run's curves and pictures are shown: TensorBoard and, if asked for, other trackers.

None of them is needed: what fails shows nothing more, and the run goes on. wandb, mlflow and
trackio are imported only where a run names them, keep what they have on this machine unless their
own environment variables lead elsewhere, and go on with the same tracked run when one is resumed.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from data.errors import UserError
from data.files import read_text, write_atomically
from data.optional import is_installed
from irv2.run.directory import TENSORBOARD, config_text

PROJECT = "irv2"
ID = "tracked"  # file in the run directory: under which id trackers know the run
_LONGEST_ID = 64  # bytes


class Tracked(NamedTuple):
    """Facts of a run that a tracker gets at its beginning."""

    directory: Path
    step: int  # at which it begins or goes on
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name to people."""
        return self.directory.name

    @property
    def id(self) -> str:
        """The run's name among all runs, drawn when it is first tracked."""
        path = self.directory / ID
        with suppress(OSError, UnicodeDecodeError):
            if (known := read_text(path, _LONGEST_ID).strip()).isalnum():
                return known
        drawn = secrets.token_hex(8)
        write_atomically(path, f"{drawn}\n")
        return drawn


class Tracker(Protocol):
    """Interface of a tracker, whose constructor takes a `Tracked`."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...
    def image(self, tag: str, pixels: np.ndarray, step: int) -> None: ...  # uint8 [H, W, 3]
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, run: Tracked) -> None:
        self._board = SummaryWriter(
            str(run.directory / TENSORBOARD),
            purge_step=run.step + 1,
            filename_suffix=f".{secrets.token_hex(8)}",  # for which nobody can have put a link
        )
        indented = "".join(f"    {line}\n" for line in config_text(run.config).splitlines())
        self._board.add_text("config", indented, run.step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._board.add_image(tag, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class Wandb:
    """Weights & Biases: offline, in ./wandb, unless WANDB_API_KEY or WANDB_MODE is set."""

    def __init__(self, run: Tracked) -> None:
        self._wandb = importlib.import_module("wandb")
        keyed = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            config=run.config,
            mode=os.environ.get("WANDB_MODE", keyed),
            settings=self._wandb.Settings(console="off", silent=True),
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow: in its store on this machine unless MLFLOW_TRACKING_URI is set."""

    def __init__(self, run: Tracked) -> None:
        self._client = client = importlib.import_module("mlflow").MlflowClient()
        known = client.get_experiment_by_name(PROJECT)
        experiment = client.create_experiment(PROJECT) if known is None else known.experiment_id
        runs = client.search_runs([experiment], f"tags.{PROJECT}_id = '{run.id}'")
        if runs:
            self._id = runs[0].info.run_id
            client.update_run(self._id, "RUNNING")
        else:
            tags = {f"{PROJECT}_id": run.id}
            self._id = client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
            client.log_dict(self._id, run.config, "config.yaml")

    def scalars(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._client.log_image(self._id, pixels, f"{tag}/{step}.png".replace(" ", "_"))

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """Trackio: in its store on this machine unless TRACKIO_SPACE_ID is set."""

    def __init__(self, run: Tracked) -> None:
        self._trackio = importlib.import_module("trackio")
        name = f"{run.name}-{run.id}"
        self._run = self._trackio.init(PROJECT, name=name, config=run.config, resume="allow")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._run.log({tag: self._trackio.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_installed(names: Iterable[str]) -> None:
    """Raise UserError for a tracker whose library is not installed."""
    for name in names:
        if not is_installed(name):
            raise UserError(f"log.to={name}: is not installed: pip install {name}")


class Trackers:
    """The trackers of a run; one that fails, in whatever way, is closed and said once."""

    def __init__(self, names: Iterable[str], run: Tracked, say: Callable[[str], None]) -> None:
        self._open: dict[str, Tracker] = {}
        self._say = say
        for name in names:
            self._guarded(name, lambda name=name: self._open.update({name: KINDS[name](run)}))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Show numbers, "train/loss" and the like, at a step."""
        self._each(lambda tracker: tracker.scalars(values, step))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Show a picture, uint8 [H, W, 3], at a step."""
        self._each(lambda tracker: tracker.image(tag, pixels, step))

    def close(self) -> None:
        """Write what is left and close them."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, show: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, lambda tracker=tracker: show(tracker))

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a library of others, which may raise anything
            tracker = self._open.pop(name, None)
            if tracker is not None:
                with suppress(Exception):  # a thread of its must not keep trying
                    tracker.close()
            reason = str(error) or type(error).__name__
            self._say(f"{name} shows nothing more until the run is started again ({reason})")
