"""train.py with a fault: `python harmed.py FAULT ARGUMENTS OF train.py`.

kill-in-save=N      SIGKILL this process in the N-th file of a checkpoint, which stays half written
kill-in-rename=N    ... at the N-th checkpoint, written but not yet under its name
kill-in-prune=N     ... when the N-th old checkpoint is half removed
full-disk=A-B       saves number A to B fail as on a full disk
slow-step=S         each training step takes S seconds more
slow-save=S         each save takes S seconds more
slow-evaluation=S   each batch of an evaluation takes S seconds more
nan=RANK:A-B        the loss of one rank is not a number in steps A to B
apart=NAME          each rank has a run directory of its own: run.dir, NAME and its number
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.tensorboard import FileWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from irv2 import scoring
from irv2.run import checkpoint, directory, jsonl
from irv2.training import step
from irv2.training.loss import Loss


def span(text: str) -> range:
    """ "2-4" -> 2, 3, 4."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def before(owner: object, name: str, action: Callable[..., None]) -> None:
    """Call `action` with the arguments of each call of a function, before it."""
    function = getattr(owner, name)

    def wrapped(*arguments, **options):
        action(*arguments)
        return function(*arguments, **options)

    setattr(owner, name, wrapped)


def counted(steps: range, action: Callable[..., None]) -> Callable[..., None]:
    """Do it in the calls whose number is in `steps`; the first is number 1."""
    calls = iter(range(1, sys.maxsize))

    def act(*arguments) -> None:
        if next(calls) in steps:
            action(*arguments)

    return act


def die(*_arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear_and_die(path: Path, **_options: object) -> None:
    next(path.iterdir()).unlink()
    die()


def kill_in_save(call: range) -> None:
    """Only the files of new checkpoints count."""

    def tear(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        die()

    def act(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file() and path.parent.suffix == ".new":
            tear_in_call(descriptor)

    tear_in_call = counted(call, tear)
    before(os, "fsync", act)


def full_disk(saves: range) -> None:
    """Checkpoints, best weights, log lines and TensorBoard's events fail, until the next save."""
    save, calls = checkpoint.save, iter(range(1, sys.maxsize))
    places = ((os, "fsync"), (jsonl.JsonLines, "_write_bytes"), (FileWriter, "add_event"))
    sound = [getattr(owner, name) for owner, name in places]

    def harmed(*arguments) -> Path:
        is_full = next(calls) in saves
        for (owner, name), function in zip(places, sound):
            setattr(owner, name, fail if is_full else function)
        return save(*arguments)

    checkpoint.save = harmed


def fail(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill_in_rename(call: range) -> None:
    """Only renames of new checkpoints count."""
    die_in_call = counted(call, die)
    before(Path, "rename", lambda path, _target: path.suffix == ".new" and die_in_call())


def kill_in_prune(call: range) -> None:
    """Only removals of old checkpoints count."""
    tear = counted(call, tear_and_die)
    before(shutil, "rmtree", lambda path: path.suffix == ".old" and path.exists() and tear(path))


def nan(where: str) -> None:
    rank, _, steps = where.partition(":")
    loss, current = Loss.__call__, {"step": 0}
    before(step, "begin", lambda state, *_: current.update(step=state.step + 1))

    def harmed(self, output, labels) -> torch.Tensor:
        value = loss(self, output, labels)
        is_hit = current["step"] in span(steps) and os.environ.get("RANK", "0") == rank
        return value * float("nan") if is_hit else value

    Loss.__call__ = harmed


def slow_evaluation(seconds: float) -> None:
    scored = scoring.scored

    def slow(model, batches, *arguments):
        print("evaluation begins", flush=True)
        return scored(model, (time.sleep(seconds) or b for b in batches), *arguments)

    scoring.scored = slow


def slow_step(seconds: float) -> None:
    before(step, "begin", lambda *_arguments: time.sleep(seconds))


def slow_save(seconds: float) -> None:
    def wait(*_arguments: object) -> None:
        print("save begins", flush=True)
        time.sleep(seconds)

    before(checkpoint, "save", wait)


def apart(name: str) -> None:
    own = name + os.environ["RANK"]
    sys.argv = [word + own if word.startswith("run.dir=") else word for word in sys.argv]
    directory.APPEARS_WITHIN_S = 1.0


FAULTS: dict[str, Callable[[str], None]] = {
    "kill-in-save": lambda n: kill_in_save(span(n)),
    "kill-in-rename": lambda n: kill_in_rename(span(n)),
    "kill-in-prune": lambda n: kill_in_prune(span(n)),
    "full-disk": lambda saves: full_disk(span(saves)),
    "slow-step": lambda seconds: slow_step(float(seconds)),
    "slow-save": lambda seconds: slow_save(float(seconds)),
    "slow-evaluation": lambda seconds: slow_evaluation(float(seconds)),
    "nan": nan,
    "apart": apart,
}

if __name__ == "__main__":
    kind, _, detail = sys.argv.pop(1).partition("=")
    FAULTS[kind](detail)
    sys.exit(train.main())
