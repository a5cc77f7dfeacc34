"""Files changed at random, and what must hold of each change.

A mutant lies in a fresh copy of a folder of sound files, and is read by the program that reads such
a file or by the function in which it does. That must end within SECONDS and take less than MEMORY:
as if nothing were wrong, or with status 1 and a line that names the file. Nothing outside of the
folder may change.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mutants
from calling import Called, call
from fuzzed_kinds import KINDS, Kind, write_sound

from data.shards import object_store

SECONDS, MEMORY = 20, 1 << 30
LONGEST = 10_000  # characters of what is said of a file


class Late(BaseException):
    """A reader that takes longer than it may."""


@contextmanager
def deadline() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mutate(kind: Kind, path: Path, rng: random.Random) -> str:
    """Change a file; returns the change's name."""
    content = path.read_bytes()
    path.unlink()  # other copies may share it
    if kind.things and rng.random() < 0.1:
        thing = rng.choice(mutants.THINGS)
        thing(path)
        return thing.__name__
    change = rng.choice(kind.changes)
    path.write_bytes(change(content, rng))
    if kind.mend is not None and rng.random() < 0.9:
        kind.mend(path)
    return change.__name__


def copied(source: str, target: str) -> str:
    """Copy a small file; share a large one, which no program changes in place."""
    return (os.link if os.path.getsize(source) > 1 << 16 else shutil.copy2)(source, target)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of everything in a folder."""
    found = [(str(path), path.lstat()) for path in sorted(folder.rglob("*"))]
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found}


def fault_of(kind: Kind, called: Called) -> str:
    """Describe what is wrong with a reader's words; empty if nothing is."""
    lines, said = called.err.splitlines(), called.out + called.err
    if called.status not in (0, 1):
        return f"status {called.status}"
    if not all(character.isprintable() or character in "\n\t" for character in said):
        return "control characters"
    if called.status == 0:
        return ""
    names = kind.names or (Path(kind.file).name,)
    if not any(name in called.err for name in names):
        return "the file is not named"
    if not 1 <= len(lines) <= kind.lines or max(map(len, lines)) > LONGEST:
        return f"{len(lines)} lines, the longest of {max(map(len, lines), default=0)} characters"
    return ""


def read(kind: Kind, at: Path) -> tuple[int | None, str]:
    """Read the file of a folder; returns the status and what is wrong."""
    try:
        with deadline():
            called = call(*kind.read(at))
    except Late:
        return None, f"took more than {SECONDS} s"
    except BaseException:
        return None, traceback.format_exc()
    fault = fault_of(kind, called)
    return called.status, f"{fault}: {called.err[-2000:]}" if fault else ""


class Tally(NamedTuple):
    """Outcomes of the mutants of a kind."""

    read: int  # as if nothing were wrong
    refused: int
    slowest_s: float
    memory_mib: float  # more than before
    faults: list[str]


def run(kind: Kind, root: Path, seed: str, count: int) -> Tally:
    """Try mutants of a kind; `root`: the sound files, with a folder beside them to work in."""
    rng, statuses, faults, slowest = random.Random(seed), [], [], 0.0
    object_store.FIRST_PAUSE_S = 0.02
    work, memory = root.with_name("work"), peak()
    before = state_of(root)
    for number in range(-1, count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root, work, copy_function=copied)
        if number < 0:
            if (sound := call(*kind.read(work))).status != 0:
                faults.append(f"the sound file: {sound.err}")
            continue
        change = mutate(kind, next(work.glob(kind.file)), rng)
        started, grown = time.perf_counter(), peak()
        status, fault = read(kind, work)
        slowest = max(slowest, time.perf_counter() - started)
        statuses.append(status)
        if not fault and peak() - grown > MEMORY:
            fault = f"took {(peak() - grown) >> 20} MiB"
        if not fault and state_of(root) != before:
            fault = "changed other files"
        if fault:
            faults.append(f"mutant {number} ({change}): {fault}")
    used = (peak() - memory) / (1 << 20)
    return Tally(statuses.count(0), statuses.count(1), slowest, used, faults)


def peak() -> int:
    """The most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main(folder: str, seed: int, count: int) -> None:
    """Print a line of JSON for each kind."""
    root = Path(folder) / "sound"
    root.mkdir()
    write_sound(root)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, resource.RLIM_INFINITY))
    for name, kind in KINDS.items():
        tally = run(kind, root, f"{seed} {name}", count)
        print(json.dumps({"kind": name, **tally._asdict()}), flush=True)
