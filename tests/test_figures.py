"""Pictures of a result, and that one which cannot be read costs only itself."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import feed
import train
from data import sources
from irv2 import config, figures
from irv2.distributed import World
from irv2.logbook import Logbook
from irv2.metrics import Collector, Predictions, Scored

ALONE = World(0, 1, torch.device("cpu"))
LABELS = [0, 0, 1, 1, 2, 2, 0, 1]
ANSWERS = [0, 1, 1, 2, 0, 2, 1, 1]
SURENESS = [9, 2, 9, 5, 3, 9, 4, 1]  # of the answers, as logits


def result(numbers: range = range(8)) -> Predictions:
    """Of eight images, four wrong answers; of these the surest to images 3, 6, 4, 1."""
    scores = torch.zeros(8, 3)
    scores[torch.arange(8), torch.tensor(ANSWERS)] = torch.tensor(SURENESS).float()
    collector = Collector()
    collector.add(Scored(scores, torch.tensor(LABELS), list(numbers)))
    return collector.predictions()[0]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """What figures put on axes: images, texts within and titles."""
    seen = {"imshow": [], "text": [], "set_title": []}
    for method, calls in seen.items():
        own = getattr(Axes, method)

        def note(self, *arguments, own=own, calls=calls, **options):
            calls.append(arguments)
            return own(self, *arguments, **options)

        monkeypatch.setattr(Axes, method, note)
    return seen


def test_the_confusion_matrix_counts_what_is_taken_for_what(drawn):
    pixels = figures.confusion_matrix(result(), ["x", "y", "z"])
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    expected = np.zeros((3, 3))
    np.add.at(expected, (LABELS, ANSWERS), 1)
    ((shares,),) = drawn["imshow"]
    assert shares == pytest.approx(expected / expected.sum(1, keepdims=True))
    numbers = {(row, column): int(text) for column, row, text in drawn["text"]}
    assert numbers == {(r, c): expected[r, c] for r, c in np.argwhere(expected)}


def test_the_surest_wrong_answers_come_first():
    assert figures.most_confident_mistakes(result()) == [3, 6, 4, 1]
    assert figures.most_confident_mistakes(result(range(10, 18)), 2) == [13, 16]


def test_a_mistake_is_shown_with_its_classes_and_probability(drawn):
    found = result(range(10, 18))
    probability = np.exp(5) / (np.exp(5) + 2)
    picture = np.full((75, 75, 3), 7, np.uint8)
    figures.mistakes(found, {13: picture}, ["x", "y", "z"])
    assert drawn["set_title"] == [(f"y\n→ z ({100 * probability:.0f} %)",)]
    assert drawn["imshow"] == [(picture,)]


def test_any_name_can_be_drawn():
    names = ["$broken", "caf\udce9 日本", "a" * 300]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = figures.confusion_matrix(result(), names)
        grid = figures.mistakes(result(), {3: np.zeros((75, 75, 3), np.uint8)}, names)
    assert matrix.std() > 0 and grid.std() > 0


@pytest.fixture
def project(tmp_path: Path) -> tuple[config.Config, sources.Source]:
    path = programs.write_project(tmp_path)
    cfg = config.load(path)
    return cfg, sources.open_source(cfg.data.val)


def test_a_picture_is_what_an_evaluation_sees_and_one_that_cannot_be_read_is_left_out(project):
    cfg, source = project
    before = next(iter(feed.evaluation_batches(cfg, source, ALONE))).images
    Path(source.name(6)).write_bytes(b"no image")
    found = feed.pictures(cfg, source, [3, 6, 4])
    assert list(found) == [3, 4]
    for index, pixels in found.items():
        assert np.array_equal(((before[index] + 1) * 127.5).round().byte().permute(1, 2, 0), pixels)


def test_tensorboard_gets_both_figures_at_the_runs_last_step(project, tmp_path):
    cfg, source = project
    log = Logbook(tmp_path, step=0, total_steps=6)
    train.show_result(cfg, result(), source, 6, log)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag in ("confusion matrix", "most confident mistakes"):
        (image,) = events.Images(tag)
        assert image.step == 6 and image.encoded_image_string.startswith(b"\x89PNG")


def test_many_classes_have_no_confusion_matrix_and_no_mistakes_no_pictures(
    project, tmp_path, monkeypatch
):
    cfg, source = project
    monkeypatch.setattr(figures, "MOST_CLASSES", 2)
    monkeypatch.setattr(figures, "most_confident_mistakes", lambda _: [])
    log = Logbook(tmp_path, step=0, total_steps=6)
    train.show_result(cfg, result(), source, 6, log)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == []
