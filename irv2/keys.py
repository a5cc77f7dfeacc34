"""Kinds of keys of a run's YAML file: their types, and which may differ when a run is resumed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.fields import FieldInfo

from data.paths import expanded


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def machine(default: Any = ..., *, description: str) -> Any:
    """Describe a key that may differ when a run is continued.

    Such keys move the same run to another place; all others speak of the experiment.
    """
    return Field(default, description=description, json_schema_extra=_mark)


def _mark(_schema: dict[str, Any]) -> None:
    """Mark a machine key; the schema for editors stays as it is."""


def is_machine_key(field: FieldInfo) -> bool:
    """True for a key that `machine` describes."""
    return field.json_schema_extra is _mark


def _one_fault(words: str) -> WrapValidator:
    """Say what a value must be; else each type that could have been meant would be a fault."""

    def validated(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError(words) from None

    return WrapValidator(validated)


Text = Annotated[str, Field(min_length=1)]
Location = Annotated[Text, AfterValidator(expanded)]  # a path, or a URL, synthetic:…, timm:…
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
MicroBatch = Annotated[
    Positive | Literal["auto"], _one_fault("must be a whole number of at least 1, or auto")
]
Compile = Annotated[
    bool | Literal["regions", "graph"],
    AfterValidator(lambda value: "regions" if value is True else value),
    _one_fault("must be false, regions or graph"),
]
PositiveChannels = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
