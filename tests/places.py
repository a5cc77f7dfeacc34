"""A process's place among others, as a launcher tells it."""

from __future__ import annotations

import pytest

from irv2.training.distributed import Place


def take(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    """Have the environment say of this process what torchrun would."""
    for name, value in place.variables().items():
        monkeypatch.setenv(name, value)
