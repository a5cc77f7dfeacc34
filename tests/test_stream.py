"""The endless stream: which images a run sees, in which order, and which are fetched ahead."""

import threading
from collections.abc import Iterator
from itertools import chain, count, islice, product

import numpy as np
import pytest

from data.shards.prefetch import Request, requests
from data.stream import Key, Stream, evaluation_batches, micro_batches, read_ahead

LENGTH, SEED = 11, 3
GLOBAL_BATCH = 8  # neither divides the other: epochs end inside batches
STEPS = LENGTH  # LENGTH * GLOBAL_BATCH images: whole epochs
DIVISIONS = [
    (ranks, micro)
    for ranks in (1, 2, 4)
    for micro in (1, 2, 4, 8)
    if GLOBAL_BATCH % (ranks * micro) == 0
]


def epochs_in_order(epochs: int) -> list[Key]:
    """The stream's first epochs, laid end to end."""
    stream = Stream(LENGTH, SEED)
    return [(epoch, int(i)) for epoch in range(epochs) for i in stream.permutation(epoch)]


def keys_of(start: int, micro: int, rank: int, ranks: int) -> Iterator[list[Key]]:
    """A rank's micro-batches."""
    order = Stream(LENGTH, SEED)
    return (order[part] for part in micro_batches(start, GLOBAL_BATCH, micro, rank, ranks))


def global_batches(ranks: int, micro: int, steps: int, start: int = 0) -> list[list[Key]]:
    """Each step's batch: the ranks' shares in order, each share its micro-batches in order."""
    stream_of = [keys_of(start, micro, rank, ranks) for rank in range(ranks)]
    accumulation = GLOBAL_BATCH // (ranks * micro)
    return [
        list(chain.from_iterable(chain.from_iterable(islice(s, accumulation) for s in stream_of)))
        for _ in range(steps)
    ]


# ---------------------------------------------------------------------------------- order


