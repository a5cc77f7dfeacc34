"""Exact counts against a plain sort, scikit-learn and torch.topk; intervals, pace and pictures."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

import numpy as np
import programs
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from small_network import ALONE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from data import sources
from data.base import Source
from data.workers import Workers
from irv2 import config, config_file, evaluation, input_pipeline
from irv2.report import figures
from irv2.report.statistics import calibration, mcnemar, wilson
from irv2.run.logbook import Logbook
from irv2.training import metrics
from irv2.training.metrics import (
    UNRANKED,
    Collector,
    Pace,
    Predictions,
    Scored,
    best_answers,
    label_ranks,
)


def plain_rank(logits: list[float], label: int) -> int:
    """Place of a label sorted by logit, then by class index; a non-finite one has none."""
    if not math.isfinite(logits[label]):
        return UNRANKED
    rivals = [i for i, value in enumerate(logits) if not math.isnan(value)]
    return sorted(rivals, key=lambda i: (-logits[i], i)).index(label)


def collected(logits: Tensor, labels: Tensor, batch: int = 7) -> Predictions:
    collector = Collector()
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        indices = list(range(len(labels)))[part]
        sizes = np.ones((len(indices), 2), np.int32)
        collector.add(Scored(logits[part], labels[part], indices, sizes))
    return Predictions.merged(collector.predictions())


def counts(found: Predictions) -> list[int]:
    return [found.top1_correct, found.top5_correct, found.images]


def drawn(images: int, classes: int, seed: int, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Random logits, of so many levels that there are ties if these are given, and labels."""
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        logits = torch.randn(images, classes, generator=generator)
    else:
        logits = torch.randint(levels, (images, classes), generator=generator).float()
    return logits, torch.randint(classes, (images,), generator=generator)


def assert_ranks_of_a_plain_sort(logits: Tensor, labels: Tensor) -> None:
    expected = [plain_rank(row, label) for row, label in zip(logits.tolist(), labels.tolist())]
    assert label_ranks(logits, labels).tolist() == expected


def test_ranks_equal_a_plain_sort_with_ties_by_class_index():
    for levels in (2, 5, 1000):
        assert_ranks_of_a_plain_sort(*drawn(200, 9, seed=levels, levels=levels))


def test_ranks_of_logits_that_are_not_finite():
    logits, labels = drawn(300, 6, seed=0, levels=4)
    generator = torch.Generator().manual_seed(1)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    chosen = torch.randint(3, logits.shape, generator=generator)
    is_special = torch.rand(300, 6, generator=generator) < 0.3
    assert_ranks_of_a_plain_sort(torch.where(is_special, special[chosen], logits), labels)


def test_all_equal_logits_do_not_make_every_label_first():
    labels = torch.arange(8)
    assert label_ranks(torch.zeros(8, 8), labels).tolist() == list(range(8))


def test_a_network_of_nans_gets_nothing_right():
    for classes in (2, 10):
        found = collected(torch.full((20, classes), float("nan")), torch.arange(20) % classes)
        assert counts(found) == [0, 0, 20]


def test_half_precision_logits_one_bit_apart_are_no_tie():
    logits = torch.tensor([[1.0, 1.0009765625, 1.0]]).half()
    assert label_ranks(logits, torch.tensor([0])).tolist() == [1]
    assert label_ranks(logits, torch.tensor([2])).tolist() == [2]


def test_counts_equal_scikit_learns_and_topks_on_random_logits():
    logits, labels = drawn(523, 20, seed=1)
    found = collected(logits, labels)
    theirs = [
        sklearn.metrics.top_k_accuracy_score(
            labels.numpy(), logits.numpy(), k=k, labels=np.arange(20), normalize=False
        )
        for k in (1, 5)
    ]
    assert counts(found) == [*theirs, 523]
    in_top5 = (logits.topk(5).indices == labels[:, None]).any(1).sum().item()
    assert found.top5_correct == in_top5
    assert found.loss.sum() == pytest.approx(
        F.cross_entropy(logits.double(), labels, reduction="sum").item(), rel=1e-6
    )


def test_the_loss_is_free_of_label_smoothing_and_in_float32_at_least():
    logits = torch.tensor([[2.0, 0.0, -1.0]]).bfloat16()
    found = collected(logits, torch.tensor([0]))
    expected = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(-1)))
    assert found.loss.sum() == pytest.approx(expected, rel=1e-6)


def test_with_five_classes_or_fewer_everything_is_among_the_five_best():
    for classes in (2, 3, 4, 5):
        logits, labels = drawn(50, classes, seed=classes)
        top1_correct = (logits.argmax(1) == labels).sum().item()
        assert counts(collected(logits, labels)) == [top1_correct, 50, 50]


def test_the_counts_do_not_depend_on_the_batches():
    logits, labels = drawn(64, 10, seed=2)
    results = [counts(collected(logits, labels, batch)) for batch in (1, 5, 64)]
    assert results[0] == results[1] == results[2]


