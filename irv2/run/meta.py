"""The schema of a checkpoint's meta.json: everything that is not a tensor."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from data import strict_json
from data.strict_json import Count, Number

Positive = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
Config = dict[str, dict[str, Any]]  # section -> key -> value


class _Model(TypedDict):
    blocks: Annotated[list[Positive], Field(min_length=3, max_length=3)]


class _Train(TypedDict):
    global_batch: Positive


class _Schedule(TypedDict):
    kind: str


class _Needed(TypedDict):
    """Keys of the config that whoever reads a checkpoint asks for; others may be older or newer."""

    model: _Model
    data: dict[str, Any]
    train: _Train
    schedule: _Schedule


_NEEDED = TypeAdapter(_Needed)


def _whole(config: Config) -> Config:
    strict_json.checked(config, _NEEDED)
    return config


class Meta(TypedDict):
    """Content of meta.json."""

    step: Count
    images_seen: Count
    bad_images: Count
    bad_steps: Count
    bad_steps_in_a_row: Count
    scaler: dict[str, Count | Number]
    config: Annotated[Config, AfterValidator(_whole)]
    classes: Annotated[list[str], Field(min_length=1)]
    images_per_epoch: Positive
    stored: NotRequired[dict[str, Count]]
    software: dict[str, str]
    parts: Annotated[list[Annotated[str, Field(pattern=r"\A[a-z_]+\z")]], Field(min_length=1)]


_META = TypeAdapter(Meta)


def parse_meta(content: bytes, step: int | None) -> Meta:
    """Read meta.json of a checkpoint whose folder's name states `step`, None where it has another.

    Raises ValueError, in one line, for anything that train.py does not write.
    """
    meta = strict_json.checked(strict_json.parse(content), _META)
    if step not in (None, meta["step"]):
        raise ValueError(f"step: {meta['step']}, in a folder of step {step}")
    seen = meta["step"] * meta["config"]["train"]["global_batch"]
    if meta["images_seen"] != seen:
        raise ValueError(f"images_seen: {meta['images_seen']}, where the steps make {seen}")
    return meta
