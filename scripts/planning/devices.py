"""The table of devices, links and images that plans rest on: scripts/planning/devices.yaml."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.errors import UserError
from data.files import read_text
from irv2 import strict_yaml
from scripts.planning import steptime

TABLE = Path(__file__).with_name("devices.yaml")


class TableEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(TableEntry):
    """A number and where it comes from."""

    value: Annotated[float, Field(gt=0)]
    kind: Literal["measured", "published", "estimate"]
    source: Annotated[str, Field(min_length=1)]


class Duration(Figure):
    value: Annotated[float, Field(ge=0)]


class DeviceEntry(TableEntry):
    images_per_s: Figure
    overhead_ms: Duration
    update_ms: Duration
    price_per_hour: Figure | None = None  # null: not known
    inside: str
    between: str
    image_size: int = 299  # px, at which images_per_s is stated, for the full network
    precision: Literal["bf16", "fp32"] = "bf16"  # with which; bf16 stands for fp16, too
    forward_share: float = steptime.FORWARD_SHARE
    overlaps: bool = True  # gradients travel while backward computes, and take none of its time

    def plain(self, work: float) -> steptime.Device:
        """Speed with images that ask for `work` times the multiply-adds of its figure's."""
        images_per_s = self.images_per_s.value / work
        seconds = (figure.value / 1e3 for figure in (self.overhead_ms, self.update_ms))
        return steptime.Device(images_per_s, *seconds, self.overlaps, self.forward_share)


class LinkEntry(TableEntry):
    gigabytes_per_s: Figure
    latency_us: Duration

    def plain(self) -> steptime.Link:
        return steptime.Link(self.gigabytes_per_s.value * 1e9, self.latency_us.value * 1e-6)


class ImagesEntry(TableEntry):
    mean_bytes: Figure
    per_core_per_s: Figure


class DeviceTable(TableEntry):
    devices: dict[str, DeviceEntry]
    links: dict[str, LinkEntry]
    images: ImagesEntry

    @model_validator(mode="after")
    def _links_exist(self) -> DeviceTable:
        for name, device in self.devices.items():
            for link in {device.inside, device.between} - self.links.keys():
                raise ValueError(f"devices.{name}: {nearest('link', link, self.links)}")
        return self

    def choose(self, name: str, between: str | None) -> tuple[DeviceEntry, LinkEntry, LinkEntry]:
        """A device and its links inside a node and between nodes. Raises UserError for a name that
        the table lacks."""
        for what, asked, known in (("device", name, self.devices), ("link", between, self.links)):
            if asked is not None and asked not in known:
                raise UserError(nearest(what, asked, known))
        device = self.devices[name]
        return device, self.links[device.inside], self.links[between or device.between]


def nearest(what: str, name: str, known: Iterable[str]) -> str:
    """Words that lead from a name that is not known to the one that was meant."""
    if (what, name) == ("device", "cpu"):
        return (
            "device cpu has to be measured where it is: python scripts/benchmark.py scaling "
            "--json cpu.json, then --measured cpu.json"
        )
    close = difflib.get_close_matches(name.lower(), known, 1, 0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what} '{name}'; {guess}known: {', '.join(known)}"


def load(path: Path = TABLE) -> DeviceTable:
    """Read the table. Raises UserError with every fault in it."""
    try:
        return DeviceTable.model_validate(strict_yaml.load(path))
    except ValidationError as error:
        faults = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
        lines = (f"{path}: {place or 'table'}: {words}" for place, words in faults)
        raise UserError(*lines) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------- measured


def with_measured(table: DeviceTable, path: Path, image_size: int) -> DeviceTable:
    """The table with a device "cpu" and a link "gloo" from `scripts/benchmark.py scaling --json`.

    Of the image sizes measured, the one that is nearest to `image_size` (px) counts. Raises
    UserError if the file is none of that command's.
    """
    try:
        cases = json.loads(read_text(path))["cases"]
        case = min(cases, key=lambda case: abs(case["image_size"] - image_size))
        cpu, gloo = measured(case, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise UserError(
            f"{path}: holds no usable figures of scaling; make them: "
            f"python scripts/benchmark.py scaling --json {path}"
        ) from None
    new = {"devices": {**table.devices, "cpu": cpu}, "links": {**table.links, "gloo": gloo}}
    return table.model_copy(update=new)


def measured(case: dict[str, Any], source: str) -> tuple[DeviceEntry, LinkEntry]:
    """A process on the CPU, and the link between two, from the parts of a step measured apart.

    Gradients' travel takes the cores that backward wants: no overlap.
    """
    figure = functools.partial(dict, kind="measured", source=source)
    images_per_s, overhead_s = affine(case)
    size, message = case["gradient_bytes"], case["message_s"]  # a message: there and back
    carrying = case["reduce_s"] - steptime.buckets(size) * message
    device = DeviceEntry(
        images_per_s=figure(value=images_per_s),
        overhead_ms=figure(value=1e3 * overhead_s),
        update_ms=figure(value=1e3 * case["update_s"]),
        inside="gloo",
        between="gloo",
        image_size=case["image_size"],
        precision="fp32",
        forward_share=case["forward_s"] / (case["forward_s"] + case["backward_s"]),
        overlaps=False,
    )
    link = LinkEntry(
        gigabytes_per_s=figure(value=steptime.ring_bytes(2, size) / carrying / 1e9),
        latency_us=figure(value=1e6 * message / 2),
    )
    return device, link


def affine(case: dict[str, Any]) -> tuple[float, float]:
    """(images a second, overhead in seconds) of the line through a whole batch's and half a
    batch's forward and backward; no overhead where the line would have it below 0."""
    batch, whole = case["batch"], case["forward_s"] + case["backward_s"]
    each = (whole - case["half_batch_s"]) / (batch - batch // 2)
    overhead = whole - batch * each
    if each <= 0 or overhead < 0:
        return batch / whole, 0.0
    return 1 / each, overhead
