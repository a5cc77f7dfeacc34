"""A run's config: its sections together, what must agree between them, and its JSON schema."""

from __future__ import annotations

import json
import typing
from pathlib import Path

from pydantic import model_validator
from pydantic.fields import FieldInfo

from irv2.data_section import Data
from irv2.keys import Section, is_machine_key
from irv2.sections import (
    CheckpointSection,
    Ema,
    Eval,
    Log,
    LossSection,
    Model,
    Optim,
    RunSection,
    ScheduleSection,
    Train,
)


class Config(Section):
    """One training run."""

    run: RunSection = RunSection()
    model: Model = Model()
    data: Data
    train: Train = Train()
    optim: Optim = Optim()
    schedule: ScheduleSection = ScheduleSection()
    loss: LossSection = LossSection()
    ema: Ema = Ema()
    eval: Eval = Eval()
    checkpoint: CheckpointSection = CheckpointSection()
    log: Log = Log()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        model, schedule = self.model, self.schedule
        optim, data = self.optim, self.data
        size = min(side for _, side in data.sizes)
        faults = (
            (
                model.aux_logits and size < 299,
                "model.aux_logits=true needs images of at least 299 px, not "
                f"data.{'image_size' if data.train_sizes is None else 'train_sizes'}={size}",
            ),
            (
                self.train.compile == "graph" and data.train_sizes is not None,
                "train.compile=graph records steps of one size: not with data.train_sizes",
            ),
            (
                model.freeze is not None and model.init is None,
                f"model.freeze={model.freeze} keeps the weights of model.init, which must be "
                "given, too",
            ),
            (
                model.freeze == "backbone" and model.aux_logits,
                "model.aux_logits=true has nothing to teach with model.freeze=backbone: leave out "
                "one of them",
            ),
            (
                optim.kind != "rmsprop_tf" and "lr" not in optim.model_fields_set,
                f"optim.lr must be given with optim.kind={optim.kind}: its default is rmsprop_tf's",
            ),
            (
                self.train.compile and model.grad_checkpointing,
                "train.compile and model.grad_checkpointing do not go together",
            ),
            (
                schedule.warmup_epochs >= self.train.epochs,
                f"schedule.warmup_epochs={schedule.warmup_epochs:g} must be less than "
                f"train.epochs={self.train.epochs:g}",
            ),
            (
                schedule.min_lr > optim.lr,
                f"schedule.min_lr={schedule.min_lr:g} exceeds optim.lr={optim.lr:g}",
            ),
        )
        if said := [words for is_there, words in faults if is_there]:
            raise ValueError("; ".join(said))
        return self

    @property
    def directory(self) -> Path:
        """Directory of the run."""
        return Path(self.run.dir or f"runs/{self.run.name}")


FIELDS: dict[str, FieldInfo] = {
    f"{section}.{name}": field
    for section, info in Config.model_fields.items()
    for name, field in typing.cast(type[Section], info.annotation).model_fields.items()
}
MACHINE_KEYS = frozenset(key for key, info in FIELDS.items() if is_machine_key(info))


def json_schema() -> str:
    """JSON schema for editors, the content of configs/schema.json."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    Path("configs/schema.json").write_text(json_schema(), encoding="utf-8")
