"""How images are seen, as timm's configurations and the arguments of trainers say it."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from irv2.network.forms.base import WeightsError

PUBLISHED = "inception_resnet_v2.tf_in1k"
INTERPOLATIONS = ("bicubic", "bilinear")

Told = tuple[dict[str, str], list[str]]  # metadata, remarks


def of_config(config: dict[str, Any], arguments: dict[str, Any], source: str) -> Told:
    """Take the view of a pretrained_cfg, and of arguments that go before it, as timm's validate.py.

    Raises WeightsError if timm cannot read it, or it is not square.
    """
    try:
        found = resolve_data_config(arguments, config, use_test_size=True)
        _, height, width = found["input_size"]
        data = {
            "image_size": height,
            "eval_crop": found["crop_pct"],
            "eval_interpolation": found["interpolation"],
            "mean": [float(value) for value in found["mean"]],
            "std": [float(value) for value in found["std"]],
        }
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
        raise WeightsError(f"{source}: what it says of its images is damaged") from None
    if height != width:
        raise WeightsError(f"{source}: is for images of {width}x{height} px; here they are square")
    remarks = []
    if data["eval_interpolation"] not in INTERPOLATIONS:
        asked = data.pop("eval_interpolation")
        remarks.append(f"{source}: asks for {asked} interpolation, which is not here: bicubic")
    if found["crop_mode"] != "center":
        remarks.append(f"{source}: asks for the crop {found['crop_mode']}, not here: the centre")
    return {"data": json.dumps(data)}, remarks


def of_trainer(content: Any, source: str) -> Told:
    """What the arguments in a checkpoint of timm's or torchvision's trainer say, if any are there.

    Both see images as their evaluations do. timm sorts class folders naturally (class2 before
    class10), torchvision as text. Raises WeightsError as `of_config`.
    """
    arguments = content.get("args") if isinstance(content, dict) else None
    if not isinstance(arguments, argparse.Namespace):
        return {}, []
    arguments = vars(arguments)
    if "arch" in content:
        config = timm.get_pretrained_cfg(PUBLISHED).to_dict()
        metadata, remarks = of_config(config, arguments, source)
        is_folder = arguments.get("dataset") in (None, "", "folder")
        if is_folder and not arguments.get("class_map"):
            metadata["class_order"] = json.dumps("natural")
        return metadata, remarks
    if {"val_crop_size", "val_resize_size", "interpolation"} <= arguments.keys():
        config = {
            "input_size": (3, arguments["val_crop_size"], arguments["val_crop_size"]),
            "crop_pct": _crop(arguments["val_crop_size"], arguments["val_resize_size"]),
            "interpolation": arguments["interpolation"],
            "mean": IMAGENET_DEFAULT_MEAN,  # of its presets, which have no option for it
            "std": IMAGENET_DEFAULT_STD,
        }
        metadata, remarks = of_config(config, {}, source)
        return metadata | {"class_order": json.dumps("alphabetical")}, remarks
    return {}, []


def _crop(size: int, resized: int) -> float:
    """The share whose quotient, size / share, rounds down to `resized`."""
    return math.nextafter(size / resized, 0)
