"""What a YAML file may say: the schema, its defaults and units, and errors a person can act on.

`load` reads a YAML file and `section.key=value` overrides into a `Config` before anything else
happens; every mistake in them is reported at once. Sections speak of the experiment, with the few
`machine` keys that only say how this machine carries it out.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from data.errors import UserError
from data.names import without_secrets
from data.paths import expanded
from data.urls import check_url
from irv2 import strict_yaml

MAX_IMAGE_SIZE = 2048  # px, seven times the network's own


class ConfigError(UserError):
    """The config cannot be used; the message lists every fault, one a line."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def machine(default: Any = ..., *, description: str) -> Any:
    """Describe a key that may differ when a run is continued.

    Such keys move the same run to another place; all others speak of the experiment.
    """
    return Field(default, description=description, json_schema_extra=_mark)


def _mark(_schema: dict[str, Any]) -> None:
    """Mark a machine key; the schema for editors stays as it is."""


Text = Annotated[str, Field(min_length=1)]
Location = Annotated[Text, AfterValidator(expanded)]  # a path, or a URL, synthetic:…, timm:…
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
PositiveChannels = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class Run(Section):
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


class Data(Section):
    train: Location = machine(
        description="training images: folder/<class>/<image>, a folder of shards or its https:// "
        "or s3:// URL, or synthetic:IMAGESxCLASSES"
    )
    val: Location = machine(description="validation images, same classes; as train")
    image_size: Annotated[int, Field(ge=75, le=MAX_IMAGE_SIZE)] = Field(
        299, description="side of the input, px"
    )
    workers: Annotated[int, Field(ge=0)] | None = machine(
        None, description="loader processes of each rank; null: its share of the cores, at most 8"
    )
    cache_dir: Location | None = machine(
        None,
        description="folder of a local disk that keeps images of https:// and s3://, for all runs "
        "of a machine; null: none is kept",
    )
    cache_gb: Annotated[float, Field(gt=0)] = machine(
        160.0, description="the most that cache_dir may take, 10^9 bytes; ImageNet has 155"
    )
    mean: Channels = Field([0.5, 0.5, 0.5], description="subtracted from pixels in [0, 1]")
    std: PositiveChannels = Field([0.5, 0.5, 0.5], description="divides pixels after the mean")
    crop_area: Pair = Field(
        [0.05, 1.0], description="training crop: range of its share of the image"
    )
    crop_aspect: Pair = Field([0.75, 1.33], description="training crop: range of width / height")
    hflip: Share = Field(0.5, description="probability of a horizontal flip")
    colour: bool = Field(True, description="brightness ±32/255 and saturation 0.5-1.5 in training")
    rand_augment: Annotated[int, Field(ge=0, le=30)] | None = Field(
        None, description="magnitude of RandAugment, two operations; null: none"
    )
    random_erasing: Share = Field(0.0, description="probability that a part is made grey")
    mixup: NonNegative = Field(0.0, description="mixup of pairs: alpha of its shares; 0: none")
    cutmix: NonNegative = Field(0.0, description="cutmix of pairs: alpha of its shares; 0: none")
    shuffle_window: Positive | None = Field(
        None,
        description="shards: shuffle blocks of this many images that lie one after another, for "
        "slow disks; null: shuffle all images",
    )
    eval_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8975, description="evaluation: centre crop's share of the resized side"
    )
    eval_interpolation: Literal["bicubic", "bilinear"] = Field(
        "bicubic", description="evaluation: how the image is resized"
    )
    allow_resized: bool = machine(
        False, description="evaluate shards whose images were resized when they were made"
    )
    max_bad_fraction: Share = machine(
        0.001,
        description="end the run when more than this share of the images seen, or of one epoch's "
        "if that is more, could not be used and were replaced",
    )

    @property
    def mixes_pairs(self) -> bool:
        """True if images are mixed in pairs, so that a micro-batch must hold whole pairs."""
        return self.mixup > 0 or self.cutmix > 0

    @field_validator("train", "val")
    @classmethod
    def _holds_no_secret(cls, value: str) -> str:
        if "://" in value:
            check_url(value)
        return value

    @field_validator("crop_area", "crop_aspect")
    @classmethod
    def _rises(cls, value: list[float], info: ValidationInfo) -> list[float]:
        upper = 1.0 if info.field_name == "crop_area" else float("inf")
        if not 0 < value[0] <= value[1] <= upper:
            raise ValueError(f"must rise, above 0 and up to {upper:g}")
        return value


