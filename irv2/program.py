"""How a program ends: one line for a person, and a status for whatever has started it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from irv2.urls import without_secrets


def exit_status(
    body: Callable[[], int],
    mistakes: tuple[type[Exception], ...],
    of_one_rank: tuple[type[Exception], ...],
) -> int:
    """What a program's body returns, or 1 after one line on stderr if a mistake ended it.

    All ranks of a machine meet the same `mistakes`, so one of them speaks; what `of_one_rank`
    names, and what the system refuses, may be met by any. A collective that fails because another
    rank has left needs no traceback: that rank has told why.
    """
    name, rank = Path(sys.argv[0]).name, int(os.environ.get("RANK", 0))
    speaker = f"{name}: rank {rank}" if rank > 0 else name
    try:
        return body()
    except mistakes as error:
        is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        if is_first_here or isinstance(error, (*of_one_rank, OSError)):
            print(f"{speaker}: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        words = ("closed by peer", "reset by peer", "Timed out waiting")  # gloo's
        if not (isinstance(error, dist.DistError) or any(word in str(error) for word in words)):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        print(
            f"{speaker}: ends, as another rank has ended or hangs ({reason})",
            file=sys.stderr,
            flush=True,
        )
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
