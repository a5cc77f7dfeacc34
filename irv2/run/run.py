"""A run at work in its directory: its logs, saves and counts. The network is train.py's."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.base import Source
from data.errors import DataError, UserError
from data.loader import Batch, Replaced
from data.names import in_order
from data.stream import Key
from irv2.config import Config
from irv2.network.memory import peak_memory
from irv2.run import directory
from irv2.run.best import BestWeights
from irv2.run.checkpoint import CheckpointError
from irv2.run.jsonl import JsonLines
from irv2.run.logbook import Logbook
from irv2.run.profile import Profile
from irv2.run.resume import Experiment, meta
from irv2.run.saving import BackgroundSaver
from irv2.training.batch import Division
from irv2.training.distributed import World
from irv2.training.metrics import Pace, Predictions
from irv2.training.state import TrainState
from irv2.training.step import RUNNING


class DivergedError(UserError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Run:
    """The files of one run, and the counts that go into them.

        with Run(cfg, experiment, state, total_steps, world) as run:
            ... run.note_batch(batch), run.save(state, order), run.log_step(...) ...
            run.finish(state)                                   waits for the disk

    Ranks other than the main one have one, too: they vote, and write their part of the ledger.
    """

    def __init__(
        self, cfg: Config, experiment: Experiment, state: TrainState, total_steps: int, world: World
    ) -> None:
        """Open what is written in the run's directory, which exists and is locked."""
        self.cfg, self.experiment, self.world = cfg, experiment, world
        self.directory, self.total_steps = cfg.directory, total_steps
        self._keys: list[Key] = []  # of the images that the last step took, on this rank
        self._checksums: list[int] = []
        self._replaced: list[Replaced] = []
        self._shows_images = False

        is_saved = bool(directory.checkpoints(self.directory))
        directory.check_shared(self.directory, world)
        if world.is_main:
            directory.set_aside_unusable(self.directory, state.step)
            directory.write_config(self.directory, experiment.config)
        place = self.directory if world.is_main else None
        self.log = Logbook(place, state.step, total_steps, cfg.log.to, experiment.config)
        self._ledger: JsonLines | None = None
        if cfg.log.ledger:
            ranks = (world.rank, world.size)
            self._ledger = directory.open_ledger(self.directory, *ranks, state.step, print)
        self._best = BestWeights(self.directory, experiment, self.log.say)
        self._tried_step = state.step if is_saved else 0
        store, keep = self.directory / directory.STORE, cfg.checkpoint.keep
        self._saver = BackgroundSaver(store, keep, self._tried_step, self.log.say, RUNNING)
        self.pace = Pace()
        self._profile = Profile(cfg.log.profile, self.directory, world.rank, self.log.say)
        self._profile.between_steps(state.step)

    # ------------------------------------------------------------------ beginning and end

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._profile.close()
        self._saver.finish()

    def announce(self, model: nn.Module, division: Division, train: Source, val: Source) -> None:
        """Say what will be trained, on what, and where to watch it."""
        cfg, world, say = self.cfg, self.world, self.world.say
        parameters = sum(p.numel() for p in model.parameters())
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
        ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
        say(
            f"{cfg.run.name}: {model.title}, {parameters:,} parameters, "
            f"{len(self.experiment.classes)} classes, {cfg.data.sizes_in_words}, "
            f"{cfg.train.precision} on {ranks} of {device}"
        )
        say(
            f"data: {self.experiment.images_per_epoch:,} training and {len(val):,} validation "
            f"images; {self.total_steps:,} steps, {division.in_words(world.size)}"
        )
        say(f"classes in the order of the outputs: {in_order(self.experiment.classes)}")
        for line in (*train.remarks, *val.remarks):
            say(f"note: {line}")
        if cfg.model.freeze is not None:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            say(f"frozen: the {cfg.model.freeze}; {trained:,} parameters are trained")
        say(f"run: {self.directory}    watch: tensorboard --logdir {self.directory}")

    def finish(self, state: TrainState) -> None:
        """Wait until the last step is saved. Raises CheckpointError where it could not be."""
        self._saver.finish()
        if self.world.is_main and self._saver.saved_step < state.step:  # perhaps there is room now
            self._save(state)
            self._saver.finish()
        self.log.close()
        is_saved = self._saver.saved_step >= state.step
        is_lost = self.world.is_main and not (is_saved and self._best.flush())
        if self.world.any(is_lost):  # the ranks wait here for the main one's save
            raise CheckpointError(
                f"{self.directory}: step {state.step} could not be saved; fix what is said above, "
                "then start the same command again: it goes on from the newest checkpoint there"
            )

    # ------------------------------------------------------------------ images

    def note_batch(self, batch: Batch) -> None:
        """Take note of a micro-batch that this rank trains on; trackers show the first."""
        self._keys += batch.keys
        self._checksums += batch.checksums
        self._replaced += batch.replaced
        if self.log.active and not self._shows_images:
            data, classes = self.cfg.data, self.experiment.classes
            std, mean = (batch.images.new_tensor(v).view(1, 3, 1, 1) for v in (data.std, data.mean))
            labels = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)  # mixed
            names = [classes[label] for label in labels]
            self.log.images("training images", batch.images * std + mean, names)
            self._shows_images = True

    def note_images(self, state: TrainState, stopping: bool) -> bool:
        """Record the images of the last step, and those that any rank had to replace.

        Returns True if any rank is `stopping`. Raises DataError when too many images were unusable.
        """
        stopping, some_replaced = self.world.votes(stopping, bool(self._replaced))
        if not self._keys:
            return stopping
        if self._ledger is not None:
            indices = [index for _, index in self._keys]
            line = {"step": state.step, "indices": indices, "checksums": self._checksums}
            self._ledger.append(line)
        for image in self.world.gather(self._replaced) if some_replaced else ():
            state.bad_images += 1
            self.log.bad_image(state.step, image._asdict())
        self._keys, self._checksums, self._replaced = [], [], []
        allowed, epoch = self.cfg.data.max_bad_fraction, self.experiment.images_per_epoch
        if state.bad_images > allowed * max(epoch, state.images_seen):
            raise DataError(
                f"{state.bad_images} of {state.images_seen} images seen could not be used and were "
                f"replaced, more than data.max_bad_fraction={allowed:g} allows; "
                f"they are listed in {self.directory / 'bad_images.jsonl'}: mend or remove them"
            )
        return stopping

    # ------------------------------------------------------------------ steps

    def stepped(self, step: int) -> None:
        """Count a finished step, the run's number `step`."""
        self._profile.between_steps(step)
        self.pace.trained(self.cfg.train.global_batch)
        self.log.stepped()

    def log_step(
        self,
        state: TrainState,
        loss: Tensor,
        lr: float,
        grad_norm: Tensor,
        order: Sequence[list[Key]],
    ) -> None:
        """Record the last step; waits for the device. Raises DivergedError."""
        self._note_bad_steps(state, order)
        self.log.train(
            {
                "step": state.step,
                "images_seen": state.images_seen,
                "epoch": state.images_seen / self.experiment.images_per_epoch,
                "loss": loss.item(),
                "lr": lr,
                "grad_norm": grad_norm.item(),
                **self.pace.read(),
                "memory_gb": peak_memory(self.world.device) / 1e9,
            }
        )

    def _note_bad_steps(self, state: TrainState, order: Sequence[list[Key]]) -> None:
        """Record the steps left out. Raises DivergedError when there were too many in a row."""
        batch = self.cfg.train.global_batch
        bad_steps, in_a_row = state.read_bad_steps()
        for step in bad_steps:
            keys = order[(step - 1) * batch : step * batch]
            self.log.bad_step(step, [index for _, index in keys])
        if in_a_row > self.cfg.train.max_bad_steps:
            self._saver.finish()
            place = str(self.directory)
            is_saved = bool(directory.checkpoints(self.directory))
            origin = f"--resume {shlex.quote(place)} " if is_saved else ""
            raise DivergedError(
                f"step {state.step}: the loss or the gradient was not finite {in_a_row} times in a "
                f"row; none of these steps was applied. To go on with a lower rate, add: {origin}"
                f"run.dir={shlex.quote(place + '-lower')} optim.lr={self.cfg.optim.lr / 2:g}"
            )

    # ------------------------------------------------------------------ saving

    def save(self, state: TrainState, order: Sequence[list[Key]]) -> None:
        """Save the state during the next forward and backward, unless this step has been saved."""
        if state.step <= self._tried_step:
            return
        self._note_bad_steps(state, order)
        if self._ledger is not None:
            self._ledger.sync()
        if self.world.is_main:
            self.log.sync()
            self._save(state)
        self._tried_step = state.step

    def _save(self, state: TrainState) -> None:
        self._saver.begin(state.step, state.tensors(), meta(state, self.experiment))

    def wait_for_copy(self) -> None:
        """Wait until a save under way has copied the state, which is about to change."""
        self._saver.wait_for_copy()

    # ------------------------------------------------------------------ evaluations

    def has_evaluated(self, step: int, which: str) -> bool:
        """True if the log holds an evaluation of these weights ("ema" or "raw") at this step."""
        return self.world.any(self.log.has_eval(step, which))

    def log_evaluation(
        self,
        state: TrainState,
        which: str,
        model: nn.Module,
        predictions: Predictions,
        interval: tuple[float, float] | None = None,
    ) -> None:
        """Record an evaluation of the averaged ("ema") or raw weights, and keep the best.

        interval: of top-1 in percent, to be shown beside it.
        """
        line: dict[str, Any] = {
            "step": state.step,
            "epoch": state.images_seen / self.experiment.images_per_epoch,
            "weights": which,
            "top1": predictions.top1,
            "top5": predictions.top5,
            "mean_per_class": predictions.mean_per_class,
            "loss": predictions.mean_loss,
            "images": predictions.images,
        }
        if self.world.is_main and predictions.top1 > self.log.best_top1():
            self._best.write(model.state_dict(), line)
        self.log.eval(line, interval)
