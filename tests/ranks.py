"""Run a program as several ranks, as torchrun does: `python ranks.py COUNT PROGRAM ARGUMENTS`.

Ranks are forked, which spares their imports where torchrun itself is not the subject. Exit status:
0, or 1 if a rank's was another; the others are then ended, as by torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress

import torch.distributed as dist
from fork_server import become


def main() -> int | None:
    """Return the exit status, or None in a rank, which is the program."""
    count, argv = int(sys.argv[1]), sys.argv[2:]
    read, write = os.pipe()
    pids = {}
    for rank in range(count):
        if (pid := os.fork()) == 0:
            os.close(write)
            if not (port := os.read(read, 5).decode()):
                os._exit(1)  # the launcher has gone
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
            own = {key: str(value) for key, value in own.items()}
            become({"argv": argv, "cwd": os.getcwd(), "env": {**os.environ, **own}})
            return None
        pids[pid] = rank
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(write, f"{store.port:05d}".encode() * count)
    failed = False
    while pids:
        pid, status = os.wait()
        if pids.pop(pid, None) is not None and status != 0 and not failed:
            failed = True
            end(pids, signal.SIGTERM)
            signal.signal(signal.SIGALRM, lambda *_: end(pids, signal.SIGKILL))
            signal.alarm(30)  # torchrun's patience
    return int(failed)


def end(pids: Iterable[int], number: int) -> None:
    """Send a signal to those that are still there."""
    for pid in list(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())