def test_an_epoch_holds_every_image_once():
    stream = Stream(LENGTH, SEED)
    for epoch in (0, 1, 7):
        keys = stream[epoch * LENGTH : (epoch + 1) * LENGTH]
        assert sorted(keys) == [(epoch, index) for index in range(LENGTH)]


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = {
        tuple(Stream(LENGTH, seed).permutation(epoch)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_order_is_the_one_that_interrupted_runs_have_begun():
    # Recorded. Another order would show a resumed run some images twice and some never.
    assert Stream(7, 3)[0:14] == [
        *[(0, 5), (0, 6), (0, 2), (0, 1), (0, 4), (0, 3), (0, 0)],
        *[(1, 2), (1, 1), (1, 4), (1, 0), (1, 5), (1, 6), (1, 3)],
    ]


def test_a_position_is_the_same_image_whatever_was_asked_before():
    stream, expected = Stream(LENGTH, SEED), epochs_in_order(6)
    for position in (60, 3, 25, 4, 61, 0, 60):
        assert stream[position : position + 1] == [expected[position]]


# ---------------------------------------------------------------------------------- batches


def test_batches_straddle_epoch_ends_without_loss_or_repetition():
    keys = list(chain.from_iterable(global_batches(1, GLOBAL_BATCH, STEPS)))
    assert keys == epochs_in_order(GLOBAL_BATCH)
    assert len(set(keys)) == LENGTH * GLOBAL_BATCH


@pytest.mark.parametrize(("ranks", "micro"), DIVISIONS)
def test_global_batches_are_the_same_however_they_are_divided(ranks, micro):
    assert global_batches(ranks, micro, STEPS) == global_batches(1, GLOBAL_BATCH, STEPS)


@pytest.mark.parametrize(("ranks", "micro"), DIVISIONS)
def test_micro_batches_have_the_size_asked_for(ranks, micro):
    for rank in range(ranks):
        batches = keys_of(0, micro, rank, ranks)
        assert {len(batch) for batch in islice(batches, 20)} == {micro}


def test_starting_at_a_position_is_skipping_to_it():
    for ranks, before in product((1, 2, 4), (1, 2, 7)):
        started = global_batches(ranks, 2, 5, start=before * GLOBAL_BATCH)
        expected = global_batches(ranks, 2, before + 5)[before:]
        assert started == expected, (ranks, before)


def test_starting_between_batches_begins_at_exactly_that_image():
    keys = list(chain.from_iterable(global_batches(2, 2, 4, start=13)))
    assert keys == epochs_in_order(5)[13 : 13 + 4 * GLOBAL_BATCH]


# ---------------------------------------------------------------------------------- evaluation


def test_evaluation_takes_every_image_once():
    for ranks, length, batch in product(range(1, 6), (1, 3, 7, 10, 101), (1, 4, 200)):
        shares = [
            list(chain.from_iterable(evaluation_batches(length, batch, rank, ranks)))
            for rank in range(ranks)
        ]
        taken = list(chain.from_iterable(shares))
        assert taken == [(0, index) for index in range(length)], (ranks, batch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1, "no rank waits for another's second image"


def test_evaluation_batches_are_full_but_for_the_last():
    for rank, sizes in ((1, [4, 4, 4]), (0, [4, 4, 3])):
        assert [len(batch) for batch in evaluation_batches(23, 4, rank, 2)] == sizes


# ---------------------------------------------------------------------------------- on slow disks


STORED = np.random.default_rng(9).permutation(103)


def test_a_window_still_shows_every_image_once_an_epoch():
    for window, epoch in product((1, 10, 102, 103, 500), range(3)):
        order = Stream(103, 1, STORED, window).permutation(epoch)
        assert sorted(order) == list(range(103)), (window, epoch)


def test_blocks_lie_one_after_another_and_are_shuffled_within_and_among_themselves():
    order = Stream(100, 1, STORED[STORED < 100], 10)
    place = np.argsort(STORED[STORED < 100])
    firsts = []
    for epoch in range(2):
        blocks = place[order.permutation(epoch)].reshape(10, 10)
        begins = [next(p for p in block if (p - 1) % 100 not in block) for block in blocks]
        for block, begin in zip(blocks, begins):
            assert sorted((block - begin) % 100) == list(range(10))
            assert list((block - begin) % 100) != list(range(10))
        assert begins != sorted(begins)
        firsts.append({begin % 10 for begin in begins})
    assert all(len(first) == 1 for first in firsts)
    assert firsts[0] != firsts[1], "blocks begin at other images in each epoch"


def test_a_windowed_order_is_a_function_of_seed_and_epoch():
    order = [Stream(103, seed, STORED, 10).permutation(epoch) for seed, epoch in ((1, 2), (1, 2))]
    assert np.array_equal(*order)
    for seed, epoch in ((2, 2), (1, 1)):
        other = Stream(103, seed, STORED, 10).permutation(epoch)
        assert not np.array_equal(order[0], other)


def test_each_block_is_told_of_with_the_next_as_it_is_entered():
    order, told, others = Stream(100, 1, np.arange(100), 10), [], set(threading.enumerate())
    batches = read_ahead(micro_batches(96, 8, 4, 0, 1), order, told.append)
    positions = [next(batches) for _ in range(6)]
    for thread in set(threading.enumerate()) - others:
        thread.join(timeout=30)
    assert positions == [slice(first, first + 4) for first in range(96, 120, 4)]
    last, first = order.permutation(0), order.permutation(1)
    expected = [last[90:], first[0:20], first[10:30]]
    assert sorted(block.tolist() for block in told) == sorted(b.tolist() for b in expected)


# ---------------------------------------------------------------------------------- fetched ahead


def check_coming(number: int, size: int, ahead: int, processes: int) -> None:
    """Each process is told of its own batches' images once, in order and early enough."""
    batches = [[(0, size * batch + i) for i in range(size)] for batch in range(number)]
    asked = list(requests(batches, ahead, processes))
    assert [keys for keys, _ in asked] == batches
    for process in range(processes):
        own = asked[process::processes]  # as the DataLoader deals them out
        wanted = [index for keys, _ in own for _, index in keys]
        assert [index for _, soon in own for index in soon] == wanted
        known = 0
        for turn, (_, soon) in enumerate(own, 1):
            known += len(soon)
            assert known >= min(len(wanted), turn * size + ahead)


@pytest.mark.parametrize(("size", "ahead"), [(4, 1), (4, 8), (4, 9), (1, 5), (4, 1000)])
def test_a_process_is_told_of_all_its_images_once_and_early_enough(size, ahead):
    for number, processes in product((0, 1, 2, 7, 40), (1, 2, 3)):
        check_coming(number, size, ahead, processes)


def test_an_endless_stream_is_looked_into_no_further_than_needed():
    taken = []
    batches = (taken.append(number) or [(0, number)] for number in count())
    assert list(islice(requests(batches, 3, 2), 2)) == [
        Request([(0, 0)], [0, 2, 4, 6]),
        Request([(0, 1)], [1, 3, 5, 7]),
    ]
    assert len(taken) <= 2 + 2 * 3
