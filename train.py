#!/usr/bin/env python3
"""Train an Inception-ResNet-v2 as a YAML file says.

  python train.py --config configs/quickstart.yaml
  torchrun --nproc-per-node=8 train.py --config configs/irv2_rmsprop.yaml

The same command continues a run that was stopped. Exit status: 0 finished; 1 something must be
mended first; stopped with a checkpoint written: 75 by SIGTERM or SIGUSR1, 130 by Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import feed
import recipe
from data import loader, sources, stream, workers
from irv2 import checkpoint, config, distributed, engine, figures, finetune, rundir, weights
from irv2.config import Config
from irv2.distributed import World
from irv2.jsonl import JsonLines
from irv2.logbook import Logbook
from irv2.metrics import Pace, Predictions
from irv2.preemption import Stopped, StopRequest, until_stopped
from irv2.program import exit_status
from irv2.saving import BackgroundSaver
from irv2.schedule import Schedule, period_ended

Pairs = Iterator[tuple[Tensor, Tensor]]  # images and labels
MISTAKES = (
    config.ConfigError,
    sources.DataError,
    checkpoint.CheckpointError,
    weights.WeightsError,
    distributed.WorldError,
    engine.DivergedError,
    OSError,  # no permission, no space: its own words name the file
)


def train(cfg: Config, resume: str, world: World, stop: StopRequest) -> int:
    """A run from its data to its last evaluation; returns the exit status."""
    # Data
    global_batch = cfg.train.global_batch
    source, val_source = feed.open_sources(cfg)
    order = feed.training_order(cfg, source)
    total_steps = math.ceil(cfg.train.epochs * len(source) / global_batch)
    total_steps = min(total_steps, cfg.train.max_steps or total_steps)

    before = rundir.micro_batch_before(cfg.directory)
    micro_batch = recipe.micro_batch(cfg, len(source.classes), world, before)
    division = distributed.divide_batch(global_batch, micro_batch, world.size)

    # Model, optimizer, running average, learning rate
    state = recipe.new_state(cfg, len(source.classes), world.device)
    schedule = Schedule(
        base_lr=cfg.optim.lr,
        images_per_epoch=len(source),
        total_epochs=cfg.train.epochs,
        **cfg.schedule.model_dump(),
    )

    # Resume
    stored = feed.how_stored(cfg, source)
    resolved = cfg.model_dump()
    if cfg.train.micro_batch == "auto":
        resolved["train"]["micro_batch"] = division.micro_batch  # to go on with
    experiment = rundir.Experiment(resolved, source.classes, len(source), stored)
    is_new = not cfg.directory.exists()
    if world.is_main and not is_new:
        _lock = rundir.lock(cfg.directory)  # held until this function ends
    rundir.restore(state, cfg.directory, resume, experiment, world.say)
    if not world.same(state.step):
        raise checkpoint.CheckpointError(
            f"{cfg.directory}: the ranks found different checkpoints in it; it must lie on a file "
            "system that all of them share"
        )
    if state.step == 0 and cfg.model.init is not None:
        finetune.begin(state, cfg.model.init, source.classes, world)
    is_saved = bool(rundir.checkpoints(cfg.directory))
    if world.is_main and is_new:
        _lock = rundir.lock(cfg.directory)
    distributed.check_shared(cfg.directory, world)
    if world.is_main:
        rundir.set_aside_unusable(cfg.directory, state.step)
        rundir.write_config(cfg.directory, experiment.config)
    log = Logbook(cfg.directory if world.is_main else None, state.step, total_steps)
    log.text("config", rundir.config_text(experiment.config), state.step)
    announce(cfg, division, state.model, world, len(source), len(val_source), total_steps)

    # Loop
    options = recipe.step_options(cfg, division.accumulation, source, world.device)
    network = distributed.parallel(state.model, cfg.train.compile, world, cfg.train.reduce_dtype)
    pace, taken = Pace(), feed.Taken()
    batches = feed.training_batches(
        cfg, source, order, state.images_seen, division.micro_batch, world
    )
    batches = watched(batches, taken, pace, log, world.device, cfg.data, source.classes)
    if world.size > 1:
        size = (division.micro_batch, 3, cfg.data.image_size, cfg.data.image_size)
        blank = torch.zeros(size, device=world.device).contiguous(memory_format=torch.channels_last)
        engine.settle(state, network, blank, options)
    ledger = None
    if cfg.log.ledger:
        ledger = rundir.open_ledger(cfg.directory, world.rank, world.size, state.step, print)
    best = rundir.BestWeights(cfg.directory, experiment, log.say)
    tried_step = state.step if is_saved else 0
    store = cfg.directory / rundir.STORE
    saver = BackgroundSaver(store, cfg.checkpoint.keep, tried_step, log.say, engine.RUNNING)
    with saver:
        while True:
            is_last = state.step >= total_steps
            stopping, some_replaced = world.votes(stop.signal is not None, bool(taken.replaced))
            if taken.keys:
                replaced = world.gather(taken.replaced) if some_replaced else []
                note_taken(cfg, state, taken, replaced, len(source), ledger, log)
            evaluating = is_last or period_ended(
                state.images_seen, global_batch, cfg.eval.every_epochs, len(source)
            )
            saving = stopping or evaluating or state.step % cfg.checkpoint.every_steps == 0
            if saving and state.step > tried_step:
                note_bad_steps(cfg, state, order, saver, log)
                if ledger is not None:
                    ledger.sync()
                if world.is_main:
                    log.sync()
                    saver.begin(state.step, state.tensors(), rundir.meta(state, experiment))
                tried_step = state.step
            if evaluating and not stopping:
                stopping = not evaluate(cfg, state, val_source, best, log, world, stop)
                pace.restart()
            if stopping or is_last:
                break

            lr = schedule.learning_rate(state.images_seen)
            loss, grad_norm = engine.train_step(
                state, network, batches, lr, options, world, saver.wait_for_copy
            )
            state.images_seen += global_batch
            pace.trained(global_batch)
            log.stepped()
            if state.step % cfg.log.every_steps == 0 or state.step == total_steps:
                note_bad_steps(cfg, state, order, saver, log)
                log.train(
                    {
                        "step": state.step,
                        "images_seen": state.images_seen,
                        "epoch": state.images_seen / len(source),
                        "loss": loss.item(),
                        "lr": lr,
                        "grad_norm": grad_norm.item(),
                        **pace.read(),
                    }
                )

        saver.finish()
        if world.is_main and saver.saved_step < state.step:  # perhaps there is room again
            saver.begin(state.step, state.tensors(), rundir.meta(state, experiment))

    # End
    log.close()
    is_lost = world.is_main and not (saver.saved_step >= state.step and best.flush())
    if world.any(is_lost):  # the ranks wait here for the main one's save
        raise checkpoint.CheckpointError(
            f"{cfg.directory}: step {state.step} could not be saved; mend what is said above, then "
            "start the same command again: it goes on from the newest checkpoint there"
        )
    if stopping:
        log.say(f"stopped after step {state.step}; the same command continues from there")
    else:
        log.say(f"finished: step {state.step} of {total_steps}, in {cfg.directory}")
    return stop.exit_status if stopping else 0


def announce(
    cfg: Config,
    division: distributed.Division,
    model: nn.Module,
    world: World,
    train_images: int,
    val_images: int,
    total_steps: int,
) -> None:
    """Say what is about to happen."""
    parameters = sum(p.numel() for p in model.parameters())
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
    world.say(
        f"{cfg.run.name}: Inception-ResNet-v2, {parameters:,} parameters, "
        f"{model.classif.out_features} classes, {cfg.data.image_size} px, "
        f"{cfg.train.precision} on {ranks} of {device}"
    )
    world.say(
        f"data: {train_images:,} training and {val_images:,} validation images; "
        f"{total_steps:,} steps of {cfg.train.global_batch} = "
        f"{ranks} x {division.accumulation} accumulated x {division.micro_batch}"
    )
    if cfg.model.freeze is not None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        world.say(f"frozen: the {cfg.model.freeze}; {trained:,} parameters are trained")
    world.say(f"run: {cfg.directory}    watch: tensorboard --logdir {cfg.directory}")


def watched(
    batches: Iterator[loader.Batch],
    taken: feed.Taken,
    pace: Pace,
    log: Logbook,
    device: torch.device,
    data: config.Data,
    classes: list[str],
) -> Pairs:
    """The batches' images and labels; `taken` and `pace` learn of them, TensorBoard shows the
    first."""
    is_first = True
    while True:
        with pace.waiting(device):
            batch = next(batches)
        taken.keys += batch.keys
        taken.checksums += batch.checksums
        taken.replaced += batch.replaced
        if is_first and log.active:
            std, mean = (batch.images.new_tensor(v).view(1, 3, 1, 1) for v in (data.std, data.mean))
            labels = batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)  # mixed
            names = [classes[label] for label in labels]
            log.images("training images", batch.images * std + mean, names)
            is_first = False
        yield batch.images, batch.labels


def note_taken(
    cfg: Config,
    state: engine.TrainState,
    taken: feed.Taken,
    replaced: list[loader.Replaced],
    images_per_epoch: int,
    ledger: JsonLines | None,
    log: Logbook,
) -> None:
    """Record what the last step took, and what all ranks had to replace.

    Raises DataError when too many images were unusable.
    """
    if ledger is not None:
        indices = [index for _, index in taken.keys]
        ledger.append({"step": state.step, "indices": indices, "checksums": taken.checksums})
    for image in replaced:
        state.bad_images += 1
        log.bad_image(state.step, image._asdict())
    for items in (taken.keys, taken.checksums, taken.replaced):
        items.clear()
    if state.bad_images > cfg.data.max_bad_fraction * max(images_per_epoch, state.images_seen):
        raise sources.DataError(
            f"{state.bad_images} of {state.images_seen} images seen could not be used and were "
            f"replaced, more than data.max_bad_fraction={cfg.data.max_bad_fraction:g} allows; "
            f"they are listed in {cfg.directory / 'bad_images.jsonl'}: mend or remove them"
        )


def note_bad_steps(
    cfg: Config,
    state: engine.TrainState,
    order: stream.Stream,
    saver: BackgroundSaver,
    log: Logbook,
) -> None:
    """Record the steps left out. Raises DivergedError when there were too many in a row."""
    batch = cfg.train.global_batch
    bad_steps, in_a_row = engine.read_bad_steps(state)
    for step in bad_steps:
        keys = order[(step - 1) * batch : step * batch]
        log.bad_step(step, [index for _, index in keys])
    if in_a_row > cfg.train.max_bad_steps:
        saver.finish()
        directory = str(cfg.directory)
        origin = f"--resume {shlex.quote(directory)} " if rundir.checkpoints(cfg.directory) else ""
        raise engine.DivergedError(
            f"step {state.step}: the loss or the gradient was not finite {in_a_row} times in a "
            f"row; none of these steps was applied. To go on with a lower rate, add: {origin}"
            f"run.dir={shlex.quote(directory + '-lower')} optim.lr={cfg.optim.lr / 2:g}"
        )


def evaluate(
    cfg: Config,
    state: engine.TrainState,
    source: sources.Source,
    best: rundir.BestWeights,
    log: Logbook,
    world: World,
    stop: StopRequest,
) -> bool:
    """Evaluate averaged and raw weights, unless the log has them already; keep the best.

    Returns whether it came to its end; a stopped evaluation is done again when the run goes on.
    """
    for which, model in (("ema", state.ema.module), ("raw", state.model)):
        if world.any(log.has_eval(state.step, which)):
            continue
        batches = feed.evaluation_batches(cfg, source, world)
        rounds = stream.evaluation_rounds(len(source), cfg.eval.batch, world.size)
        batches = until_stopped(batches, rounds, lambda: world.any(stop.signal is not None))
        asked = ((b.images, b.labels, [index for _, index in b.keys]) for b in batches)
        with log.progress(len(source), f"evaluating {which}") as bar:
            try:
                result = engine.evaluate(
                    model,
                    asked,
                    world,
                    engine.EvalOptions(cfg.train.precision),
                    lambda images, _: bar.update(images * world.size),
                )
            except Stopped:
                return False
        line = {
            "step": state.step,
            "epoch": state.images_seen / best.experiment.images_per_epoch,
            "weights": which,
            "top1": result.top1,
            "top5": result.top5,
            "mean_per_class": result.mean_per_class,
            "loss": result.mean_loss,
            "images": result.images,
        }
        if world.is_main and result.top1 > log.best_top1():
            best.write(model.state_dict(), line)
        if world.is_main and which == "ema" and state.step >= log.total_steps:
            show_result(cfg, result, source, state.step, log)
        log.eval(line)
    return True


def show_result(
    cfg: Config, result: Predictions, source: sources.Source, step: int, log: Logbook
) -> None:
    """Show in TensorBoard which classes are taken for which, and the surest wrong answers."""
    if len(source.classes) <= figures.MOST_CLASSES:
        log.figure("confusion matrix", figures.confusion_matrix(result, source.classes), step)
    pictures = feed.pictures(cfg, source, figures.most_confident_mistakes(result))
    if pictures:
        drawn = figures.mistakes(result, pictures, source.classes)
        log.figure("most confident mistakes", drawn, step)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=config.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="the run to train")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): continue the run where it was; never: refuse to; "
        "PATH: begin from another run, or one of its checkpoints",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace keys of the YAML file"
    )
    return parser.parse_intermixed_args()


def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()

    def body() -> int:
        cfg = config.load(arguments.config, arguments.overrides)
        feed.check_division(cfg, distributed.world_size())
        with (
            StopRequest() as stop,
            distributed.start(cfg.run.device, cfg.run.timeout_s) as world,
            workers.worker_errors(),
        ):
            return train(cfg, arguments.resume, world, stop)

    return exit_status(
        body,
        MISTAKES,
        of_one_rank=(sources.ImageError, sources.StorageError, workers.WorkerError),
    )


if __name__ == "__main__":
    sys.exit(main())
