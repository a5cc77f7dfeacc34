"""The table of devices, links and images that plans rest on: scripts/planning/devices.yaml."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from irv2 import strict_yaml
from scripts.planning import steptime

TABLE = Path(__file__).with_name("devices.yaml")
Above = Annotated[float, Field(gt=0)]
NotBelow = Annotated[float, Field(ge=0)]


class PlanError(ValueError):
    """A plan cannot be made; the message says what to change."""


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(Entry):
    """A number and where it comes from."""

    value: Above
    kind: Literal["measured", "published", "estimate"]
    source: Annotated[str, Field(min_length=1)]


class Speed(Figure):
    value: NotBelow


class Device(Entry):
    images_per_s: Figure
    overhead_ms: Speed
    update_ms: Speed
    price_per_hour: Figure | None = None  # null: not known
    inside: str
    between: str
    image_size: int = 299  # px, at which images_per_s is stated, for the full network
    precision: Literal["bf16", "fp32"] = "bf16"  # with which; bf16 stands for fp16, too
    forward_share: float = steptime.FORWARD_SHARE
    overlaps: bool = True  # gradients travel while backward computes, and take none of its time

    def plain(self, work: float) -> steptime.Device:
        """Its speed with images that ask for `work` times the multiply-adds of its figure's."""
        return steptime.Device(
            self.images_per_s.value / work,
            self.overhead_ms.value / 1e3,
            self.update_ms.value / 1e3,
            self.overlaps,
            self.forward_share,
        )


class Link(Entry):
    gigabytes_per_s: Figure
    latency_us: Speed

    def plain(self) -> steptime.Link:
        return steptime.Link(self.gigabytes_per_s.value * 1e9, self.latency_us.value * 1e-6)


class Images(Entry):
    mean_bytes: Figure
    per_core_per_s: Figure


class Table(Entry):
    devices: dict[str, Device]
    links: dict[str, Link]
    images: Images

    @model_validator(mode="after")
    def _links_exist(self) -> Table:
        for name, device in self.devices.items():
            for link in (device.inside, device.between):
                if link not in self.links:
                    raise ValueError(f"devices.{name}: {nearest('link', link, self.links)}")
        return self


def nearest(what: str, name: str, known: Iterable[str]) -> str:
    """Words that lead from a name that is not known to the one that was meant."""
    close = difflib.get_close_matches(name.lower(), known, 1, 0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what} '{name}'; {guess}known: {', '.join(known)}"


def load(path: Path = TABLE) -> Table:
    """Read the table. Raises PlanError with every fault in it."""
    try:
        return Table.model_validate(strict_yaml.parse(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc'])) or 'table'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise PlanError("\n".join(f"{path}: {fault}" for fault in faults)) from None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------- measured


def with_measured(table: Table, path: Path, image_size: int) -> Table:
    """The table with a device "cpu" and a link "gloo" from `scripts/benchmark.py scaling --json`.

    Of the image sizes measured, the one that is nearest to `image_size` (px) counts. Raises
    PlanError if the file is none of that command's.
    """
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        case = min(cases, key=lambda found: abs(found["image_size"] - image_size))
        cpu, link = measured_device(case, str(path)), measured_link(case, str(path))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise PlanError(
            f"{path}: holds no usable figures of scaling; make them: "
            f"python scripts/benchmark.py scaling --json {path}"
        ) from None
    devices, links = {**table.devices, "cpu": cpu}, {**table.links, "gloo": link}
    return table.model_copy(update={"devices": devices, "links": links})


def measured_device(case: dict[str, Any], source: str) -> Device:
    """A process on the CPU. Gradients' travel takes the cores that backward wants: no overlap."""

    def speed(value: float) -> Speed:
        return Speed(value=value, kind="measured", source=source)

    images_per_s, overhead_s = affine(case)
    return Device(
        images_per_s=Figure(value=images_per_s, kind="measured", source=source),
        overhead_ms=speed(1e3 * overhead_s),
        update_ms=speed(1e3 * case["update_s"]),
        inside="gloo",
        between="gloo",
        image_size=case["image_size"],
        precision="fp32",
        forward_share=case["forward_s"] / (case["forward_s"] + case["backward_s"]),
        overlaps=False,
    )


def measured_link(case: dict[str, Any], source: str) -> Link:
    """The link between two processes, from the all-reduces that a case measured alone."""
    size, message = case["gradient_bytes"], case["message_s"]
    carrying = case["reduce_s"] - steptime.buckets(size) * message
    latency = message / 2  # there and back
    return Link(
        gigabytes_per_s=Figure(
            value=steptime.ring_bytes(2, size) / carrying / 1e9, kind="measured", source=source
        ),
        latency_us=Speed(value=1e6 * latency, kind="measured", source=source),
    )


def affine(case: dict[str, Any]) -> tuple[float, float]:
    """(images a second, overhead in seconds) of the line through a whole batch's and half a
    batch's forward and backward; no overhead where the line would have it below 0."""
    batch, whole = case["batch"], case["forward_s"] + case["backward_s"]
    each = (whole - case["half_batch_s"]) / (batch - batch // 2)
    overhead = whole - batch * each
    if each <= 0 or overhead < 0:
        return batch / whole, 0.0
    return 1 / each, overhead
