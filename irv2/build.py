"""Build from a config what trains: network, optimizer, average, step options, schedule, experiment.

Used by train.py and by programs that check or time a run beforehand; input_pipeline.py does the
same for images.
"""

from __future__ import annotations

import torch

from data.base import Source
from irv2 import input_pipeline
from irv2.config import Config
from irv2.network import memory
from irv2.network.accelerate import accelerate
from irv2.network.model import InceptionResnetV2, inception_resnet_v2
from irv2.run import directory
from irv2.run.resume import Experiment
from irv2.sections import Model
from irv2.training import batch, ceiling, finetune, graph, optim
from irv2.training.batch import Division
from irv2.training.distributed import World
from irv2.training.loss import Loss, balanced_weights
from irv2.training.schedule import Schedule
from irv2.training.state import TrainState, running_average
from irv2.training.step import PRECISIONS, StepOptions


def network(section: Model, num_classes: int) -> InceptionResnetV2:
    """Build the plain network of a config's "model", with random weights, frozen as it says."""
    about_training = {"freeze_bn", "init", "freeze"}
    model = inception_resnet_v2(num_classes, **section.model_dump(exclude=about_training))
    if section.freeze is not None:
        finetune.freeze(model, section.freeze)
    return model


def new_state(cfg: Config, num_classes: int, device: torch.device) -> TrainState:
    """Build a network with its first weights, its average and its optimizer, on the device."""
    torch.manual_seed(cfg.run.seed)
    model = network(cfg.model, num_classes)
    if cfg.train.accelerate:
        model = accelerate(model)
    model = model.to(device, memory_format=torch.channels_last)
    return TrainState(
        model,
        running_average(model, cfg.ema.decay),
        optim.KINDS[cfg.optim.kind](
            optim.parameter_groups(
                model, cfg.optim.weight_decay, finetune.lr_scales(model, cfg.optim.layer_decay)
            ),
            lr=cfg.optim.lr,
            **cfg.optim.hyper_parameters,
        ),
        torch.amp.GradScaler(device.type, enabled=cfg.train.precision == "fp16"),
    )


def step_options(cfg: Config, accumulation: int, train_data: Source, world: World) -> StepOptions:
    """Options of every step of a run; says so where a step cannot be recorded as asked."""
    class_weights = None
    if cfg.loss.class_weights == "balanced":
        class_weights = balanced_weights(train_data.class_counts()).to(world.device)
    compiled, run = graph.chosen(cfg.train.compile, cfg.train.precision, world, cfg.optim.kind)
    return StepOptions(
        loss=Loss(cfg.loss.label_smoothing, cfg.loss.aux_weight, class_weights),
        accumulation=accumulation,
        clip_norm=cfg.optim.clip_norm,
        precision=cfg.train.precision,
        seed=cfg.run.seed,
        freeze_bn=cfg.model.freeze_bn,
        compiled=compiled,
        run=run,
        reduce_dtype=cfg.train.reduce_dtype,
    )


def schedule(cfg: Config, images_per_epoch: int) -> Schedule:
    """Learning rate, length and periods of a run."""
    return Schedule(
        base_lr=cfg.optim.lr,
        images_per_epoch=images_per_epoch,
        total_epochs=cfg.train.epochs,
        global_batch=cfg.train.global_batch,
        max_steps=cfg.train.max_steps,
        **cfg.schedule.model_dump(),
    )


def pace_ceiling(cfg: Config, num_classes: int, world: World) -> float | None:
    """Measure the images a second that the devices' matrix rate would allow; None if unasked, or if
    images are not of one size."""
    if not (cfg.log.utilisation and world.is_main and cfg.data.train_sizes is None):
        return None
    section = cfg.model.model_copy(update={"grad_checkpointing": False})
    with torch.device("meta"):
        model = network(section, num_classes)
    dtype = PRECISIONS[cfg.train.precision] or torch.float32
    rate = ceiling.matrix_rate(dtype, world.device)
    return world.size * rate / ceiling.training_multiply_adds(model, cfg.data.image_size)


def experiment(cfg: Config, division: Division, train_data: Source) -> Experiment:
    """Return the facts that must stay the same for the run to be resumed."""
    resolved = cfg.model_dump()
    if cfg.train.micro_batch == "auto":
        resolved["train"]["micro_batch"] = division.micro_batch  # to resume with
    stored = input_pipeline.storage_facts(cfg, train_data)
    return Experiment(resolved, train_data.classes, len(train_data), stored)


# ------------------------------------------------------------------------------ micro-batches


def check_batch(cfg: Config, ranks: int) -> None:
    """Raise WorldError if this many ranks cannot divide the batch, before a device is touched."""
    train = cfg.train
    is_auto = train.micro_batch == "auto"  # chosen later, when the device is known
    micro_batch = train.global_batch if is_auto else train.micro_batch
    batch.divide(train.global_batch, micro_batch, ranks, cfg.data.mixes_pairs and not is_auto)


def divide_batch(cfg: Config, num_classes: int, world: World) -> Division:
    """Divide the global batch as the config says, identically on all ranks. Raises WorldError.

    `train.micro_batch=auto` is what the rank with the least memory can take at once.
    """
    train, micro_batch = cfg.train, cfg.train.micro_batch
    if micro_batch == "auto":
        room = world.smallest(batch.memory_room(world.device, world.size))
        before = directory.micro_batch_before(cfg.directory)
        # Agreed on again: a rank on another host may not yet see the run's previous micro-batch.
        micro_batch = world.smallest(
            fitting_micro_batch(cfg, num_classes, world.size, room, before)
        )
    return batch.divide(train.global_batch, micro_batch, world.size, cfg.data.mixes_pairs)


def fitting_micro_batch(
    cfg: Config, num_classes: int, ranks: int, room: int, before: int | None = None
) -> int:
    """Micro-batch that fits into `room` bytes; see `batch.largest_micro_batch`."""
    share = batch.rank_share(cfg.train.global_batch, cfg.train.global_batch, ranks)
    sizes = memory_sizes(cfg, num_classes)
    return batch.largest_micro_batch(share, sizes, room, cfg.data.mixes_pairs, before)


def memory_sizes(cfg: Config, num_classes: int) -> memory.Sizes:
    """Memory that the config's network takes in training, computed from shapes alone."""
    section = cfg.model.model_copy(update={"grad_checkpointing": False})
    with torch.device("meta"):
        model = network(section, num_classes)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    low_precision = PRECISIONS[cfg.train.precision]
    activations, largest = memory.activation_bytes(
        model.to(low_precision or torch.float32),
        cfg.data.largest_size,
        cfg.model.grad_checkpointing,
    )
    cast_weights = trainable // 2 if low_precision else 0
    return memory.Sizes(weights, trainable, activations, largest, cast_weights)
