"""What a YAML file may say: the schema, its defaults and units, and errors a person can act on.

`load` reads a YAML file and `section.key=value` overrides into a `Config` before anything else
happens; every mistake in them is reported at once. Sections speak of the experiment, with the few
keys in `MACHINE_KEYS` that only say how this machine carries it out.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Keys that may differ when a run is continued: they move the same run to another place.
MACHINE_KEYS = frozenset(
    {
        "run.name",
        "run.dir",
        "run.device",
        "data.train",
        "data.val",
        "data.workers",
        "train.micro_batch",
        "train.compile",
        "train.max_steps",
        "eval.batch",
        "eval.every_epochs",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "log.every_steps",
        "model.grad_checkpointing",
    }
)


class ConfigError(ValueError):
    """The config cannot be used; the message lists every fault, one a line."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


class Run(Section):
    name: str | None = Field(None, description="name of the run; null: the YAML file's name")
    dir: str | None = Field(None, description="run directory; null: runs/<run.name>")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )


class Model(Section):
    drop_rate: Decay = Field(0.2, description="dropout before the classifier")
    aux_logits: bool = Field(False, description="TF-slim's auxiliary head while training")
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="share of a new batch in batch norm's running statistics"
    )
    bn_scale: bool = Field(True, description="learn batch norm's gamma; false: 1, as TF-slim")
    freeze_bn: bool = Field(False, description="use and keep batch norm's running statistics")
    blocks: Annotated[list[Positive], Field(min_length=3, max_length=3)] = Field(
        [10, 20, 9],
        description="repeats of block35, block17, block8; other values: another network",
    )
    grad_checkpointing: bool = Field(False, description="recompute blocks in backward: less memory")


class Data(Section):
    train: str = Field(
        description="training images: folder/<class>/<image>, or synthetic:IMAGESxCLASSES"
    )
    val: str = Field(description="validation images, same classes; or synthetic:IMAGESxCLASSES")
    image_size: Annotated[int, Field(ge=75)] = Field(299, description="side of the input, px")
    workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="loader processes of each rank; null: its share of the cores, at most 8"
    )
    mean: Channels = Field([0.5, 0.5, 0.5], description="subtracted from pixels in [0, 1]")
    std: Channels = Field([0.5, 0.5, 0.5], description="divides pixels after the mean")
    crop_area: Pair = Field(
        [0.05, 1.0], description="training crop: range of its share of the image"
    )
    crop_aspect: Pair = Field([0.75, 1.33], description="training crop: range of width / height")
    hflip: Share = Field(0.5, description="probability of a horizontal flip")
    colour: bool = Field(True, description="brightness ±32/255 and saturation 0.5-1.5 in training")
    eval_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8975, description="evaluation: centre crop's share of the resized side"
    )
    eval_interpolation: Literal["bicubic", "bilinear"] = Field(
        "bicubic", description="evaluation: how the image is resized"
    )

    @model_validator(mode="after")
    def _ranges(self) -> Data:
        for key, upper in (("crop_area", 1.0), ("crop_aspect", float("inf"))):
            low, high = getattr(self, key)
            if not 0 < low <= high <= upper:
                raise ValueError(f"{key}={[low, high]} must rise, above 0 and up to {upper:g}")
        return self


class Train(Section):
    epochs: Annotated[float, Field(gt=0)] = Field(
        200, description="passes over the training images"
    )
    global_batch: Positive = Field(640, description="images of one update, over all ranks")
    micro_batch: Positive = Field(32, description="most images one device takes at once")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type")
    compile: bool = Field(False, description="torch.compile the network")
    max_steps: Positive | None = Field(
        None, description="stop after this many updates; null: never"
    )


class Optim(Section):
    lr: Annotated[float, Field(gt=0)] = Field(0.045, description="base learning rate")
    alpha: Decay = Field(0.9, description="decay of RMSProp's mean square")
    eps: Annotated[float, Field(gt=0)] = Field(1.0, description="inside the root, as TensorFlow")
    momentum: Decay = Field(0.9, description="momentum of the scaled gradient")
    weight_decay: NonNegative = Field(4e-5, description="L2 on convolutions and linear layers")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        2.0, description="largest global gradient norm; null: no clipping"
    )


class ScheduleSection(Section):
    kind: Literal["staircase", "cosine"] = Field("staircase", description="form of the decay")
    decay_rate: Annotated[float, Field(gt=0, le=1)] = Field(0.94, description="staircase: factor")
    decay_epochs: Annotated[float, Field(gt=0)] = Field(2.0, description="staircase: epochs a step")
    warmup_epochs: NonNegative = Field(0.0, description="linear warm-up from 0, epochs")
    min_lr: NonNegative = Field(0.0, description="cosine: final learning rate")


class Loss(Section):
    label_smoothing: Decay = Field(0.1, description="weight of the uniform distribution")
    aux_weight: NonNegative = Field(0.4, description="weight of the auxiliary head's loss")


