"""Programs started by forking a process that has already imported what they import.

A start of Python that imports torch, torchvision and timm takes 7 s of a core, a fork of a process
that has done so a few milliseconds. A forked program is otherwise what a shell starts: it has its
own pid, standard streams, environment and `__main__`, is a child of the process that asked for it,
hears signals, and ends as an interpreter ends: it waits for threads and does what is registered for
the end. What it does not show is that its imports work, that its objects can be destroyed, what is
read from the environment at an import or a start (text encoding), and what depends on the order of
hashes, which all forks share; some programs are therefore started anew (`as_user` in programs.py).
/proc tells of the server's environment and command line.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import types
from pathlib import Path
from subprocess import DEVNULL, Popen

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "train",
    "validate",
    "irv2.network.cpu.norm",
    "irv2.network.cpu.update",
    "data.prepare.imagenet",
    "scipy.stats",  # at the first interval
)
LIBRARIES = ("torchvision", "timm", "numba", "scipy.stats", "torch.utils.tensorboard", "pytest")
PR_SET_CHILD_SUBREAPER = 36
ENDED: list[int] = []  # the exit status of a program that has ended, but for by an exception


class Program(Popen):
    """A forked program, otherwise a subprocess.Popen.

    args: a Python file and its arguments; "-c", a text and its arguments; or "-m", a module and its
    arguments. Of Popen's options those of streams and text have an effect, `cwd` and `env`.
    """

    imported = IMPORTED

    def _execute_child(
        self, args, _executable, _preexec_fn, _close_fds, _pass_fds, cwd, env, _startupinfo,
        _creationflags, _shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_others,
    ):  # fmt: skip
        streams = [own if own != -1 else i for i, own in enumerate((p2cread, c2pwrite, errwrite))]
        request = {"argv": list(args), "cwd": str(cwd or Path.cwd()), "env": dict(env)}
        self.pid = _ask(self.imported, request, streams)
        self._child_created = True
        ours = (self.stdin, self.stdout, self.stderr)
        for own, pipe in zip((p2cread, c2pwrite, errwrite), ours):
            if pipe is not None:
                os.close(own)


class OtherProgram(Program):
    """A forked program that finds libraries imported and nothing of this checkout."""

    imported = LIBRARIES


def environment() -> dict[str, str]:
    """Return what programs under test find: one thread, plain output, and no hub of weights.

    Memory comes in large pages: small runs take new memory more than they compute in it.
    """
    own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    own["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    return os.environ | own | {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{tempfile.gettempdir()}/no-hub"}


def _ask(imported: tuple[str, ...], request: dict, streams: list[int]) -> int:
    """Send a request with three file descriptors to a server; returns the program's pid."""
    channel, content = _server(os.getpid(), imported), json.dumps(request).encode()
    try:
        socket.send_fds(channel, [len(content).to_bytes(8, "big")], streams)
        channel.sendall(content)
        pid = int.from_bytes(_received(channel, 8), "big")
    except (OSError, EOFError):
        raise ChildProcessError("the fork server has ended; it has said why on stderr") from None
    if pid == 0:
        raise ChildProcessError("the fork server could not fork; it has said why on stderr")
    return pid


@functools.cache
def _server(_own_pid: int, imported: tuple[str, ...]) -> socket.socket:
    """Start a server of this process, which ends when its end of the channel is closed."""
    # A program's parent ends at once, so that the program becomes a child of this process.
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("no PR_SET_CHILD_SUBREAPER here: exit statuses of programs would be lost")
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, str(theirs.fileno()), *imported]
    Popen(command, env=environment(), pass_fds=[theirs.fileno()], stdin=DEVNULL)
    theirs.close()
    return ours


# ------------------------------------------------------------------------------ in the server


def serve(channel: socket.socket) -> dict | None:
    """Fork at each request; returns the request in each forked program, None at the end."""
    while True:
        head, streams, _, _ = socket.recv_fds(channel, 8, 3)
        if not head:
            return None
        request = json.loads(_received(channel, int.from_bytes(head, "big")))
        read, write = os.pipe()
        if (middle := os.fork()) == 0:
            if (pid := os.fork()) == 0:
                for number, own in enumerate(streams):
                    os.dup2(own, number)
                for own in (*streams, read, write):
                    os.close(own)
                channel.close()
                return request
            os.write(write, pid.to_bytes(8, "big"))
            os._exit(0)
        os.waitpid(middle, 0)
        os.close(write)
        channel.sendall(os.read(read, 8) or bytes(8))
        for own in (*streams, read):
            os.close(own)


def warm() -> None:
    """Do what a program's first batch, step and figure do: load machine code and fonts."""
    import numpy as np  # here, as whoever asks for programs needs none of these
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from data.resample import Box, resize
    from data.to_input import ToInput
    from irv2.network.cpu import fused, update

    image, view = (np.zeros((side, side, 3), np.uint8) for side in (8, 4))
    resize(image, view, box=Box(0, 0, 8, 8), size=(4, 4))
    images, flips = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool)
    for colours in (None, torch.zeros(1, 3)):
        x = ToInput([0.5] * 3, [0.5] * 3, torch.device("cpu"))(images, flips, colours)
    fused.norm_relu(x, torch.nn.BatchNorm2d(3))
    weight, rates = [torch.zeros(1)] * 5, update.Rates(1.0, 0.0, 0.9, 1.0, 0.9, 0.0, 0.0)
    update.rmsprop([update.Slots(*weight)], rates)
    update.norm(weight[:1])
    figure = Figure(layout="constrained")
    figure.add_subplot().set_title("words")
    FigureCanvasAgg(figure).draw()


def _received(channel: socket.socket, size: int) -> bytes:
    """Return exactly `size` bytes. Raises EOFError where the channel ends before."""
    content = b""
    while len(content) < size:
        if not (more := channel.recv(size - len(content))):
            raise EOFError
        content += more
    return content


def leave() -> None:
    """Spare an ended program the destruction of all that was imported: 0.7 s of a core."""
    if ENDED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ENDED[0])


def become(request: dict) -> None:
    """Run the program that a request describes, in this process."""
    try:
        _become(request)
    except SystemExit as ended:
        code = ended.code
        ENDED.append(code & 0xFF if isinstance(code, int) else int(code is not None))
        raise
    ENDED.append(0)


def _become(request: dict) -> None:
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # as the environment says
    sys.modules["numpy"].random.seed()  # else all programs would draw the same
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        raw = io.FileIO(number, "w", closefd=False)  # unbuffered, as environment() asks
        setattr(sys, name, io.TextIOWrapper(raw, errors=errors, write_through=True))
    program, *arguments = request["argv"]
    more = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if program == "-m":
        module, *arguments = arguments
        sys.argv, sys.path[:1] = [module, *arguments], [request["cwd"], *more]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif program == "-c":
        text, *arguments = arguments
        sys.argv, sys.path[:1] = ["-c", *arguments], ["", *more]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[:1] = [program, *arguments], [str(Path(program).resolve().parent), *more]
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    atexit.register(leave)  # before all imports, so that it comes last
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the programs' to hear, and pytest's
    channel, imported = socket.socket(fileno=int(sys.argv[1])), tuple(sys.argv[2:])
    if imported == IMPORTED:
        sys.path.insert(1, str(ROOT))
    for name in imported:
        importlib.import_module(name)
    if imported == IMPORTED:
        warm()
    gc.freeze()  # else each program's first collection would copy all that is imported
    if (request := serve(channel)) is not None:
        become(request)
