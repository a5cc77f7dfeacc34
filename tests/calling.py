"""Call a program in this process, which spares the start of an interpreter."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock


class Called(NamedTuple):
    """Exit status, output and messages of a program."""

    status: int
    out: str
    err: str


def call(program: ModuleType, *arguments: object, encoding: str = "utf-8") -> Called:
    """Run a program's `main` with these arguments; what it does to the environment ends with it.

    encoding: of its output, as of a terminal.
    """
    words = [Path(program.__file__).name, *map(str, arguments)]
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.dict(os.environ),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            status = program.main()
        except SystemExit as ended:
            status = ended.code
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    return Called(status, *texts)
