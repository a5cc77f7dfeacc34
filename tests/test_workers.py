"""Loader processes: none outlives its program, none dies or hangs unnoticed."""

import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing import util

import pytest
from numbered import Faulty, Hanging, Numbered, Slow, endless
from programs import is_alive, start_script

from data import limits, workers
from data.errors import DataError, WorkerError
from data.prepare import processes
from data.workers import InHand, Workers, next_batch, worker_errors


def drain(batches, then: Callable[[int], None] = lambda pid: None) -> None:
    """Take two batches, do something to the second worker, take what comes."""
    next(batches), next(batches)
    then(multiprocessing.active_children()[-1].pid)
    for _ in batches:
        pass


def assert_told(error: DataError, *words: str) -> None:
    assert isinstance(error, DataError)
    assert "\n" not in str(error)
    assert error.__cause__ is None and error.__suppress_context__, "no traceback of torch's"
    assert all(word in str(error) for word in words), error
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_told_in_one_line():
    started = time.monotonic()
    with pytest.raises(WorkerError) as error, worker_errors():
        drain(endless(Numbered(), Workers(2)), lambda pid: os.kill(pid, signal.SIGKILL))
    assert time.monotonic() - started < 60
    assert_told(error.value, "DataLoader worker (pid", "memory", "data.workers")


def test_a_worker_killed_while_the_program_does_something_else_is_told_too():
    batches = endless(Numbered(), Workers(2))
    next(batches)
    with closing(batches), pytest.raises(WorkerError) as error, worker_errors():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in range(500):  # a training step, say
            time.sleep(0.01)
    assert_told(error.value, "is killed by signal: Killed", "memory", "data.workers")


def test_a_thread_that_pins_memory_and_ends_with_a_worker_is_told_too():
    with pytest.raises(WorkerError) as error, worker_errors():
        raise RuntimeError("Pin memory thread exited unexpectedly")  # torch's words, on GPUs
    assert_told(error.value, "DataLoader worker", "memory", "data.workers")


class Unreachable:
    """An iterator of batches that lie with a process which no longer gives them out."""

    def __next__(self) -> None:
        raise ConnectionResetError("reset by peer")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, r"worker \(pid \d+\) exited"), (3, "reset by")]
)
def test_a_lost_connection_is_a_workers_death_only_if_it_dies(seconds, said):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(seconds,))
    child.start()
    try:
        with pytest.raises((RuntimeError, ConnectionResetError), match=said):
            next_batch(Unreachable(), [child], 0, InHand(1))
    finally:
        child.kill()
        child.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "act"),
    [(Hanging(), lambda pid: None), (Slow(), lambda pid: os.kill(pid, signal.SIGSTOP))],
    ids=["storage hangs", "worker stopped"],
)
def test_a_hanging_worker_is_told_of_after_a_while_and_ended_after_the_time_allowed(
    source, act, monkeypatch, caplog
):
    monkeypatch.setattr(workers, "SLOW_S", 0.5)
    started = time.monotonic()
    with pytest.raises(WorkerError) as error:
        drain(endless(source, Workers(2, timeout_s=1.5)), act)
    assert 1.5 <= time.monotonic() - started < 30
    assert_told(error.value, "timed out after 1.5 seconds at numbered/", "run.timeout_s")
    assert "waiting since 0.5 s for numbered/" in caplog.text


def test_what_the_program_itself_waits_for_is_told(monkeypatch, caplog):
    class Late(Numbered):
        def read(self, index: int) -> tuple[bytes, int]:
            time.sleep(0.3)
            return super().read(index)

    monkeypatch.setattr(workers, "SLOW_S", 0.05)
    assert len(next(endless(Late(), Workers(0, timeout_s=9.0))).labels)
    assert caplog.text.count("waiting since 0.05 s for numbered/") == 1


@pytest.mark.slow
def test_workers_stopped_with_batches_not_yet_fetched_are_told_too(monkeypatch):
    """Fetching one waits for its worker inside torch, beyond the reach of torch's time-out."""
    monkeypatch.setattr(workers, "RESCUE_S", 0.5)

    def stop_all(_pid: int) -> None:
        time.sleep(1)  # both have batches ready
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGSTOP)

    with pytest.raises(WorkerError) as error:
        drain(endless(Numbered(), Workers(2, timeout_s=2.0)), stop_all)
    assert_told(error.value, "timed out after 2 seconds", "run.timeout_s")  # torch says 2.0


def test_a_time_limit_is_no_matter_without_workers():
    assert next(endless(Numbered(), Workers(0, timeout_s=1.0))).labels.tolist() == [100]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_program_keeps_its_traceback(workers):
    with pytest.raises(RuntimeError, match="a mistake") as error:
        next(endless(Faulty(), Workers(workers)))
    assert not isinstance(error.value, WorkerError)


# ------------------------------------------------------------------------- limits of the system

INFINITY = resource.RLIM_INFINITY
OF_THE_SYSTEM = """
import os, resource, sys, tempfile, warnings
warnings.simplefilter("ignore")  # torch's, where there are fewer cores than workers
from numbered import Numbered, Workers, endless
from data import limits
from data.prepare.processes import run_all
from data.errors import WorkerError

def allow(files):
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

def told(work):
    try:
        work()
    except WorkerError as error:
        print(error)

def load(workers=8):
    next(endless(Numbered(), Workers(workers, 5.0)))

def prepare():
    run_all([os.getpid] * 20, 20, lambda _: None)
"""


def said(text: str) -> list[str]:
    """The lines that a program says which has the functions above; it ends by itself, and well."""
    program = start_script(OF_THE_SYSTEM + text)
    try:
        out, error = program.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        program.kill()
        raise
    assert (program.returncode, error) == (0, "")
    return out.splitlines()


