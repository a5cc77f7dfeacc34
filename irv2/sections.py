"""Sections of a run's YAML file: every key with its type, unit, default and description.

Sections speak of the experiment, with the few `machine` keys that only say how this machine carries
it out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from irv2.keys import (
    Compile,
    Decay,
    Location,
    MicroBatch,
    NonNegative,
    Positive,
    Section,
    Text,
    machine,
)


class RunSection(Section):
    name: Text | None = machine(
        None, description="name of the run, that of one folder; null: the YAML file's name"
    )
    dir: Location | None = machine(None, description="run directory; null: runs/<run.name>")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = machine(
        "auto", description="auto: a GPU if there is one"
    )
    deterministic: bool = machine(
        False,
        description="on a GPU, too, repeat and continue a run to the bit: kernels are chosen by "
        "rule, not by timing them, and add up in one order",
    )
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = machine(
        600.0, description="seconds after which a rank or loader that does not answer ends the run"
    )

    @field_validator("name")
    @classmethod
    def _is_one_component(cls, value: str | None) -> str | None:
        if value in (".", "..") or not {"/", "\0"}.isdisjoint(value or ""):
            raise ValueError("must be the name of a folder, without /; run.dir takes a path")
        return value


class Model(Section):
    drop_rate: Decay = Field(0.2, description="dropout before the classifier")
    aux_logits: bool = Field(False, description="TF-slim's auxiliary head while training")
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="share of a new batch in batch norm's running statistics"
    )
    bn_scale: bool = Field(True, description="learn batch norm's gamma; false: 1, as TF-slim")
    freeze_bn: bool = Field(False, description="use and keep batch norm's running statistics")
    init: Location | None = Field(
        None,
        description="weights that a new run begins with: a file or folder in any form that "
        "docs/evaluation.md lists, timm:NAME or hf-hub:ORG/NAME; a classifier for other classes is "
        "made new",
    )
    freeze: Literal["stem", "backbone"] | None = Field(
        None,
        description="what keeps init's weights and statistics: stem, all before mixed_5b; "
        "backbone, all but the classifier",
    )
    blocks: Annotated[list[Positive], Field(min_length=3, max_length=3)] = Field(
        [10, 20, 9],
        description="repeats of block35, block17, block8; other values: another network",
    )
    width: Annotated[float, Field(gt=0, multiple_of=1 / 16)] = Field(
        1.0, description="multiplies every layer's channels; other values: another network"
    )
    grad_checkpointing: bool = machine(
        False, description="recompute blocks in backward: less memory"
    )


class Train(Section):
    epochs: Annotated[float, Field(gt=0)] = Field(
        200, description="passes over the training images"
    )
    global_batch: Positive = Field(640, description="images of one update, over all ranks")
    micro_batch: MicroBatch = machine(
        32, description="most images one device takes at once; auto: what its memory holds"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type")
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="type in which gradients travel between ranks; bf16: half the traffic"
    )
    accelerate: bool = Field(
        True, description="merged convolutions, fused on CPUs; false: the network as timm has it"
    )
    compile: Compile = machine(
        False,
        description="for GPUs. regions (or true): torch.compile the network, block by block; "
        "graph: also record a step as CUDA graphs, which a GPU runs without waiting for its host",
    )
    max_steps: Positive | None = machine(
        None, description="stop after this many updates; null: never"
    )
    max_bad_steps: Annotated[int, Field(ge=0)] = machine(
        10,
        description="end the run after more than this many steps in a row that were left out "
        "because the loss or the gradient was not finite",
    )


# Of each optimizer: its hyper-parameters beside lr and weight_decay, with their defaults.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "rmsprop_tf": {"alpha": 0.9, "eps": 1.0, "momentum": 0.9},
    "sgd": {"momentum": 0.9, "nesterov": False},
    "adamw": {"betas": [0.9, 0.999], "eps": 1e-8},
    "lamb": {"betas": [0.9, 0.999], "eps": 1e-6},
}
OF_ANY_OPTIMIZER = ("clip_norm", "layer_decay")


class Optim(Section):
    kind: Literal["rmsprop_tf", "sgd", "adamw", "lamb"] = Field(
        "rmsprop_tf", description="optimizer: the paper's, torch's SGD and AdamW, timm's Lamb"
    )
    lr: Annotated[float, Field(gt=0)] = Field(
        0.045, description="base learning rate; must be given with another kind than rmsprop_tf"
    )
    alpha: Decay | None = Field(0.9, description="rmsprop_tf: decay of the mean square")
    eps: Annotated[float, Field(gt=0)] | None = Field(
        1.0,
        description="rmsprop_tf: inside the root, as TensorFlow; adamw (1e-8), lamb (1e-6): beside "
        "it",
    )
    momentum: Decay | None = Field(
        0.9, description="rmsprop_tf: momentum of the scaled gradient; sgd (0.9): of the gradient"
    )
    nesterov: bool | None = Field(None, description="sgd (false): Nesterov's momentum")
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] | None = Field(
        None, description="adamw, lamb ([0.9, 0.999]): decay of the gradient's mean and mean square"
    )
    weight_decay: NonNegative = Field(
        4e-5,
        description="L2 on convolutions and linear layers; adamw, lamb: decay of the weights "
        "themselves",
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        2.0, description="largest global gradient norm; null: no clipping"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="learning rate of each of the network's nine stages as a share of the next "
        "one's, the classifier's being lr; 1: one rate",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_the_kinds_defaults(cls, tree: Any) -> Any:
        kind = tree.get("kind", "rmsprop_tf") if isinstance(tree, dict) else None
        if not isinstance(kind, str) or kind not in OPTIMIZERS:
            return tree
        keys = {key for defaults in OPTIMIZERS.values() for key in defaults}
        given = {key: value for key, value in tree.items() if key not in keys or value is not None}
        return dict.fromkeys(keys) | OPTIMIZERS[kind] | given

    @field_validator("alpha", "eps", "momentum", "nesterov", "betas")
    @classmethod
    def _is_the_kinds(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("kind")
        if value is not None and kind is not None and info.field_name not in OPTIMIZERS[kind]:
            own = ", ".join(OPTIMIZERS[kind])
            raise ValueError(f"not a key of optim.kind={kind}, which has lr, weight_decay, {own}")
        return value

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Return what the optimizer takes beside lr and weight_decay."""
        return {key: getattr(self, key) for key in OPTIMIZERS[self.kind]}


