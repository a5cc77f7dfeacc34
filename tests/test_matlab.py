"""Struct arrays of MATLAB's files, beside SciPy's reader and writer."""

from __future__ import annotations

import io
import random
import zlib

import imagenet_miniature as miniature
import mutants
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from data import matlab

PLAIN = miniature.meta(miniature.IDS)


def saved(compressed: bool, **variables: object) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=compressed)
    return buffer.getvalue()


def records() -> np.ndarray:
    return loadmat(io.BytesIO(PLAIN))["synsets"]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_struct_is_what_scipy_reads(compressed):
    content = saved(compressed, before=np.arange(9.0), synsets=records(), after="text")
    rows = matlab.read_struct(content, "synsets")
    assert len(rows) == 7
    for row, expected in zip(rows, records().ravel()):
        assert tuple(row) == expected.dtype.names
        for name, value in row.items():
            if isinstance(value, str):
                assert value == expected[name].item()
            else:
                np.testing.assert_array_equal(value, expected[name].ravel())


def test_text_of_any_alphabet_numbers_of_any_type_and_nothing_at_all():
    values = {"text": "Bär, 熊", "small": np.uint8(7), "large": np.int64(-(2**62)), "none": ""}
    (row,) = matlab.read_struct(
        saved(False, x={**values, "cells": np.array(["a", 1], object)}), "x"
    )
    assert (row["text"], row["small"].tolist(), row["large"].tolist()) == (
        "Bär, 熊",
        [7],
        [-(2**62)],
    )
    assert row["cells"] is None and row["none"] in (None, "")


def test_what_is_not_there_or_not_a_struct_is_refused():
    for content in (PLAIN, saved(True, other=np.arange(3))):
        with pytest.raises(ValueError, match="holds no struct other"):
            matlab.read_struct(content, "other")


def test_what_grows_beyond_any_use_is_refused():
    vast = zlib.compress(bytes(matlab.MOST + 1))
    head = np.array([matlab.COMPRESSED, len(vast)], "<u4").tobytes()
    with pytest.raises(ValueError, match="holds over"):
        matlab.read_struct(PLAIN[: matlab.HEADER] + head + vast, "synsets")


def test_two_thousand_damaged_files_are_read_or_refused():
    """In this process, which SciPy's reader ends."""
    sources, refused = (PLAIN, saved(True, synsets=records())), 0
    for seed in range(2000):
        rng = random.Random(seed)
        damaged = rng.choice(mutants.BYTES)(rng.choice(sources), rng)
        try:
            matlab.read_struct(damaged, "synsets")
        except ValueError:
            refused += 1
    assert 1000 < refused < 2000