@pytest.mark.slow
def test_too_few_open_files_for_the_workers_are_told_before_one_starts():
    loading, preparing = said("allow(40); told(load); told(prepare)")
    assert re.fullmatch(
        r"8 worker processes, and 8 more beside them, need 1\d\d open files, and 40 are allowed: "
        r"raise that limit \(ulimit -n 1\d\d\), or lower the number of workers .*",
        loading,
    )
    assert preparing.startswith("20 worker processes need 1")


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(40, 300, 300), (300, 300, 300), (256, INFINITY, 65536), (1024, 2**30, 65536)],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(soft, hard, raised, monkeypatch):
    limits_now = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits_now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits_now.append(pair))
    assert limits.raise_open_files() == raised
    assert limits_now[-1] == (raised, hard)


@pytest.mark.parametrize(("soft", "allowed"), [(100_000, 100_000), (INFINITY, 65536)])
def test_a_limit_of_open_files_is_never_lowered(soft, allowed, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, INFINITY))
    monkeypatch.delattr(resource, "setrlimit")
    assert limits.raise_open_files() == allowed


def test_open_files_are_counted_for_those_beside_too(monkeypatch):
    monkeypatch.setattr(limits, "raise_open_files", lambda: 100)
    monkeypatch.setattr(os, "listdir", lambda _: range(20))
    limits.check_open_files(9)  # 20 + 9 x 6 + 24
    for numbers in ((10,), (5, 5)):
        with pytest.raises(WorkerError, match="need 104 open files, and 100 are allowed"):
            limits.check_open_files(*numbers)


@pytest.mark.slow
def test_workers_that_cannot_all_start_end_and_so_does_the_program():
    text = "limits.check_open_files = lambda *_: None; allow(30); told(load)"
    (line,) = said(text)
    assert line.startswith("not all worker processes could be started ([Errno 24] Too many open")


@pytest.mark.slow
def test_ctrl_c_while_processes_end_leaves_no_alarm(monkeypatch):
    """Which would keep the program from ending until it goes off."""
    shutdown = processes.ProcessPoolExecutor.shutdown

    def interrupted(pool, **options) -> None:
        shutdown(pool, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.ProcessPoolExecutor, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.run_all([os.getpid], 1, lambda _: None)
    alarms = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(alarm.finished.is_set() for alarm in alarms)


@pytest.mark.slow
def test_processes_that_prepare_and_cannot_all_start_end_and_so_does_the_program():
    text = "import data.prepare.processes as p; p.check_open_files = lambda *_: None; allow(30)"
    (line,) = said(text + "; told(prepare)")
    assert line.startswith("not all worker processes could be started ([Errno 24] Too many open")


def test_open_files_that_run_out_later_are_told_in_one_line():
    with pytest.raises(WorkerError) as error, worker_errors():
        raise RuntimeError("Too many open files. Communication with the workers is no longer …")
    assert_told(error.value, "ulimit -n", "data.workers")


LONG = """
os.mkdir(LONG); os.environ["TMPDIR"] = LONG; tempfile.tempdir = None
"""


@pytest.mark.slow
def test_a_long_folder_for_temporary_files_keeps_no_batch_from_coming(tmp_path):
    place = str(tmp_path / ("x" * 100))
    text = f"LONG = {place!r}" + LONG + "load(1); print(tempfile.gettempdir(), os.listdir(LONG))"
    assert said(text) == [f"{place} []"]


@pytest.mark.parametrize(("length", "made"), [(71, []), (72, ["/tmp"])])
def test_sockets_lie_elsewhere_where_their_paths_would_be_too_long(length, made, monkeypatch):
    places = []
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (length - 1))
    monkeypatch.setattr(util, "get_temp_dir", lambda: places.append(tempfile.gettempdir()))
    limits.shorten_sockets()
    assert places == made and len(tempfile.gettempdir()) == length


@pytest.mark.slow
def test_a_long_folder_where_there_is_no_other_is_told(tmp_path):
    text = f"LONG = {str(tmp_path / ('x' * 100))!r}" + LONG
    (line,) = said(text + "limits.SHORT_FOLDERS = (); told(load)")
    assert "have TMPDIR name a folder of at most 71 bytes" in line


MISTAKE = """
from numbered import Numbered, Workers, endless
batches = endless(Numbered(), Workers(2))
next(batches)
raise ValueError("a mistake")
"""


@pytest.mark.slow
def test_workers_keep_no_program_from_ending():
    program = start_script(MISTAKE)
    _, error = program.communicate(timeout=120)
    assert program.returncode == 1
    assert error.endswith("ValueError: a mistake\n")


def test_a_reader_that_has_had_enough_leaves_no_worker():
    batches = endless(Numbered(), Workers(2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_workers_end_with_a_main_process_that_is_killed():
    def main() -> None:
        batches = endless(Hanging(), Workers(2))
        for _ in range(20):  # a worker hangs by now, in a read that will not end
            next(batches)
        writer.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(600)

    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    program = context.Process(target=main)
    program.start()
    writer.close()  # if the program ends early, so does the wait for its word
    children = reader.recv()
    try:
        assert len(children) == 2
        for pid in children:  # what workers leave to the main process
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(pid, number)
        time.sleep(0.2)
        assert all(map(is_alive, children))
        program.kill()
        program.join()
        deadline = time.monotonic() + 20
        while any(map(is_alive, children)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(is_alive, children))
    finally:
        program.kill()
        program.join()
        for pid in filter(is_alive, children):
            os.kill(pid, signal.SIGKILL)
