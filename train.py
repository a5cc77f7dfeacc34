#!/usr/bin/env python3
"""Train an Inception-ResNet-v2 as a YAML file describes.

  python train.py --config configs/quickstart.yaml
  torchrun --nproc-per-node=8 train.py --config configs/irv2_rmsprop.yaml

The same command resumes a run that was stopped. Exit status: 0 finished; 1 something must be fixed
first; stopped with a checkpoint written: 75 by SIGTERM or SIGUSR1, 130 by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from data.base import Source
from data.workers import worker_errors
from irv2 import build, cli, config_file, evaluation, input_pipeline
from irv2.config import Config
from irv2.run import directory, resume, trackers
from irv2.run.resume import Experiment
from irv2.run.run import Run
from irv2.run.stopping import StopRequest
from irv2.training import distributed, finetune, prepare, step
from irv2.training.distributed import World
from irv2.training.state import TrainState
from irv2.training.step import StepOptions


def train(cfg: Config, resume_from: str, world: World, stop: StopRequest) -> int:
    """Train a run to its end or to the next signal; returns the exit status."""
    # Data
    train_data, val_data = input_pipeline.open_sources(cfg)
    input_pipeline.try_validation(cfg, val_data, world)
    classes = train_data.classes
    order = input_pipeline.training_order(cfg, train_data)
    division = build.divide_batch(cfg, len(classes), world)

    # Model, optimizer, running average, learning rate
    state = build.new_state(cfg, len(classes), world.device)
    options = build.step_options(cfg, division.accumulation, train_data, world)
    schedule = build.schedule(cfg, len(train_data))

    # Resume or begin
    experiment = build.experiment(cfg, division, train_data)
    with open_run(cfg, experiment, state, schedule.total_steps, resume_from, world) as run:
        run.announce(state.model, division, train_data, val_data)
        network = prepare.network(
            state, division.micro_batch, cfg.data.largest_size, options, world
        )
        run.pace.ceiling = build.pace_ceiling(cfg, len(classes), world)
        batches = input_pipeline.training_batches(
            cfg, train_data, order, state.images_seen, division.micro_batch, world
        )

        while True:
            # Between two steps nothing changes: note, save, evaluate, stop
            is_last = state.step >= schedule.total_steps
            stopping = run.note_images(state, stopping=stop.signal is not None)
            evaluating = is_last or schedule.period_ended(state.images_seen, cfg.eval.every_epochs)
            if stopping or evaluating or state.step % cfg.checkpoint.every_steps == 0:
                run.save(state, order)
            if evaluating and not stopping:
                stopping = not evaluate(run, state, val_data, options, stop)
            if stopping or is_last:
                break

            # Forward and backward, one micro-batch at a time
            lr = schedule.learning_rate(state.images_seen)
            before = step.begin(state, options)
            loss = torch.zeros((), device=world.device)
            for part in range(division.accumulation):
                with run.pace.waiting(world.device):
                    batch = next(batches)
                run.note_batch(batch)
                loss += step.forward_backward(
                    state, network, batch.images, batch.labels, part, options, world
                )

            # Clip, update, average; a step that is not finite is undone
            run.wait_for_copy()
            grad_norm = step.update(state, loss, before, lr, options, world)
            state.images_seen += cfg.train.global_batch
            run.stepped(state.step)

            # Log
            if state.step % cfg.log.every_steps == 0 or state.step == schedule.total_steps:
                run.log_step(state, loss, lr, grad_norm, order)

        run.finish(state)
    if stopping:
        run.log.say(f"stopped after step {state.step}; the same command continues from there")
        return stop.exit_status
    run.log.say(f"finished: step {state.step} of {schedule.total_steps}, in {cfg.directory}")
    return 0


@contextmanager
def open_run(
    cfg: Config,
    experiment: Experiment,
    state: TrainState,
    total_steps: int,
    resume_from: str,
    world: World,
) -> Iterator[Run]:
    """Resume or begin a run. Nothing is written before all that could be refused has been checked;
    a directory that exists is locked before it is read."""
    with ExitStack() as stack:
        is_there = cfg.directory.exists()
        if world.is_main and is_there:
            stack.enter_context(directory.lock(cfg.directory))
        resume.restore(state, cfg.directory, resume_from, experiment, world)
        if state.step == 0 and cfg.model.init is not None:
            finetune.begin(state, cfg.model.init, experiment.classes, world)
        if world.is_main and not is_there:
            stack.enter_context(directory.lock(cfg.directory))
        yield stack.enter_context(Run(cfg, experiment, state, total_steps, world))


def evaluate(
    run: Run, state: TrainState, val_data: Source, options: StepOptions, stop: StopRequest
) -> bool:
    """Evaluate averaged and raw weights and keep the best; False if a signal cut it short.

    Evaluations already in the log are skipped; one that was cut short is repeated on resuming.
    """
    for which, model in (("ema", state.ema.module), ("raw", state.model)):
        if run.has_evaluated(state.step, which):
            continue
        with run.log.progress(len(val_data), f"evaluating {which}") as bar:
            predictions = evaluation.predict(
                run.cfg, model, val_data, run.world, bar, stop, options.run
            )
        if predictions is None:
            return False
        interval = evaluation.shown_interval(predictions)
        run.log_evaluation(state, which, model, predictions, interval)
        if which == "ema" and state.step >= run.total_steps:
            evaluation.draw(run.cfg, predictions, val_data, run.log, state.step)
    run.pace.restart()
    return True


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, epilog=config_file.describe())
    parser.add_argument(
        "--config", type=cli.location, required=True, metavar="YAML", help="the run to train"
    )
    parser.add_argument(
        "--resume",
        type=cli.location,
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): continue the run where it was; never: refuse to; "
        "PATH: begin from another run, or one of its checkpoints",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace keys of the YAML file"
    )
    return parser.parse_intermixed_args()


@cli.run
def main() -> int:
    """Command line -> exit status."""
    arguments = parse_arguments()
    cfg = config_file.load(arguments.config, arguments.overrides)
    build.check_batch(cfg, distributed.place().size)  # before a device is touched
    trackers.check_installed(cfg.log.to)
    with (
        StopRequest() as stop,
        distributed.start(cfg.run.device, cfg.run.timeout_s, cfg.run.deterministic) as world,
        worker_errors(),
    ):
        return train(cfg, arguments.resume, world, stop)


if __name__ == "__main__":
    sys.exit(main())
