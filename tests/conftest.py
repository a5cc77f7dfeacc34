"""The order of the tests, their options, and the runs, shards and browser that several share."""

from __future__ import annotations

import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import run, write_images
from small_run import CONFIG, IMAGES, arguments
from small_weights import write_small_weights

from irv2.report import markdown

# Modules of half a minute and more.
LONGEST = ("faults", "mutations", "validate", "train", "benchmark", "finetune", "moving_to_shards",
           "export", "model", "ranks")  # fmt: skip


LONG = ("slow", "mutation", "gpu", "soak", "cluster")  # marks of what --quick leaves out


def pytest_sessionstart() -> None:
    """Let programs under test hear Ctrl-C even if a shell started this in its background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what --quick does, and put the modules that take longest first."""
    if config.getoption("--quick"):
        quick = list(of_quick(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in set(quick)])
        items[:] = quick
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))


def of_quick(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the tests of --quick: none that is marked as long, the first case of the others."""
    begun: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if test not in begun and not any(map(item.get_closest_marker, LONG)):
            yield item
        begun.add(test)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a run of 6 steps, 4 images each, over 14 images; evaluated after steps 4 and 6."""
    folder = tmp_path_factory.mktemp("faults")
    write_images(folder / "train", ["a", "b"], IMAGES // 2)
    write_images(folder / "val", ["a", "b"], 2, seed=1)
    path = folder / "small.yaml"
    path.write_text(CONFIG.format(data=folder))
    return path


@pytest.fixture(scope="session")
def undisturbed(config: Path) -> Path:
    """The directory of a run in which nothing went wrong."""
    result = run("train.py", *arguments(config, config.parent / "undisturbed"))
    assert result.returncode == 0, result.stderr
    return config.parent / "undisturbed"


@pytest.fixture
def inject(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """To be called at each fault with its kind; the faults have survived if the test passes."""
    return lambda kind: request.node.user_properties.append(("fault", kind))


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network that know their classes and view; not to be changed."""
    return write_small_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """The system's Chromium, headless. Where there is none the test skips aloud."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here: what pages look like is NOT checked")
    options = {"executable_path": path, "args": ["--no-sandbox"]}
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield browser


@dataclass
class Tally:
    """Faults of one kind."""

    injected: int = 0
    survived: int = 0
    seconds: float = 0.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--report",
        type=Path,
        metavar="FILE",
        help="write tables into this page: of faults with -m soak, others with -m cluster",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="without what starts programs or takes long, and one case of each test",
    )
    parser.addoption(
        "--all-mutations",
        action="store_true",
        help="try every row of tests/mutations.yaml, not only some: half an hour",
    )


def pytest_terminal_summary(terminalreporter: object, config: pytest.Config) -> None:
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    is_soak = False  # else the page keeps the tally of a longer run than this one
    for outcome in ("passed", "failed"):
        for test in terminalreporter.stats.get(outcome, []):
            is_soak = is_soak or "soak" in test.keywords
            kinds = [kind for name, kind in test.user_properties if name == "fault"]
            for kind in kinds if test.when == "call" else []:
                tallies[kind].injected += 1
                tallies[kind].survived += test.passed
                tallies[kind].seconds += test.duration / len(kinds)
    if not tallies:
        return
    injected, survived = (
        sum(getattr(tally, name) for tally in tallies.values()) for name in ("injected", "survived")
    )
    verdict = f"{injected} faults injected, {survived} survived"
    terminalreporter.write_line(verdict)
    if is_soak and (page := config.getoption("--report")) is not None:
        rows = (
            f"{kind} | {tally.injected} | {tally.survived} | {tally.seconds:.0f}"
            for kind, tally in tallies.items()
        )
        table = markdown.table("fault | injected | survived | seconds", rows)
        markdown.replace_section(page, "faults", f"**{verdict}**\n\n{table}")


@pytest.fixture(scope="session")
def shards(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run's training images in three shards."""
    out = tmp_path_factory.mktemp("shards") / "train"
    result = run(
        "scripts/make_shards.py", config.parent / "train", "--out", out, "--images-per-shard", 5
    )
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Record flushes (a path, its size if it is a file) and renames (the new path), in order."""
    seen: list[tuple[str, object]] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def spy_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append(("fsync", target, target.stat().st_size if target.is_file() else None))
        fsync(descriptor)

    def spy_replace(source, target) -> None:
        seen.append(("rename", Path(target)))
        replace(source, target)

    def spy_rename(source: Path, target: Path) -> Path:
        seen.append(("rename", target))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(Path, "rename", spy_rename)
    return seen
