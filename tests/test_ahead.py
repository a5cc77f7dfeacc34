"""What loader processes are told to fetch ahead: every image once, early enough, those of their own
batches."""

from __future__ import annotations

from itertools import count, islice

import pytest

from data.ahead import Asked, with_coming


def batches_of(size: int, number: int) -> list[list[tuple[int, int]]]:
    return [[(0, size * batch + i) for i in range(size)] for batch in range(number)]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("size", "ahead"), [(4, 1), (4, 8), (4, 9), (1, 5), (4, 1000)])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 40])
def test_a_process_is_told_of_all_its_images_once_and_early_enough(processes, size, ahead, number):
    batches = batches_of(size, number)
    asked = list(with_coming(batches, ahead, processes))
    assert [keys for keys, _ in asked] == batches
    for process in range(processes):
        own = asked[process::processes]  # as the DataLoader deals them out
        wanted = [index for keys, _ in own for _, index in keys]
        told = [index for _, soon in own for index in soon]
        assert told == wanted
        for turn in range(len(own)):
            known = sum(len(soon) for _, soon in own[: turn + 1])
            assert known >= min(len(wanted), (turn + 1) * size + ahead)


def test_an_endless_stream_is_looked_into_no_further_than_needed():
    taken = []
    batches = (taken.append(number) or [(0, number)] for number in count())
    assert list(islice(with_coming(batches, 3, 2), 2)) == [
        Asked([(0, 0)], [0, 2, 4, 6]),
        Asked([(0, 1)], [1, 3, 5, 7]),
    ]
    assert len(taken) <= 2 + 2 * 3
