"""Metadata of weights files, as this project writes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from data import strict_json
from irv2.network.forms.base import WeightsError

Positive = Annotated[int, Field(ge=1)]


class Origin(BaseModel):
    """Weights of a run: averaged or raw, and after which step."""

    model_config = ConfigDict(strict=True)

    weights: str | None = None  # "ema" or "raw"
    step: int | None = None


class Metadata(BaseModel):
    """Entries of a weights file's metadata; others are passed over."""

    model_config = ConfigDict(strict=True)

    blocks: Annotated[list[Positive], Field(min_length=3, max_length=3)] | None = None
    classes: list[str] | None = None  # in the order of the outputs
    class_order: Literal["natural", "alphabetical"] | None = None  # of folders in training
    data: dict[str, Any] = {}  # keys of a config's section "data"
    result: Origin = Origin()


_METADATA = TypeAdapter(Metadata)


def parsed(texts: dict[str, str], source: str) -> Metadata:
    """Parse a weights file's metadata, each value of which is JSON. Raises WeightsError."""
    values: dict[str, Any] = {}
    key = ""
    try:
        for key in Metadata.model_fields.keys() & texts.keys():
            values[key] = strict_json.parse(texts[key])
        key = ""
        return strict_json.checked(values, _METADATA)
    except ValueError as error:
        fault = f"{key}: {error}" if key else error
        raise WeightsError(f"{source}: its metadata is damaged ({fault})") from None
