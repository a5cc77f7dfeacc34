"""From what a config says of a network and its training to the things that train.

What train.py and the programs that look at a run beforehand (scripts/doctor.py) or time it
(scripts/benchmark.py) have in common; feed.py is its counterpart for images.
"""

from __future__ import annotations

import os

import torch

from data import sources
from irv2 import engine, finetune, memory, optim
from irv2.config import Config, Model
from irv2.distributed import World, WorldError, divide_batch
from irv2.loss import Loss, balanced_weights
from irv2.model import InceptionResnetV2, inception_resnet_v2

MEMORY_SHARE = 0.85  # of what a device has, for train.micro_batch=auto: the sizes are estimates


def network(section: Model, num_classes: int) -> InceptionResnetV2:
    """The network of a config's section "model", of random weights; what is to be frozen is."""
    of_training = {"freeze_bn", "init", "freeze"}
    model = inception_resnet_v2(num_classes, **section.model_dump(exclude=of_training))
    if section.freeze is not None:
        finetune.freeze(model, section.freeze)
    return model


def new_state(cfg: Config, num_classes: int, device: torch.device) -> engine.TrainState:
    """The network with its first weights, its average and its optimizer, on the device."""
    torch.manual_seed(cfg.run.seed)
    model = network(cfg.model, num_classes)
    model = model.to(device, memory_format=torch.channels_last)
    return engine.TrainState(
        model,
        engine.running_average(model, cfg.ema.decay),
        optim.RMSpropTF(
            optim.parameter_groups(
                model, cfg.optim.weight_decay, finetune.lr_scales(cfg.optim.layer_decay)
            ),
            **cfg.optim.model_dump(exclude={"weight_decay", "clip_norm", "layer_decay"}),
        ),
        torch.amp.GradScaler(device.type, enabled=cfg.train.precision == "fp16"),
    )


def step_options(
    cfg: Config, accumulation: int, source: sources.Source, device: torch.device
) -> engine.StepOptions:
    """How steps are carried out."""
    class_weights = None
    if cfg.loss.class_weights == "balanced":
        class_weights = balanced_weights(source.class_counts()).to(device)
    return engine.StepOptions(
        loss=Loss(cfg.loss.label_smoothing, cfg.loss.aux_weight, class_weights),
        accumulation=accumulation,
        clip_norm=cfg.optim.clip_norm,
        precision=cfg.train.precision,
        seed=cfg.run.seed,
        freeze_bn=cfg.model.freeze_bn,
    )


def memory_sizes(cfg: Config, num_classes: int) -> memory.Sizes:
    """Of the config's network at its image size and precision; computes with shapes alone."""
    section = cfg.model.model_copy(update={"grad_checkpointing": False})
    with torch.device("meta"):
        model = network(section, num_classes)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    low_precision = engine.PRECISIONS[cfg.train.precision]
    activations, largest = memory.activation_bytes(
        model.to(low_precision or torch.float32), cfg.data.image_size, cfg.model.grad_checkpointing
    )
    cast_weights = trainable // 2 if low_precision else 0
    return memory.Sizes(weights, trainable, activations, largest, cast_weights)


def micro_batch(cfg: Config, num_classes: int, world: World, before: int | None = None) -> int:
    """Most images a device shall take at once, on all ranks alike: what `train.micro_batch` says.

    "auto": `largest_micro_batch` of the rank with the least memory.
    """
    if cfg.train.micro_batch != "auto":
        return cfg.train.micro_batch
    room = world.smallest(memory_room(world.device, world.size))
    # Again, as a rank on another host may not see yet what the run has taken before.
    return world.smallest(largest_micro_batch(cfg, num_classes, world.size, room, before))


def memory_room(device: torch.device, ranks: int) -> int:
    """Bytes that a step may take on this rank, which shares a CPU's memory with its neighbours."""
    neighbours = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return int(MEMORY_SHARE * memory.device_memory(device) / neighbours)


def largest_micro_batch(
    cfg: Config, num_classes: int, ranks: int, room: int, before: int | None = None
) -> int:
    """The largest equal part of a rank's share of the batch that should fit into `room` bytes.

    But what the run has taken `before` if that still is one: batch norm looks at so many images.
    Raises WorldError where there is none.
    """
    share = divide_batch(cfg.train.global_batch, cfg.train.global_batch, ranks).micro_batch
    sizes = memory_sizes(cfg, num_classes)
    least = 2 if cfg.data.mixup > 0 or cfg.data.cutmix > 0 else 1  # those mix pairs
    parts = [n for n in range(share, 0, -1) if share % n == 0 and n % least == 0]
    if before in parts:
        parts.insert(0, before)
    fitting = next((n for n in parts if sizes.training(n) <= room), None)
    if fitting is None:
        raise WorldError(
            f"train.micro_batch=auto: a step of {least} images needs about "
            f"{sizes.training(least) / 2**30:.1f} GiB, and there are {room / 2**30:.1f}: set "
            "model.grad_checkpointing=true or a smaller data.image_size"
        )
    return fitting
