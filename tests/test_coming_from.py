"""docs/coming_from.md: whatever it names here is here."""

from __future__ import annotations

import importlib
import re

import pytest
from calling import call
from programs import ROOT

from irv2 import config

PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
SECTIONS = "|".join(config.Config.model_fields)


def ours() -> list[str]:
    """Code in the column of ours, of each table's rows."""
    cells = [line.split(" | ")[1:] for line in PAGE.splitlines() if line.startswith("| ")]
    return [code for row in cells for cell in row for code in re.findall(r"`([^`]+)`", cell)]


def test_every_key_on_the_page_is_one():
    keys = [key for code in ours() for key in re.findall(rf"\b(?:{SECTIONS})\.[a-z_]+", code)]
    assert len(set(keys)) > 40
    files = {key for key in keys if key.endswith((".py", ".yaml"))}
    assert set(keys) - files - set(config.FIELDS) == set()


def options_named() -> dict[str, set[str]]:
    """Options on the page, by the program that stands before them."""
    named: dict[str, set[str]] = {}
    for code in ours():
        program = re.search(r"(?:scripts/)?(\w+)\.py", code)
        flags = set(re.findall(r"(?<![\w-])--[a-z-]+", code)) - {"--nproc-per-node"}
        if program and flags:
            named.setdefault(program[0], set()).update(flags)
        else:
            assert not flags, code
    return named


@pytest.mark.parametrize("program", sorted(options_named()))
def test_every_option_on_the_page_is_in_the_help_of_its_program(program):
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    _, shown, _ = call(module, "--help")
    if program == "scripts/prepare_dataset.py":
        shown += call(module, "folder", "--help").out
    known = set(re.findall(r"--[a-z-]+", shown))
    assert options_named()[program] <= known
