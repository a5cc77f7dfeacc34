"""What a program finds around it: torchrun's variables, or half of them."""

from __future__ import annotations

import pytest
from places import take

from data.errors import UserError
from irv2 import cli
from irv2.training import distributed
from irv2.training.distributed import Place

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
