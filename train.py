#!/usr/bin/env python3
"""Train an Inception-ResNet-v2 as a YAML file says.

  python train.py --config configs/quickstart.yaml
  torchrun --nproc-per-node=8 train.py --config configs/irv2_rmsprop.yaml

The same command continues a run that was stopped. Exit status: 0 finished, 1 something must be
mended first, 130 / 143 stopped by Ctrl-C / SIGTERM with a checkpoint written.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import loader, sources, stream, transforms
from irv2 import checkpoint, config, distributed, engine, optim, rundir
from irv2.config import Config
from irv2.distributed import World
from irv2.logbook import Logbook
from irv2.metrics import Pace
from irv2.model import inception_resnet_v2
from irv2.preemption import StopRequest
from irv2.schedule import Schedule, whole_periods

Batches = Iterator[tuple[Tensor, Tensor]]
MISTAKES = (
    config.ConfigError,
    sources.DataError,
    checkpoint.CheckpointError,
    distributed.WorldError,
    engine.NotFiniteError,
    OSError,  # no permission, no space: its own words name the file
)


def train(
    cfg: Config, division: distributed.Division, resume: str, world: World, stop: StopRequest
) -> int:
    """A run from its data to its last evaluation; returns the exit status."""
    # Data
    global_batch = cfg.train.global_batch
    source, val_source = sources.open_source(cfg.data.train), sources.open_source(cfg.data.val)
    sources.check_same_classes(val_source.classes, source.classes, cfg.data.val, cfg.data.train)
    total_steps = math.ceil(cfg.train.epochs * len(source) / global_batch)
    total_steps = min(total_steps, cfg.train.max_steps or total_steps)

    # Model, optimizer, running average, learning rate
    state = new_state(cfg, len(source.classes), world.device)
    schedule = Schedule(
        base_lr=cfg.optim.lr,
        images_per_epoch=len(source),
        total_epochs=cfg.train.epochs,
        **cfg.schedule.model_dump(),
    )

    # Resume
    experiment = rundir.Experiment(cfg.model_dump(), source.classes, len(source))
    rundir.restore(state, cfg.directory, resume, experiment, world.say)
    if not world.same(state.step):
        raise checkpoint.CheckpointError(
            f"{cfg.directory}: the ranks found different checkpoints in it; it must lie on a file "
            "system that all of them share"
        )
    saved_step = state.step if rundir.checkpoints(cfg.directory) else 0
    if world.is_main:
        _lock = rundir.lock(cfg.directory)  # held until this function ends
        rundir.write_config(cfg.directory, experiment.config)
    log = Logbook(cfg.directory if world.is_main else None, state.step, total_steps)
    log.text("config", rundir.config_text(experiment.config), state.step)
    announce(cfg, division, state.model, world, len(source), len(val_source), total_steps)

    # Loop
    options = engine.StepOptions(
        loss=engine.Loss(**cfg.loss.model_dump()),
        accumulation=division.accumulation,
        clip_norm=cfg.optim.clip_norm,
        precision=cfg.train.precision,
        seed=cfg.run.seed,
        freeze_bn=cfg.model.freeze_bn,
    )
    network = parallel(state.model, cfg.train.compile, world)
    pace = Pace()
    batches = training_batches(cfg, source, state.images_seen, division.micro_batch, world)
    batches = watched(batches, pace, log, cfg.data, source.classes)
    loss = grad_norm = torch.zeros(())
    while True:
        is_last = state.step >= total_steps
        stopping = world.any(stop.signal is not None)
        evaluating = is_last or evaluation_due(cfg, state.images_seen, len(source))
        saving = stopping or evaluating or state.step % cfg.checkpoint.every_steps == 0
        if saving and state.step > saved_step:
            engine.check_finite(state, loss, grad_norm)
            if world.is_main:
                rundir.save(state, cfg.directory, experiment, cfg.checkpoint.keep)
            saved_step = state.step
            pace.restart()
        if stopping:
            log.say(f"stopped after step {state.step}; the same command continues from there")
            break
        if evaluating:
            evaluate(cfg, state, val_source, experiment, log, world)
            pace.restart()
        if is_last:
            break

        lr = schedule.learning_rate(state.images_seen)
        loss, grad_norm = engine.train_step(state, network, batches, lr, options, world)
        state.images_seen += global_batch
        pace.trained(global_batch)
        log.stepped()
        if state.step % cfg.log.every_steps == 0 or state.step == total_steps:
            engine.check_finite(state, loss, grad_norm)
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
    if not stopping:
        log.say(f"finished: step {state.step} of {total_steps}, in {cfg.directory}")
    log.close()
    return stop.exit_status if stopping else 0


def new_state(cfg: Config, num_classes: int, device: torch.device) -> engine.TrainState:
    """The network with its first weights, its average and its optimizer, on the device."""
    torch.manual_seed(cfg.run.seed)
    model = inception_resnet_v2(num_classes, **cfg.model.model_dump(exclude={"freeze_bn"}))
    model = model.to(device, memory_format=torch.channels_last)
    return engine.TrainState(
        model,
        engine.running_average(model, cfg.ema.decay),
        optim.RMSpropTF(
            optim.parameter_groups(model, cfg.optim.weight_decay),
            **cfg.optim.model_dump(exclude={"weight_decay", "clip_norm"}),
        ),
        torch.amp.GradScaler(device.type, enabled=cfg.train.precision == "fp16"),
    )


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
    world.say(f"run: {cfg.directory}    watch: tensorboard --logdir {cfg.directory}")


def parallel(model: nn.Module, compiled: bool, world: World) -> nn.Module:
    """The model as a step calls it: compiled if asked, gradients averaged over ranks."""
    if compiled:
        model.compile()
    if world.size == 1:
        return model
    # Running statistics are averaged by the step itself, so none are broadcast. The option has a
    # new name in newer releases of PyTorch.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{option: False})


def training_batches(
    cfg: Config, source: sources.Source, start: int, micro_batch: int, world: World
) -> Iterator[loader.Batch]:
    """This rank's micro-batches from stream position `start` on, without end."""
    data = cfg.data
    view = transforms.TrainView(
        data.image_size, cfg.run.seed, data.crop_area, data.crop_aspect, data.hflip, data.colour
    )
    order = stream.Stream(len(source), cfg.run.seed)
    keys = stream.micro_batches(
        order, start, cfg.train.global_batch, micro_batch, world.rank, world.size
    )
    normalisation = loader.Normalisation(data.mean, data.std)
    workers = loader.Workers(data.workers)
    return loader.load(source, view, keys, normalisation, workers, world.device, replace_bad=True)


