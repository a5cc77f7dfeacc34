"""Signals are heard at once, even where Python itself cannot run."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import start_script

pytestmark = pytest.mark.slow

GRACE_S = 0.5
HANGING = f"""
import ctypes
from irv2.run import stopping
stopping.GRACE_S = {GRACE_S}
with stopping.StopRequest() as stop:
    mutex = ctypes.create_string_buffer(256)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("ready", flush=True)
    lock(mutex)  # for ever, in C, as a collective whose peer hangs
"""
WAITING = f"""
import time
from irv2.run import stopping
stopping.GRACE_S = {GRACE_S}
with stopping.StopRequest() as stop:
    print("ready", flush=True)
    while stop.signal is None:
        time.sleep(0.01)
print(stop.exit_status)
time.sleep(60)
"""


def pending(pid: int) -> int:
    """Mask of the signals that wait for a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)[1], 16)


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    process = start_script(request.param)
    limit = threading.Timer(120, process.kill)  # for what would wait for its words for ever
    limit.start()
    assert process.stdout.readline() == "ready\n"
    yield process
    limit.cancel()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("started", [HANGING], indirect=True)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_even_what_hangs(started, second):
    started.send_signal(signal.SIGTERM)
    while pending(started.pid):  # two that wait would be one
        time.sleep(0.001)
    started.send_signal(signal.SIGTERM)  # an echo of it
    time.sleep(3 * GRACE_S)
    assert started.poll() is None
    started.send_signal(second)
    assert started.wait(timeout=60) == 128 + second


@pytest.mark.parametrize("started", [HANGING], indirect=True)
def test_ctrl_c_is_answered_at_once(started):
    started.send_signal(signal.SIGINT)
    assert started.stderr.readline() == "\n"
    assert started.stderr.readline() == "finishing this step; Ctrl-C again leaves at once\n"
    assert started.poll() is None


@pytest.mark.parametrize("started", [WAITING], indirect=True)
def test_afterwards_signals_do_what_they_did_before(started):
    started.send_signal(signal.SIGUSR1)
    assert started.stdout.readline() == "75\n"
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=60) == -signal.SIGTERM
