"""The result of reading weights in any form, and the error of those that cannot be read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from data.errors import UserError

State = dict[str, Tensor]


class WeightsError(UserError):
    """Weights that cannot be read, or belong to another network."""


class Weights(NamedTuple):
    """A state dict under timm's names, and what its source says of it."""

    state: State
    metadata: dict[str, str]  # as `metadata.Metadata` has it, each value as JSON
    remarks: list[str] = []  # noqa: RUF012 - what was chosen or changed, a line each


def in_one_line(error: BaseException) -> str:
    """The beginning of an error's message, or its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
