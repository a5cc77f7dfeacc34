"""Surroundings of a program: a terminal or a log, a home directory, torchrun's variables."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from calling import call
from places import take

from data import paths
from data.errors import DataError, UserError
from irv2 import cli, config, config_file
from irv2.config_file import ConfigError
from irv2.run import jsonl
from irv2.run.logbook import Logbook
from irv2.training import distributed
from irv2.training.distributed import Place, World

ROOT = Path(__file__).parents[1]
PROGRAMS = ["train", "validate", *sorted(f"scripts.{p.stem}" for p in ROOT.glob("scripts/*.py"))]
STRANGE = "\N{CAT FACE} caf\udce9"  # a letter outside of Latin-1, and a byte that is no letter
ESCAPED = r"\U0001f431 caf\udce9"

# ------------------------------------------------------------------------------- output


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_can_show_any_name_from_its_first_word_on(name, encoding, monkeypatch):
    def parse(*_arguments: object) -> None:
        print(STRANGE)
        print(STRANGE, file=sys.stderr)
        sys.exit(0)

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    status, out, error = call(importlib.import_module(name), encoding=encoding)
    assert status == 0
    shown = ESCAPED.replace(r"\U0001f431", "\N{CAT FACE}") if encoding == "utf-8" else ESCAPED
    assert out == error == f"{shown}\n"


def test_help_is_shown_where_plus_minus_and_dots_are_not():
    status, out, _ = call(importlib.import_module("train"), "--help", encoding="ascii")
    assert status == 0 and r"brightness \xb132/255" in out and out.rstrip().endswith("ledger/")


def program(body: Callable[[], object], kind: Callable = cli.program) -> SimpleNamespace:
    """A program that does this and ends well."""
    return SimpleNamespace(__file__="program.py", main=kind(lambda: (body() and 0) or 0))


def talk(directory: Path) -> None:
    """Say what a training run may have to say of a class, and record it."""
    World(0, 1, torch.device("cpu")).say(STRANGE)
    log = Logbook(directory, step=0, total_steps=6)
    log.bad_image(1, {"name": STRANGE, "reason": "cannot be decoded"})
    log.close()


def test_a_runs_own_log_is_not_escaped(tmp_path):
    status, out, _ = call(program(lambda: talk(tmp_path)), encoding="ascii")
    assert status == 0 and out.count("\\U0001f431 caf\\") == 2
    assert jsonl.read(tmp_path / "bad_images.jsonl")[0]["name"] == STRANGE


@pytest.mark.parametrize("kind", ["closed", "full"])
def test_output_that_nobody_takes_ends_no_run(kind, tmp_path, monkeypatch):
    stream = None if kind == "closed" else open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        assert program(lambda: talk(tmp_path), cli.run).main() == 0
    finally:
        monkeypatch.undo()
        if stream is not None:
            with suppress(OSError):
                stream.close()
    assert jsonl.read(tmp_path / "bad_images.jsonl")[0]["name"] == STRANGE


@contextmanager
def without_a_reader(name: str, unbuffered: bool = False) -> Iterator[None]:
    """A standard stream is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    raw = io.FileIO(write, "w")
    buffer = raw if unbuffered else io.BufferedWriter(raw)
    stream = io.TextIOWrapper(buffer, "utf-8", write_through=unbuffered)
    with mock.patch.object(sys, name, stream):
        yield
    stream.close()  # which finds nothing to write


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("text", ["x", "x\n" * 100_000])
def test_a_lost_reader_ends_a_program_as_it_ends_others(text, unbuffered, capsys):
    with without_a_reader("stdout", unbuffered):
        assert program(lambda: print(text)).main() == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_lost_reader_ends_no_run(unbuffered, tmp_path):
    done = []

    def train() -> None:
        talk(tmp_path)
        print("x\n" * 100_000, flush=True)
        done.append(True)

    with without_a_reader("stdout", unbuffered), without_a_reader("stderr", unbuffered):
        assert program(train, cli.run).main() == 0
    assert done == [True]