class Ema(Section):
    decay: Decay = Field(
        0.9999, description="running average of weights and statistics; warms up as (1+n)/(10+n)"
    )


class Eval(Section):
    every_epochs: Annotated[float, Field(gt=0)] = Field(
        1.0, description="epochs between evaluations"
    )
    batch: Positive = Field(64, description="images a device evaluates at once")


class Checkpoint(Section):
    every_steps: Positive = Field(1000, description="updates between checkpoints")
    keep: Positive = Field(2, description="newest checkpoints kept")


class Log(Section):
    every_steps: Positive = Field(50, description="updates between lines")


class Config(Section):
    """One training run."""

    run: Run = Run()
    model: Model = Model()
    data: Data
    train: Train = Train()
    optim: Optim = Optim()
    schedule: ScheduleSection = ScheduleSection()
    loss: Loss = Loss()
    ema: Ema = Ema()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        faults = []
        if self.model.aux_logits and self.data.image_size < 299:
            faults.append("model.aux_logits=true needs data.image_size of at least 299")
        if self.schedule.warmup_epochs >= self.train.epochs:
            faults.append(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs:g} must be less than "
                f"train.epochs={self.train.epochs:g}"
            )
        if self.schedule.min_lr > self.optim.lr:
            faults.append("schedule.min_lr must not exceed optim.lr")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def directory(self) -> Path:
        """Where the run lives."""
        return Path(self.run.dir or f"runs/{self.run.name}")


# ---------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """Safe YAML (tags that build objects are refused) with unique keys and 3e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{key}: written twice (again on line {line}); keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # YAML 1.1 reads 3e-4 as text
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """YAML file + "section.key=value" overrides -> Config. Raises ConfigError with every fault."""
    path = Path(path)
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections such as data: and train:")
    for override in overrides:
        _apply(tree, override)
    return build(tree, default_name=path.stem)


def build(tree: dict[str, Any], default_name: str = "run") -> Config:
    """Nested dict -> Config. Raises ConfigError with every fault."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None
    if config.run.name is None:
        run = config.run.model_copy(update={"name": default_name})
        config = config.model_copy(update={"run": run})
    return config


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"{override}: an override is written section.key=value")
    entries = tree.setdefault(section, {})
    if not isinstance(entries, dict):
        raise ConfigError(f"{section}: must be a section of key: value lines")
    entries[name] = _parse(value, override)


def _explain(fault: Any) -> str:
    """One pydantic fault -> key, value, reason and, for an unknown name, the nearest valid one."""
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{key}: must be given (in the YAML, or as {key}=… on the command line)"
    if fault["type"] == "extra_forbidden":
        return f"{key}={fault['input']!r}: unknown key; {_nearest(key)}"
    if fault["type"] == "value_error":
        prefix = f"{key}: " if key else ""
        return prefix + str(fault["ctx"]["error"])
    return f"{key}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _nearest(key: str) -> str:
    keys = [name for name, _, _ in fields()]
    if "." not in key:
        sections = list(Config.model_fields)
        close = difflib.get_close_matches(key, sections, 1)
        return f"did you mean {close[0]}?" if close else f"sections are {', '.join(sections)}"
    close = difflib.get_close_matches(key, keys, 1, cutoff=0.0)
    own = [k for k in keys if k.split(".")[1] == key.split(".")[1]]
    return f"did you mean {(own or close)[0]}?"


# ---------------------------------------------------------------------------------- describing


def fields() -> Iterator[tuple[str, Any, str]]:
    """(key, default, description) of every key, in order; a required key's default is Ellipsis."""
    for section, info in Config.model_fields.items():
        for name, field in typing.cast(type[Section], info.annotation).model_fields.items():
            default = ... if field.is_required() else field.default
            yield f"{section}.{name}", default, field.description or ""


def describe() -> str:
    """The table of keys that `train.py --help` prints."""
    lines = ["keys (default) of the YAML file, also given as section.key=value:"]
    for key, default, description in fields():
        shown = "required" if default is ... else json.dumps(default)
        lines.append(f"  {key} ({shown})\n      {description}")
    return "\n".join(lines)


def differences(before: dict, after: dict) -> list[str]:
    """Keys of the experiment whose values differ, as "key: before -> after".

    A staircase does not depend on how long the run is, so it may be made longer or shorter.
    """
    free = set(MACHINE_KEYS)
    if before["schedule"]["kind"] == after["schedule"]["kind"] == "staircase":
        free.add("train.epochs")
    return [
        f"{section}.{key}: {before[section].get(key)!r} -> {value!r}"
        for section, entries in after.items()
        for key, value in entries.items()
        if f"{section}.{key}" not in free and before[section].get(key) != value
    ]


def json_schema() -> str:
    """JSON schema for editors, the content of configs/schema.json."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    Path("configs/schema.json").write_text(json_schema(), encoding="utf-8")