def test_a_result_divides_by_the_images():
    rank = np.full(50_000, 9)
    rank[:47_656], rank[:40_217] = 4, 0
    zeros = np.zeros((50_000, 5))
    found = Predictions(np.arange(50_000), rank % 7, rank, rank * 0 + 0.5, zeros, zeros, zeros)
    assert (found.top1, found.top5, found.mean_loss) == (80.434, 95.312, 0.5)


def test_the_mean_over_classes_is_scikit_learns_balanced_accuracy():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(300, 7, generator=generator)
    labels = torch.randint(5, (300,), generator=generator) ** 2 % 7  # of unequal frequency
    theirs = sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(1))
    assert collected(logits, labels).mean_per_class == pytest.approx(100 * theirs)


def test_first_places_and_their_probabilities_are_a_stable_sorts():
    logits, labels = drawn(60, 9, seed=4, levels=4)
    found = collected(logits, labels)
    expected = [sorted(range(9), key=lambda i: (-row[i], i))[:5] for row in logits.tolist()]
    assert found.top.tolist() == expected
    probability = logits.double().softmax(1).gather(1, torch.tensor(expected))
    assert found.probability == pytest.approx(probability.numpy(), rel=1e-5)
    assert ((found.top[:, 0] == found.label) == (found.rank == 0)).all()


def test_confusions_and_mistakes_are_scikit_learns_and_a_plain_sorts():
    logits, labels = drawn(200, 6, seed=7)
    found = collected(logits, labels)
    theirs = sklearn.metrics.confusion_matrix(labels, logits.argmax(1), labels=range(6))
    assert np.array_equal(found.confusion_matrix(6), theirs)
    wrong = [i for i in range(200) if logits[i].argmax() != labels[i]]
    sure = logits.softmax(1).amax(1).tolist()
    assert found.mistakes().tolist() == sorted(wrong, key=lambda i: -sure[i])


def test_of_several_right_answers_the_best_placed_counts():
    scores, _ = drawn(200, 9, seed=5, levels=4)
    answers = torch.randint(9, (200, 3), generator=torch.Generator().manual_seed(5))
    rows = list(zip(scores.tolist(), answers.tolist()))
    expected = [min(row, key=lambda i: (-score[i], i)) for score, row in rows]
    assert best_answers(scores, answers).tolist() == expected
    ranks = [min(plain_rank(score, i) for i in row) for score, row in rows]
    assert collected(scores, answers).rank.tolist() == ranks


def test_what_ranks_found_is_put_together_in_the_order_of_images():
    whole = collected(*drawn(10, 6, seed=6))
    names = [f.name for f in dataclasses.fields(whole)]
    parts = [
        Predictions(*(getattr(whole, name)[rows] for name in names))
        for rows in (slice(6, 10), slice(0, 6))
    ]
    merged = Predictions.merged(parts)
    for name in names:
        assert np.array_equal(getattr(merged, name), getattr(whole, name)), name


# ---------------------------------------------------------------------------------- the pace


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock that `Pace` reads, to be moved by hand."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def test_pace_counts_images_and_waiting_between_two_readings(now):
    pace = Pace()
    for _ in range(2):
        with pace.waiting(torch.device("cpu")):
            now[0] += 0.5
        now[0] += 1.5
        pace.trained(64)
    assert pace.read() == {"images_per_s": 32.0, "data_wait": 0.25}
    now[0] += 2.0
    assert pace.read() == {"images_per_s": 0.0, "data_wait": 0.0}


def test_pace_is_a_share_of_what_the_matrix_rate_would_allow(now):
    pace = Pace()
    pace.ceiling = 80.0
    pace.trained(64)
    now[0] += 2.0
    assert pace.read() == {"images_per_s": 32.0, "data_wait": 0.0, "mfu": 0.4}


def test_pace_leaves_out_what_came_before_a_restart(now):
    pace = Pace()
    pace.trained(1000)
    with pace.waiting(torch.device("cpu")):
        now[0] += 60.0
    pace.restart()
    pace.trained(10)
    now[0] += 1.0
    assert pace.read() == {"images_per_s": 10.0, "data_wait": 0.0}


# ---------------------------------------------------------------------------------- statistics


def test_the_interval_solves_wilsons_equation():
    z = 1.959963984540054
    for correct, images in ((0, 10), (10, 10), (353, 360), (40_217, 50_000)):
        share = correct / images
        centre = share + z * z / (2 * images)
        half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images**2))
        expected = [100 * end / (1 + z * z / images) for end in (centre - half, centre + half)]
        assert wilson(correct, images) == pytest.approx(expected)


def test_mcnemar_is_a_two_sided_sign_test_of_the_images_that_differ():
    first = np.array([True] * 9 + [False] * 2 + [True] * 50 + [False] * 5)
    second = np.array([False] * 9 + [True] * 2 + [True] * 50 + [False] * 5)
    found = mcnemar(first, second)
    tail = sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11
    assert (found.only_first, found.only_second) == (9, 2)
    assert found.p_value == pytest.approx(2 * tail)
    assert mcnemar(first, first).p_value == 1.0


