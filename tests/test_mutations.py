"""Deliberate breakages, a row each of mutations.yaml, and that the tests named there notice them.

Every run tries some rows that quick tests notice, others for each commit; `--all-mutations` tries
all.
"""

from __future__ import annotations

import functools
import random
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from programs import run_elsewhere

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {".git", ".venv", "runs", "datasets"}  # of a copy that was made without git
SAMPLE = 5  # rows
CRASHES = ("NameError", "TypeError", "AttributeError", "ImportError", "UnboundLocalError")
TIMEOUT_S = 400  # of a breakage that makes its tests wait for ever


@dataclass(frozen=True)
class Row:
    """A mistake that somebody could make in one place, and what must fail because of it."""

    file: str
    text: str
    instead: str
    breaks: str
    noticed_by: list[str]
    crashes: bool = False  # the mistake is that an error is raised

    @property
    def name(self) -> str:
        """Name of the row's test: the promise, as far as letters and digits say it."""
        return re.sub(r"[^a-z0-9]+", "-", self.breaks.lower()).strip("-")


ROWS = [Row(**row) for row in yaml.safe_load((ROOT / "tests" / "mutations.yaml").read_text())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = ROWS if metafunc.config.getoption("--all-mutations") else sample()
        metafunc.parametrize("row", rows, ids=lambda row: row.name)


def sample() -> list[Row]:
    """Rows of this commit that quick tests notice: the same in every process that collects them."""
    quick = [row for row in ROWS if not any(map(is_slow, places(row.noticed_by)))]
    return random.Random(git("rev-parse", "HEAD") or 0).sample(quick, SAMPLE)


def is_slow(place: str) -> bool:
    """True if FILE::NAME is marked as slow, by itself or with its module."""
    path, _, name = place.partition("::")
    text = modules_of_tests()[ROOT / path]
    marks = rf"^@pytest\.mark\.slow\n(@.*\n)*def {name}\(|^pytestmark = pytest\.mark\.slow$"
    return re.search(marks, text, re.M) is not None


def git(*arguments: str) -> str:
    """Output of a git command; empty where there is no git or no repository."""
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout if result.returncode == 0 else ""


def copied(to: Path) -> Path:
    """A copy of the checkout, with what git does not track yet and without what it ignores."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    files = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    if not files:
        shutil.copytree(ROOT, to, ignore=lambda folder, _: LEFT_OUT if folder == str(ROOT) else ())
    for path in files:
        target = to / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return to


@functools.cache
def modules_of_tests() -> dict[Path, str]:
    """Texts of the test modules."""
    return {path: path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}


def places(names: Iterable[str]) -> list[str]:
    """FILE::NAME of each test function. Raises ValueError for one that is nowhere or twice."""
    found = []
    for name in names:
        homes = [path for path, text in modules_of_tests().items() if f"\ndef {name}(" in text]
        if len(homes) != 1:
            raise ValueError(f"{name}: in {len(homes)} files, not in one")
        found.append(f"{homes[0].relative_to(ROOT)}::{name}")
    return found


def ran(
    checkout: Path, names: Iterable[str], timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run tests in another checkout."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={checkout}-tmp"]
    return run_elsewhere(checkout, "-m", "pytest", *options, *places(names), timeout_s=timeout_s)


@pytest.mark.mutation
def test_a_breakage_is_noticed(row, tmp_path):
    checkout = copied(tmp_path / "checkout")
    content = (checkout / row.file).read_text()
    assert content.count(row.text) == 1, f"{row.file}: this must be in it once:\n{row.text}"
    (checkout / row.file).write_text(content.replace(row.text, row.instead))
    result = ran(checkout, row.noticed_by)
    tests, tail = ", ".join(row.noticed_by), result.stdout[-3000:] + result.stderr[-1000:]
    if result.returncode == 0 and "skipped" in result.stdout:
        pytest.skip(f"NOT tried here, as its tests are skipped: {row.breaks}")
    crash = re.search(rf"^E\s+({'|'.join(CRASHES)}): .*", result.stdout, re.M)
    assert row.crashes or not crash, f"{row.file}: noticed by a crash alone: {crash[0]}"
    assert result.returncode != 0, f"SURVIVED in {row.file}: {row.breaks}; {tests}\n{tail}"
    assert result.returncode == 1, f"{row.file}: not one test ran to its failure: {tests}\n{tail}"


@pytest.mark.mutation
def test_the_named_tests_pass_without_a_breakage(request, tmp_path):
    if not request.config.getoption("--all-mutations"):
        pytest.skip("with --all-mutations only: minutes")
    named = dict.fromkeys(name for row in ROWS for name in row.noticed_by)
    result = ran(copied(tmp_path / "checkout"), named, timeout_s=3600)
    assert result.returncode == 0, result.stdout[-3000:]


def test_every_row_changes_what_is_there_once_and_names_tests_that_are_there():
    for row in ROWS:
        assert (ROOT / row.file).read_text().count(row.text) == 1, f"{row.file}: {row.text}"
        assert row.text != row.instead, row
    places({name for row in ROWS for name in row.noticed_by})  # raises ValueError


def test_every_test_that_a_page_names_is_there():
    modules = {path.stem for path in modules_of_tests()}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"\btest_\w+", page.read_text(encoding="utf-8")))
        places(named - modules)  # raises ValueError


def test_there_are_many_rows_of_different_names_and_some_of_every_module():
    assert len(ROWS) == len({row.name for row in ROWS}) >= 80
    modules = [path for package in ("irv2", "data") for path in (ROOT / package).rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in modules if path.stem != "__init__"}
    assert names - {row.file for row in ROWS} == set()