class Train(Section):
    epochs: Annotated[float, Field(gt=0)] = Field(
        200, description="passes over the training images"
    )
    global_batch: Positive = Field(640, description="images of one update, over all ranks")
    micro_batch: Positive | Literal["auto"] = machine(
        32, description="most images one device takes at once; auto: what its memory holds"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type")
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="type in which gradients travel between ranks; bf16: half the traffic"
    )
    accelerate: bool = Field(
        True, description="merged convolutions, fused on CPUs; false: the network as timm has it"
    )
    compile: bool | Literal["regions", "graph"] = machine(
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

    @field_validator("compile", mode="wrap")
    @classmethod
    def _how(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Literal[False] | str:
        try:
            return "regions" if value is True else check(value)
        except ValidationError:  # one fault for each type that could have been meant
            raise ValueError("must be false, regions or graph") from None

    @field_validator("micro_batch", mode="wrap")
    @classmethod
    def _whole_or_auto(cls, value: Any, check: ValidatorFunctionWrapHandler) -> int | str:
        try:
            return check(value)
        except ValidationError:  # which names every type that could have been meant
            raise ValueError("must be a whole number of at least 1, or auto") from None


class Optim(Section):
    lr: Annotated[float, Field(gt=0)] = Field(0.045, description="base learning rate")
    alpha: Decay = Field(0.9, description="decay of RMSProp's mean square")
    eps: Annotated[float, Field(gt=0)] = Field(1.0, description="inside the root, as TensorFlow")
    momentum: Decay = Field(0.9, description="momentum of the scaled gradient")
    weight_decay: NonNegative = Field(4e-5, description="L2 on convolutions and linear layers")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        2.0, description="largest global gradient norm; null: no clipping"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="learning rate of each of the network's nine stages as a share of the next "
        "one's, the classifier's being lr; 1: one rate",
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


class Checkpoint(Section):
    every_steps: Positive = machine(1000, description="updates between checkpoints")
    keep: Positive = machine(2, description="newest checkpoints kept")


class Log(Section):
    every_steps: Positive = machine(50, description="updates between lines")
    ledger: bool = machine(False, description="write the images of every step, by rank, to ledger/")


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
            faults.append(
                "model.aux_logits=true needs images of at least 299 px, "
                f"not data.image_size={self.data.image_size}"
            )
        if self.model.freeze is not None and self.model.init is None:
            faults.append(
                f"model.freeze={self.model.freeze} keeps the weights of model.init, which must be "
                "given, too"
            )
        if self.model.freeze == "backbone" and self.model.aux_logits:
            faults.append(
                "model.aux_logits=true has nothing to teach with model.freeze=backbone: leave out "
                "one of them"
            )
        if self.train.compile and self.model.grad_checkpointing:
            faults.append("train.compile and model.grad_checkpointing do not go together")
        if self.schedule.warmup_epochs >= self.train.epochs:
            faults.append(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs:g} must be less than "
                f"train.epochs={self.train.epochs:g}"
            )
        if self.schedule.min_lr > self.optim.lr:
            faults.append(
                f"schedule.min_lr={self.schedule.min_lr:g} exceeds optim.lr={self.optim.lr:g}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def directory(self) -> Path:
        """Directory of the run."""
        return Path(self.run.dir or f"runs/{self.run.name}")


# ---------------------------------------------------------------------------------- reading


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """YAML file + "section.key=value" overrides -> Config. Raises ConfigError with every fault."""
    path = Path(path)
    try:
        tree = strict_yaml.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections such as data: and train:")
    # A section whose lines are all commented out is null in YAML: as good as left out.
    tree = {key: {} if value is None else value for key, value in tree.items()}
    for override in overrides:
        _apply(tree, override)
    return build(tree, default_name=path.stem)


def build(tree: dict[str, Any], default_name: str = "run") -> Config:
    """Nested dict -> Config. Raises ConfigError with every fault."""
    # Empty sections stand in for absent ones, so that required keys are asked for by name.
    tree = {section: {} for section in Config.model_fields} | tree
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*map(_explain, error.errors())) from None
    if config.run.name is None:
        run = config.run.model_copy(update={"name": default_name})
        config = config.model_copy(update={"run": run})
    return config


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and section and name) or "://" in key:
        told = without_secrets(override)
        raise ConfigError(f"{told}: an override is written section.key=value")
    entries = tree.setdefault(section, {})
    if not isinstance(entries, dict):
        raise ConfigError(f"{section}: must be a section of key: value lines")
    try:
        entries[name] = strict_yaml.parse(value)
    except ValueError as error:
        raise ConfigError(f"{without_secrets(override)}: {error}") from None