def test_calibration_by_hand():
    confidence = np.array([0.05, 0.15, 0.95, 0.95, 1.0], np.float32)
    correct = np.array([False, True, True, False, True])
    bins, error = calibration(confidence, correct, bins=10)
    assert [b.images for b in bins] == [1, 1, 3]
    assert bins[2].confidence == pytest.approx(2.9 / 3)
    assert bins[2].accuracy == pytest.approx(2 / 3)
    assert error == pytest.approx((0.05 + 0.85 + 0.9) / 5)


def test_a_network_as_sure_as_it_is_right_has_no_calibration_error():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    _, error = calibration(confidence, rng.random(200_000) < confidence)
    assert error < 0.01


# ---------------------------------------------------------------------------------- pictures

LABELS = [0, 0, 1, 1, 2, 2, 0, 1]
ANSWERS = [0, 1, 1, 2, 0, 2, 1, 1]
SURENESS = [9, 2, 9, 5, 3, 9, 4, 1]  # of the answers, as logits


def result(numbers: range = range(8)) -> Predictions:
    """Eight images, four wrong answers; the surest of these to images 3, 6, 4, 1."""
    scores = torch.zeros(8, 3)
    scores[torch.arange(8), torch.tensor(ANSWERS)] = torch.tensor(SURENESS).float()
    collector = Collector()
    sizes = np.ones((8, 2), np.int32)
    collector.add(Scored(scores, torch.tensor(LABELS), list(numbers), sizes))
    return collector.predictions()[0]


@pytest.fixture
def on_axes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """Things that figures put on axes: images, texts within and titles."""
    seen = {"imshow": [], "text": [], "set_title": []}
    for method, calls in seen.items():
        own = getattr(Axes, method)

        def note(self, *arguments, own=own, calls=calls, **options):
            calls.append(arguments)
            return own(self, *arguments, **options)

        monkeypatch.setattr(Axes, method, note)
    return seen


def test_the_confusion_matrix_counts_what_is_taken_for_what(on_axes):
    pixels = figures.confusion_matrix(result(), ["x", "y", "z"])
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    expected = np.zeros((3, 3))
    np.add.at(expected, (LABELS, ANSWERS), 1)
    ((shares,),) = on_axes["imshow"]
    assert shares == pytest.approx(expected / expected.sum(1, keepdims=True))
    numbers = {(row, column): int(text) for column, row, text in on_axes["text"]}
    assert numbers == {(r, c): expected[r, c] for r, c in np.argwhere(expected)}


def test_the_surest_wrong_answers_come_first():
    assert figures.most_confident_mistakes(result()) == [3, 6, 4, 1]
    assert figures.most_confident_mistakes(result(range(10, 18)), 2) == [13, 16]


def test_a_mistake_is_shown_with_its_classes_and_probability(on_axes):
    found = result(range(10, 18))
    probability = np.exp(5) / (np.exp(5) + 2)
    picture = np.full((75, 75, 3), 7, np.uint8)
    figures.mistakes(found, {13: picture}, ["x", "y", "z"])
    assert on_axes["set_title"] == [(f"y\n→ z ({100 * probability:.0f} %)",)]
    assert on_axes["imshow"] == [(picture,)]


def test_any_name_can_be_drawn():
    names = ["$broken", "caf\udce9 日本", "a" * 300]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = figures.confusion_matrix(result(), names)
        grid = figures.mistakes(result(), {3: np.zeros((75, 75, 3), np.uint8)}, names)
    assert matrix.std() > 0 and grid.std() > 0


@pytest.fixture
def project(tmp_path: Path) -> tuple[config.Config, Source]:
    path = programs.write_project(tmp_path)
    cfg = config_file.load(path)
    return cfg, sources.open_source(cfg.data.val)


def test_a_picture_is_what_an_evaluation_sees_and_one_that_cannot_be_read_is_left_out(project):
    cfg, source = project
    before = next(
        iter(input_pipeline.evaluation_batches(cfg.data, source, range(12), 12, Workers(0), ALONE))
    ).images
    Path(source.name(6)).write_bytes(b"no image")
    found = input_pipeline.pictures(cfg.data, source, [3, 6, 4])
    assert list(found) == [3, 4]
    for index, pixels in found.items():
        assert np.array_equal(((before[index] + 1) * 127.5).round().byte().permute(1, 2, 0), pixels)


def shown(project: tuple[config.Config, Source], folder: Path) -> EventAccumulator:
    """TensorBoard's events of a result that is shown at step 6."""
    cfg, source = project
    log = Logbook(folder, step=0, total_steps=6)
    evaluation.draw(cfg, result(), source, log, 6)
    log.close()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_gets_both_figures_at_the_runs_last_step(project, tmp_path):
    events = shown(project, tmp_path)
    for tag in ("confusion matrix", "most confident mistakes"):
        (image,) = events.Images(tag)
        assert image.step == 6 and image.encoded_image_string.startswith(b"\x89PNG")


def test_many_classes_have_no_confusion_matrix_and_no_mistakes_no_pictures(
    project, tmp_path, monkeypatch
):
    monkeypatch.setattr(figures, "MOST_CLASSES", 2)
    monkeypatch.setattr(figures, "most_confident_mistakes", lambda _: [])
    assert shown(project, tmp_path).Tags()["images"] == []