class ScheduleSection(Section):
    kind: Literal["staircase", "cosine"] = Field("staircase", description="form of the decay")
    decay_rate: Annotated[float, Field(gt=0, le=1)] = Field(0.94, description="staircase: factor")
    decay_epochs: Annotated[float, Field(gt=0)] = Field(2.0, description="staircase: epochs a step")
    warmup_epochs: NonNegative = Field(0.0, description="linear warm-up from 0, epochs")
    min_lr: NonNegative = Field(0.0, description="cosine: final learning rate")


class LossSection(Section):
    label_smoothing: Decay = Field(0.1, description="weight of the uniform distribution")
    aux_weight: NonNegative = Field(0.4, description="weight of the auxiliary head's loss")
    class_weights: Literal["balanced"] | None = Field(
        None,
        description="balanced: an image's loss times N / (C n), of N images and C classes, n its "
        "class's images; null: all alike",
    )


class Ema(Section):
    decay: Decay = Field(
        0.9999, description="running average of weights and statistics; warms up as (1+n)/(10+n)"
    )


class Eval(Section):
    every_epochs: Annotated[float, Field(gt=0)] = machine(
        1.0, description="epochs between evaluations"
    )
    batch: Positive = machine(64, description="images a device evaluates at once")


class CheckpointSection(Section):
    every_steps: Positive = machine(1000, description="updates between checkpoints")
    keep: Positive = machine(2, description="newest checkpoints kept")


class Log(Section):
    every_steps: Positive = machine(50, description="updates between lines")
    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = machine(
        ["tensorboard"],
        description="trackers that show the log, too, beside log.jsonl; on this machine unless "
        "their own environment variables, such as WANDB_API_KEY, lead elsewhere",
    )
    utilisation: bool = machine(
        True,
        description="log the share of the device's matrix rate that training uses (MFU), for which "
        "a large matrix product is timed at the start",
    )
    profile: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = machine(
        None, description="[first, last] step of which a trace is written to profile/; null: none"
    )
    ledger: bool = machine(False, description="write the images of every step, by rank, to ledger/")

    @field_validator("profile")
    @classmethod
    def _ends_after_it_begins(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("must be the first step and the last")
        return value