def watched(
    batches: Iterator[loader.Batch], pace: Pace, log: Logbook, data: config.Data, classes: list[str]
) -> Batches:
    """What a step needs of each; `pace` learns the time waited, TensorBoard shows the first."""
    is_first = True
    while True:
        asked = time.perf_counter()
        images, labels = next(batches)[:2]
        pace.waited(time.perf_counter() - asked)
        if is_first:
            std, mean = (images.new_tensor(v).view(1, 3, 1, 1) for v in (data.std, data.mean))
            log.images("training images", images * std + mean, [classes[i] for i in labels])
            is_first = False
        yield images, labels


def evaluation_due(cfg: Config, images_seen: int, images_per_epoch: int) -> bool:
    """Whether the last step reached or passed a multiple of eval.every_epochs."""
    before = max(0, images_seen - cfg.train.global_batch)
    now, then = (
        whole_periods(seen, cfg.eval.every_epochs, images_per_epoch)
        for seen in (images_seen, before)
    )
    return now > then


def evaluate(
    cfg: Config,
    state: engine.TrainState,
    source: sources.Source,
    experiment: rundir.Experiment,
    log: Logbook,
    world: World,
) -> None:
    """Evaluate averaged and raw weights, unless the log has them already; keep the best."""
    data = cfg.data
    view = transforms.EvalView(data.image_size, data.eval_crop, data.eval_interpolation)
    normalisation = loader.Normalisation(data.mean, data.std)
    for which, model in (("ema", state.ema.module), ("raw", state.model)):
        if world.any(log.has_eval(state.step, which)):
            continue
        keys = stream.evaluation_batches(len(source), cfg.eval.batch, world.rank, world.size)
        workers = loader.Workers(data.workers)
        batches = loader.load(source, view, keys, normalisation, workers, world.device)
        pairs = ((batch.images, batch.labels) for batch in batches)
        with log.progress(len(source), f"evaluating {which}") as bar:
            result = engine.evaluate(
                model, pairs, world, cfg.train.precision, lambda n: bar.update(n * world.size)
            )
        line = {
            "step": state.step,
            "epoch": state.images_seen / experiment.images_per_epoch,
            "weights": which,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "images": result.images,
        }
        if world.is_main and result.top1 > log.best_top1():
            rundir.write_best(cfg.directory, model.state_dict(), experiment, line)
        log.eval(line)


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
        division = distributed.divide_batch(
            cfg.train.global_batch, cfg.train.micro_batch, distributed.world_size()
        )
        with (
            StopRequest() as stop,
            distributed.start(cfg.run.device) as world,
            loader.worker_errors(),
        ):
            return train(cfg, division, arguments.resume, world, stop)

    return distributed.exit_status(
        body, MISTAKES, of_one_rank=(sources.ImageError, loader.WorkerError)
    )


if __name__ == "__main__":
    sys.exit(main())