def test_remarks_that_nobody_reads_end_no_program():
    with without_a_reader("stderr"):
        assert program(lambda: cli.remark("x\n" * 100_000)).main() == 0


def test_help_that_is_not_read_to_its_end_is_no_error(monkeypatch, capsys):
    module = importlib.import_module("validate")
    monkeypatch.setattr(sys, "argv", ["validate.py", "--help"])
    with without_a_reader("stdout"):
        assert module.main() == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_output_without_room_is_told(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert program(lambda: print("x")).main() == 1
        monkeypatch.undo()
    said = "standard output: cannot be written (No space left on device)"
    assert capsys.readouterr().err.endswith(f": {said}\n")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    def look() -> None:
        assert (tmp_path / "file").open("w").fileno() > 2
        assert os.read(0, 1) == b"" and sys.stdin.read() == ""
        print("x", flush=True)
        print("x", file=sys.stderr, flush=True)
        os.write(1, b"of a library in C")

    if (child := os.fork()) == 0:
        for number in range(3):
            os.close(number)
        sys.stdin = sys.stdout = sys.stderr = None
        os._exit(program(look).main())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FORGED = "a\ntrain.py: finished\r\x1b[2J https://me:secret@host/x?sig=secret"
TOLD = r"a\ntrain.py: finished\r\x1b[2J https://…@host/x?…"


def test_no_name_forges_a_line_or_tells_a_secret(tmp_path):
    def fail() -> None:
        World(0, 1, torch.device("cpu")).say(FORGED)
        cli.say(FORGED)
        cli.remark(FORGED)
        log = Logbook(tmp_path, step=0, total_steps=6)
        log.say(FORGED)
        log.close()
        raise UserError(FORGED, "a second line")

    status, out, error = call(program(fail))
    assert status == 1 and out == f"{TOLD}\n" * 3
    assert error == f"{TOLD}\nprogram.py: {TOLD}\na second line\n"


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_argument_that_is_wrong_is_told_without_its_secrets(name):
    for words in (["--nonsense", FORGED], [FORGED, f"--nonsense={FORGED}"]):
        status, out, error = call(importlib.import_module(name), *words)
        assert status in (1, 2) and "secret" not in out + error and "\x1b" not in out + error


def test_an_error_is_no_second_error_where_stderr_has_gone(monkeypatch):
    def fail() -> None:
        raise UserError(STRANGE)

    monkeypatch.setattr(sys, "stderr", None)
    assert program(fail).main() == 1


# ------------------------------------------------------------------------------- paths


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory, in a process that is at work elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


@pytest.mark.parametrize("written", ["~/runs", "$HOME/runs", "${HOME}/runs"])
def test_every_way_to_write_the_home_directory_is_expanded(written, home):
    assert cli.path(written) == home / "runs"
    assert paths.expanded(paths.expanded(written)) == str(home / "runs")


@pytest.mark.parametrize(
    "text",
    ["https://host/~me/$HOME", "timm:$HOME", "synthetic:8x2", "auto", "-", "a~b", "a$", "/$"],
)
def test_what_is_no_path_stays(text, home):
    assert paths.expanded(text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$NOWHERE_AT_ALL/runs", "environment has no variable NOWHERE_AT_ALL"),
        ("~nobody-here/runs", "system has no user nobody-here"),
        ("$EMPTY", "expands to nothing"),
    ],
)
def test_what_cannot_be_expanded_makes_no_folder_of_that_name(text, said, home, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(DataError, match=said):
        paths.expanded(text)
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        cli.path(text)
    with pytest.raises(ConfigError, match=rf"run\.dir=.*{said}"):
        config_file.from_tree({"data": {"train": "a", "val": "b"}, "run": {"dir": text}})


def test_a_picture_of_that_very_name_comes_first(home):
    Path("$HOME.jpg").touch()
    assert cli.picture("$HOME.jpg") == "$HOME.jpg"
    assert cli.picture("~/x.jpg") == f"{home}/x.jpg"


PATH_KEYS = [*("run.dir", "data.train", "data.val", "data.cache_dir", "data.classes", "model.init")]


@pytest.mark.parametrize("written", ["~/x", "$HOME/x"])
def test_every_key_that_is_a_path_is_expanded_and_recorded_so(written, home):
    tree: dict[str, dict[str, str]] = {}
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = written
    recorded = config_file.from_tree(tree).model_dump()
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        assert recorded[section][name] == f"{home}/x", key


def test_no_other_key_of_a_config_may_be_a_path():
    texts = {
        key
        for key, info in config.FIELDS.items()
        if "str" in str(info.annotation) and "Literal" not in str(info.annotation)
    }
    assert texts == {*PATH_KEYS, "run.name"}


COLUMNS = {"path_column", "image_column", "label_column"}
FREE_TEXTS = {"overrides", "device", "between", "help", "push", *COLUMNS}  # of options of any type
PATHS = (cli.path, cli.location, cli.picture)


def parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """A program's parser, as it is when it begins to parse."""
    parsers = []

    def catch(parser: argparse.ArgumentParser, *_arguments: object) -> None:
        parsers.append(parser)
        sys.exit(0)

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, catch)
    call(importlib.import_module(name))
    return parsers[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_option_that_is_a_path_is_expanded(name, monkeypatch):
    waiting, untyped, seen = [parser_of(name, monkeypatch)], set(), set()
    while waiting:
        for action in waiting.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
            elif action.nargs != 0 and action.choices is None:
                untyped |= {action.dest} if action.type in (None, str, Path) else set()
                seen |= {action.dest} if action.type in PATHS else set()
    assert untyped <= FREE_TEXTS
    assert seen, "a program without any path"


# ------------------------------------------------------------------------------- the place


def test_the_place_is_what_a_launcher_tells(monkeypatch):
    assert distributed.place() == Place(0, 1, 0, 1)
    take(monkeypatch, Place(5, 8, 1, 4))
    assert distributed.place() == Place(5, 8, 1, 4)
    monkeypatch.delenv("LOCAL_RANK"), monkeypatch.delenv("LOCAL_WORLD_SIZE")  # as Kubeflow's v1
    assert distributed.place() == Place(5, 8, 0, 1)


@pytest.mark.parametrize(
    ("left_over", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but no RANK: "),
        ({"RANK": "0"}, "RANK=0, but no WORLD_SIZE: "),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1, but no RANK and WORLD_SIZE: "),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8, but no RANK and WORLD_SIZE: "),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK=1 LOCAL_RANK=1, but no WORLD_SIZE: "),
        ({"RANK": "", "WORLD_SIZE": "1"}, "which are not all numbers: "),
        ({"RANK": "-1", "WORLD_SIZE": "1"}, "which are not all numbers: "),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "which do not go together: "),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "which do not go together: "),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "which do not go together: "),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but no MASTER_ADDR and MASTER_PORT: "),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "but no MASTER_ADDR: "),
    ],
)
def test_half_of_torchruns_variables_is_told_in_one_line(left_over, said, monkeypatch, capsys):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)

    def body() -> int:
        with distributed.start("cpu"):
            return 0

    assert cli.exit_status(body) == 1
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert left_over.keys() - {"MASTER_PORT"} <= set(line.partition("unset ")[2].split())


@pytest.mark.parametrize("left_over", [{"LOCAL_RANK": "1"}, {"RANK": "1"}, {"LOCAL_RANK": "x"}])
def test_a_process_that_is_the_only_one_speaks(left_over, monkeypatch, capsys):
    def body() -> int:
        raise UserError("words")

    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert cli.exit_status(body) == 1
    assert capsys.readouterr().err.endswith(": words\n")


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_are_chosen_by_rule_where_results_must_repeat(deterministic, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    cudnn, timed = torch.backends.cudnn, torch.backends.cudnn.benchmark
    try:
        distributed.repeat_results(deterministic)
        assert cudnn.benchmark is not deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark = timed
