"""From what a config says of a network and its training to the things that train.

What train.py and the programs that look at a run beforehand (scripts/doctor.py) or time it
(scripts/benchmark.py) have in common; feed.py is its counterpart for images.
"""

from __future__ import annotations

import torch

from data import sources
from irv2 import engine, finetune, optim
from irv2.config import Config, Model
from irv2.loss import Loss, balanced_weights
from irv2.model import InceptionResnetV2, inception_resnet_v2


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
