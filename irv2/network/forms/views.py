"""How images are seen, as timm's configurations and the arguments of trainers say it."""

from __future__ import annotations

import argparse
import json
import math
from typing import Annotated, Any

import timm
from pydantic import BaseModel, Field, TypeAdapter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from data import strict_json
from irv2.network.forms.base import WeightsError, in_one_line

PUBLISHED = "inception_resnet_v2.tf_in1k"
INTERPOLATIONS = ("bicubic", "bilinear")

Described = tuple[dict[str, str], list[str]]  # metadata, remarks
Size = Annotated[int, Field(gt=0)]


class TimmView(BaseModel):
    """A view as timm resolves it."""

    input_size: tuple[int, Size, Size]  # channels, height, width
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: list[float]
    std: list[float]


class Arguments(BaseModel):
    """Arguments of timm's and torchvision's trainers that bear on evaluations."""

    dataset: str | None = None
    class_map: str | None = None
    input_size: list[int] | None = None
    img_size: int | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    val_crop_size: Size | None = None
    val_resize_size: Size | None = None


_VIEW, _ARGUMENTS = TypeAdapter(TimmView), TypeAdapter(Arguments)


def of_config(config: dict[str, Any], arguments: dict[str, Any], source: str) -> Described:
    """Take the view of a pretrained_cfg, and of arguments that go before it, as timm's validate.py.

    Raises WeightsError if timm cannot read it, or it is not square.
    """
    try:
        resolved = resolve_data_config(arguments, config, use_test_size=True)
        view = strict_json.checked(resolved, _VIEW)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        reason = f"{source}: what it says of its images is damaged ({in_one_line(error)})"
        raise WeightsError(reason) from None
    _, height, width = view.input_size
    if height != width:
        raise WeightsError(f"{source}: is for images of {width}x{height} px; here they are square")
    data = {"image_size": height, "eval_crop": view.crop_pct, "mean": view.mean, "std": view.std}
    remarks = []
    if view.interpolation in INTERPOLATIONS:
        data["eval_interpolation"] = view.interpolation
    else:
        remarks.append(f"{source}: asks for {view.interpolation} interpolation, here it is bicubic")
    if view.crop_mode != "center":
        remarks.append(f"{source}: asks for the crop {view.crop_mode}, here it is the centre")
    return {"data": json.dumps(data)}, remarks


def of_trainer(content: Any, source: str) -> Described:
    """Describe what the arguments in a checkpoint of timm's or torchvision's trainer say, if any.

    Both see images as their evaluations do. timm sorts class folders naturally (class2 before
    class10), torchvision as text. Raises WeightsError as `of_config`.
    """
    stored = content.get("args") if isinstance(content, dict) else None
    if not isinstance(stored, argparse.Namespace):
        return {}, []
    values, is_timms = vars(stored), "arch" in content
    if not is_timms and None in (values.get("val_crop_size"), values.get("val_resize_size")):
        return {}, []  # another trainer's, whose arguments may mean anything
    try:
        arguments = strict_json.checked(values, _ARGUMENTS)
    except ValueError as error:
        raise WeightsError(f"{source}: its trainer's arguments are damaged ({error})") from None
    if is_timms:
        config = timm.get_pretrained_cfg(PUBLISHED).to_dict()
        metadata, remarks = of_config(config, arguments.model_dump(), source)
        if arguments.dataset in (None, "", "folder") and not arguments.class_map:
            metadata["class_order"] = json.dumps("natural")
        elif arguments.class_map:
            remarks.append(
                f"{source}: the order of its classes is that of its trainer's file "
                f"{arguments.class_map}: give that as --class-index"
            )
        return metadata, remarks
    size, resized = arguments.val_crop_size, arguments.val_resize_size
    config = {
        "input_size": (3, size, size),
        "crop_pct": math.nextafter(size / resized, 0),  # whose quotient rounds down to `resized`
        "interpolation": arguments.interpolation,
        "mean": IMAGENET_DEFAULT_MEAN,  # of its presets, which have no option for it
        "std": IMAGENET_DEFAULT_STD,
    }
    metadata, remarks = of_config(config, {}, source)
    return metadata | {"class_order": json.dumps("alphabetical")}, remarks