def _explain(fault: Any) -> str:
    """One pydantic fault -> key, value, reason and, for an unknown name, the nearest valid one."""
    key = ".".join(str(part) for part in fault["loc"])
    value = without_secrets(repr(fault["input"]))
    told = f"{key}={value if len(value) <= 100 else value[:99] + '…'}"
    if fault["type"] == "missing":
        return f"{key}: must be given (in the YAML, or as {key}=… on the command line)"
    if fault["type"] == "extra_forbidden":
        return f"{told}: unknown key; {_nearest(*fault['loc'])}"
    if fault["type"] == "value_error":
        return f"{told}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
    return f"{told}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _nearest(section: str, name: str | None = None) -> str:
    """Words that lead from an unknown section, or an unknown key of a known one, to what was meant.

    The reader may have written a key outside of its section, or in another one.
    """
    keys = [known for known, _, _ in fields()]
    close = [key for key in keys if key.partition(".")[2] == (section if name is None else name)]
    if name is not None:
        close = close or difflib.get_close_matches(f"{section}.{name}".lower(), keys, 1, 0.75)
        own = [key.partition(".")[2] for key in keys if key.startswith(f"{section}.")]
        known = f"keys of {section}: {', '.join(own)}"
    elif section in keys or close:
        home, _, inner = (close or [section])[0].partition(".")
        return f"write it as {home}: {{{inner}: …}}"
    else:
        close = difflib.get_close_matches(section.lower(), Config.model_fields, 1)
        known = f"sections: {', '.join(Config.model_fields)}"
    return f"did you mean {close[0]}? {known}" if close else known


# ---------------------------------------------------------------------------------- describing


def _infos() -> Iterator[tuple[str, FieldInfo]]:
    """(key, what is said of it) of every key, in order."""
    for section, info in Config.model_fields.items():
        for name, field in typing.cast(type[Section], info.annotation).model_fields.items():
            yield f"{section}.{name}", field


MACHINE_KEYS = frozenset(key for key, info in _infos() if info.json_schema_extra is _mark)


def fields() -> Iterator[tuple[str, Any, str]]:
    """(key, default, description) of every key, in order; a required key's default is Ellipsis."""
    for key, info in _infos():
        yield key, ... if info.is_required() else info.default, info.description or ""


def describe() -> str:
    """The table of keys that `train.py --help` prints."""
    lines = ["keys (default) of the YAML file, also given as section.key=value:"]
    for key, default, description in fields():
        shown = "required" if default is ... else json.dumps(default)
        lines.append(f"  {key} ({shown})\n      {description}")
    return "\n".join(lines)


def json_schema() -> str:
    """JSON schema for editors, the content of configs/schema.json."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    Path("configs/schema.json").write_text(json_schema(), encoding="utf-8")
