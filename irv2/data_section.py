"""Section "data" of a run's YAML file: which images, in which order, and how they are seen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from data.urls import check_url
from irv2.keys import (
    Channels,
    Location,
    NonNegative,
    Pair,
    Positive,
    PositiveChannels,
    Section,
    Share,
    machine,
)

MAX_IMAGE_SIZE = 2048  # px, seven times the network's own


class Data(Section):
    train: Location = machine(
        description="training images: folder/<class>/<image>, a folder of shards or its https:// "
        "or s3:// URL, or synthetic:IMAGESxCLASSES"
    )
    val: Location = machine(description="validation images, same classes; as train")
    classes: Location | None = machine(
        None,
        description="file of the class folders to take, one a line, such as "
        "configs/classes/imagenet100.txt; null: all",
    )
    image_size: Annotated[int, Field(ge=75, le=MAX_IMAGE_SIZE)] = Field(
        299, description="side of the input, px"
    )
    train_sizes: Annotated[list[Pair], Field(min_length=1)] | None = Field(
        None,
        description="progressive: [[0, 224], [0.6, 299]] trains on smaller images until 0.6 of "
        "train.epochs; null: image_size throughout",
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

    @property
    def sizes(self) -> list[tuple[float, int]]:
        """Sides of training images, px, each after the share of the epochs from which it holds."""
        if self.train_sizes is None:
            return [(0.0, self.image_size)]
        return [(share, int(size)) for share, size in self.train_sizes]

    @property
    def sizes_in_words(self) -> str:
        """Describe them: "224 px, 299 px after 60 %"."""
        (_, first), *later = self.sizes
        return ", ".join(
            [f"{first} px", *(f"{size} px after {100 * share:g} %" for share, size in later)]
        )

    @property
    def largest_size(self) -> int:
        """Side of the largest training images, px."""
        return max(size for _, size in self.sizes)

    @field_validator("train_sizes")
    @classmethod
    def _grow(cls, value: list[list[float]] | None) -> list[list[float]] | None:
        if value is None:
            return None
        shares = [share for share, _ in value]
        if shares[0] != 0 or shares != sorted(set(shares)) or shares[-1] >= 1:
            raise ValueError("shares must rise from 0 and stay below 1")
        if any(size not in range(75, MAX_IMAGE_SIZE + 1) for _, size in value):
            raise ValueError(f"sizes must be whole, 75 to {MAX_IMAGE_SIZE} px")
        return value

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
