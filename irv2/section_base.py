"""Types of keys that the sections of a config are made of, and keys that are a machine's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
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


Text = Annotated[str, Field(min_length=1)]
Location = Annotated[Text, AfterValidator(expanded)]  # a path, or a URL, synthetic:…, timm:…
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
PositiveChannels = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
