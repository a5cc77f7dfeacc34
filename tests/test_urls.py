"""No message of a program repeats what a URL holds of secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from irv2 import config, program, weights
from irv2.urls import without_secrets

URL = "https://me:s3cr3t@host.example:8080/a/b?X-Amz-Signature=s3cr3t"


def test_what_is_no_secret_stays():
    for text in (
        "https://host.example:8080/a/b: no such object",
        "s3://bucket/train-00001.tar: 503, tried again",
        "runs/a@b: why? because #1",
        "timm:inception_resnet_v2.tf_in1k: not available",
    ):
        assert without_secrets(text) == text


def test_user_password_query_and_fragment_go():
    assert without_secrets(f"at {URL} now") == "at https://…@host.example:8080/a/b?… now"
    assert without_secrets(f"{URL}: no") == "https://…@host.example:8080/a/b?…: no"
    assert without_secrets("s3://KEY:sec/ret@bucket/a") == "s3://…@bucket/a"
    assert without_secrets("https://host/a#s3cr3t") == "https://host/a#…"
    assert "s3cr3t" not in without_secrets(f"{Path(URL)}: no such file")


@pytest.mark.parametrize(
    "mistake", [lambda: weights.read(URL), lambda: config.load(URL)], ids=["weights", "config"]
)
def test_programs_do_not_repeat_them(mistake, capsys):
    assert program.exit_status(mistake, (ValueError,), of_one_rank=()) == 1
    said = capsys.readouterr().err
    assert "host.example" in said and "no such" in said and "s3cr3t" not in said
