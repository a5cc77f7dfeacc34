"""The page of an evaluation, in a browser, against counts made otherwise."""

from __future__ import annotations

import csv
import gzip
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from browser import WIDTHS, assert_shown, opened
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score

from irv2.metrics import Collector, Scored
from irv2.statistics import wilson
from report import evaluation, page
from report.evaluation import Evaluation

SECTIONS = ["headline", "facts", "classes", "pairs", "mistakes", "calibration", "sizes"]
IMAGES, CLASSES, EMPTY = 420, 8, 5
HOSTILE = "<script>alert(1)</script>"
LOG = [
    {"kind": "train", "step": 1, "epoch": 0.5, "loss": None, "lr": 0.1, "images_per_s": 9.0},
    {"kind": "train", "step": 2, "epoch": 1.0, "loss": 1.0, "lr": 0.1, "images_per_s": 9.5},
    {"kind": "eval", "step": 2, "epoch": 1.0, "weights": "ema", "top1": 60.0, "top5": 99.0},
]


def made(scores: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """An evaluation of these scores; image 7 i shows a shade of grey of its own."""
    collector = Collector()
    collector.add(Scored(scores, labels, [7 * i for i in range(len(labels))]))
    (predictions,) = collector.predictions()
    rng = np.random.default_rng(0)
    classes = [f"n{i:02}" for i in range(scores.shape[1])]
    names = [HOSTILE, "猫 & ÿ", "x" * 200, *classes[3:]][: len(classes)]
    return Evaluation(
        title="<b>a run</b>, step 2",
        facts=[("weights", f"{HOSTILE}.safetensors"), ("images", "of a test")],
        predictions=predictions,
        classes=classes,
        names=names,
        image_name=lambda index: f"folder/caf\udce9-{index}.png",
        thumbnail=lambda index: Image.new("L", (300, 200), index % 256),
        sizes=rng.integers(100, 500, (len(labels), 2), np.int32),
        log=LOG,
    )


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, CLASSES, generator=generator) * 1.5


@pytest.fixture(scope="module")
def labels(scores) -> torch.Tensor:
    """Right about half the time; no image is of class `EMPTY`."""
    generator = torch.Generator().manual_seed(1)
    other = torch.randint(CLASSES, (IMAGES,), generator=generator)
    label = torch.where(torch.rand(IMAGES, generator=generator) < 0.5, scores.argmax(1), other)
    return torch.where(label == EMPTY, (label + 1) % CLASSES, label)


@pytest.fixture(scope="module")
def written(scores, labels, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "not" / "there yet"
    evaluation.write(folder, made(scores, labels))
    return folder


def cells(opened_page, table: str) -> list[list[str]]:
    """Text of a table's body, row by row."""
    return opened_page.eval_on_selector_all(
        f"{table} tbody tr",
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))",
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_every_section_is_shown_without_a_network(chromium, written, width):
    with opened(chromium, written / "index.html", width) as shown:
        assert_shown(shown, [*SECTIONS, "matrix", "training"])
        assert shown.title() == "<b>a run</b>, step 2"
        loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
        assert shown.eval_on_selector_all("img", loaded)
        assert shown.locator("#mistakes img").count() == evaluation.MISTAKES
        assert shown.locator("#training svg").count() == 4
        assert HOSTILE in shown.locator("#facts").inner_text()
    html = (written / "index.html").read_text("utf-8")
    assert HOSTILE not in html and "http://www.w3.org" not in html.partition("<svg")[0]


def test_figures_are_those_of_scikit_learn(chromium, written, scores, labels):
    answers = scores.argmax(1).numpy()
    matrix = confusion_matrix(labels, answers, labels=range(CLASSES))
    right = int(np.trace(matrix))
    low, high = wilson(right, IMAGES)
    mean = 100 * recall_score(labels, answers, average=None, labels=np.unique(labels)).mean()
    with opened(chromium, written / "index.html", 1280) as shown:
        headline = shown.locator("#headline").inner_text()
        for text in (
            f"{100 * right / IMAGES:.2f} %",
            f"{low:.2f} \u2013 {high:.2f}",
            f"{right} of {IMAGES} images",
            f"{mean:.2f} %",
            f"over {CLASSES - 1} classes",
        ):
            assert text in headline.replace("\xa0", " ")
        found = [row[1:] for row in cells(shown, ".matrix")]
        assert np.array_equal(np.array(found, int), matrix)
        pairs = cells(shown, "#pairs table")
        classes = {row[0]: row for row in cells(shown, "#per-class")}
    wrong = matrix - np.diag(np.diag(matrix))
    assert [int(row[1]) for row in pairs] == sorted(wrong.ravel().tolist())[:-11:-1]
    commonest = int(wrong.max())
    true, _ = np.argwhere(wrong == commonest)[0]
    assert float(pairs[0][2]) == pytest.approx(100 * commonest / matrix[true].sum(), abs=0.051)
    for number in set(range(CLASSES)) - {EMPTY}:
        row, images = classes[f"n{number:02}"], matrix[number].sum()
        assert row[2:4] == [str(images), str(matrix[number, number])]
        assert float(row[4]) == pytest.approx(100 * matrix[number, number] / images, abs=0.051)
        assert f"({wrong[number].max()})" in row[8]
    assert classes[f"n{EMPTY:02}"][2:5] == ["0", "0", "\u2013"]


def test_headers_sort(chromium, written):
    with opened(chromium, written / "index.html", 1280) as shown:
        first = cells(shown, "#per-class")
        for column, key in (
            (0, lambda row: row[0]),
            (2, lambda row: int(row[2])),
            (3, lambda row: int(row[3])),
        ):
            header = shown.locator("#per-class th").nth(column)
            header.locator("button").click()
            assert header.get_attribute("aria-sort") == "ascending"
            assert cells(shown, "#per-class") == sorted(first, key=key)
            header.locator("button").press("Enter")
            assert header.get_attribute("aria-sort") == "descending"
            assert cells(shown, "#per-class") == sorted(first, key=key, reverse=True)
            assert shown.locator("#per-class th[aria-sort]").count() == 1
        header = shown.locator("#per-class th").nth(4)
        for reverse in (False, True):  # what has no figure stays last
            header.locator("button").click()
            shares = [row[4] for row in cells(shown, "#per-class")]
            known = [float(text) for text in shares[:-1]]
            assert shares[-1] == "\u2013" and known == sorted(known, reverse=reverse)


def test_the_most_confident_mistakes_come_first(chromium, written, scores, labels):
    softmax = torch.softmax(scores.double(), 1)
    sure, answers = softmax.max(1)
    mistakes = torch.where(answers != labels, sure, -1).argsort(descending=True)[:24].tolist()
    with opened(chromium, written / "index.html", 1280) as shown:
        captions = shown.locator("#mistakes figcaption").all_inner_texts()
    for caption, image in zip(captions, mistakes):
        said, true, name = caption.replace("\xa0", " ").splitlines()
        assert said.endswith(f", {100 * sure[image]:.1f} %")
        assert true.endswith(f", {100 * softmax[image, labels[image]]:.1f} %")
        assert name.endswith(f"-{7 * image}.png")


def test_calibration_and_sizes(scores, labels):
    subject = made(scores, labels)
    sure, correct = evaluation.confidence(subject.predictions), scores.argmax(1) == labels
    edges = np.digitize(sure, np.linspace(0, 1, 16)[1:-1])
    gaps = [(edges == k, sure[edges == k].mean()) for k in np.unique(edges)]
    error = sum(m.sum() * abs(correct.numpy()[m].mean() - mean) for m, mean in gaps) / IMAGES
    assert evaluation.calibrated(subject.predictions).error == pytest.approx(100 * error)

    rows = evaluation.size_rows(subject)
    shorter = subject.sizes.min(1)
    assert len(rows) == evaluation.SIZE_BINS and rows[0].low == shorter.min()
    for row in rows:
        mine = (shorter >= row.low) & (shorter <= row.high)
        assert row.top1 == (int(correct.numpy()[mine].sum()), int(mine.sum()))
    assert sum(row.top1.images for row in rows) == IMAGES
    two = replace(subject, sizes=np.array([[60, 40], [30, 50]] * (IMAGES // 2), np.int32))
    bounds = [(row.low, row.high, row.top1.images) for row in evaluation.size_rows(two)]
    assert bounds == [(30, 30, IMAGES // 2), (40, 40, IMAGES // 2)]


def test_tables_beside_the_page(written, scores, labels):
    packed = (written / "predictions.csv.gz").read_bytes()
    lines = list(csv.DictReader(io.StringIO(gzip.decompress(packed).decode("utf-8"))))
    assert len(lines) == IMAGES
    softmax = torch.softmax(scores, 1)
    for row, line in enumerate(lines):
        assert line["image"] == f"folder/caf\\udce9-{7 * row}.png"
        assert line["label"] == f"n{labels[row]:02}"
        assert int(line["correct"]) == int(scores[row].argmax() == labels[row])
        top = softmax[row].topk(5)
        assert [line[f"class_{k}"] for k in range(1, 6)] == [f"n{i:02}" for i in top.indices]
        shares = [float(line[f"probability_{k}"]) for k in range(1, 6)]
        assert shares == pytest.approx(top.values.tolist(), rel=1e-4)
    table = list(csv.DictReader(io.StringIO((written / "per_class.csv").read_text("utf-8"))))
    assert [line["class"] for line in table] == [f"n{i:02}" for i in range(CLASSES)]
    assert [line["images"] for line in table] == [
        str(int((labels == i).sum())) for i in range(CLASSES)
    ]
    assert table[EMPTY]["top1"] == ""


def test_the_same_evaluation_gives_the_same_bytes(written, scores, labels, tmp_path):
    evaluation.write(tmp_path, made(scores, labels))
    for name in ("index.html", "per_class.csv", "predictions.csv.gz"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("width", WIDTHS)
def test_two_classes_and_not_one_mistake(chromium, tmp_path, width):
    labels = torch.arange(40) % 2
    subject = made(20.0 * torch.nn.functional.one_hot(labels).float(), labels)
    subject = replace(subject, log=[], names=subject.classes, sizes=np.full((40, 2), [30, 20]))
    evaluation.write(tmp_path, subject)
    with opened(chromium, tmp_path / "index.html", width) as shown:
        assert_shown(shown, [*SECTIONS, "matrix"])
        assert "There are none" in shown.locator("#mistakes").inner_text()
        assert "All images are 30 \u00d7 20 px" in shown.locator("#sizes").inner_text()
        assert "With 2 classes" in shown.locator("#headline").inner_text()
        assert shown.locator("#training").count() == 0
        head = shown.locator("#per-class thead").inner_text()
        assert "name" not in head


def test_a_thousand_classes(chromium, tmp_path):
    generator = torch.Generator().manual_seed(0)
    subject = made(torch.randn(3000, 1000, generator=generator), torch.arange(3000) % 1000)
    evaluation.write(tmp_path, subject)
    assert (tmp_path / "index.html").stat().st_size < 1_000_000
    with opened(chromium, tmp_path / "index.html", 390) as shown:
        assert_shown(shown, SECTIONS)
        assert shown.locator("#matrix").count() == 0
        rows = cells(shown, "#per-class")
        shown.locator("#per-class th button").first.click()
        assert cells(shown, "#per-class") == sorted(rows, key=lambda row: row[0])
        assert len(rows) == 1000


def test_tiny_pictures_are_enlarged_pixel_by_pixel(chromium, scores, labels, tmp_path):
    subject = replace(made(scores, labels), thumbnail=lambda index: Image.new("L", (8, 8), 9))
    evaluation.write(tmp_path, subject)
    with opened(chromium, tmp_path / "index.html", 390) as shown:
        picture = shown.locator("#mistakes img").first
        assert picture.evaluate("e => [e.naturalWidth, e.clientWidth]") == [8, 112]
        assert picture.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "index.html").mkdir()
    with pytest.raises(OSError):
        page.write(tmp_path / "index.html", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_what_is_less_than_everything_is_not_rounded_up_to_it():
    assert [page.percent(x, 2) for x in (100.0, 99.999, 0.001, 98.611)] == [
        *("100.00", "99.99", "0.00", "98.61")
    ]


def test_report_does_without_torch():
    code = "import sys, report.evaluation, report.run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=programs.ROOT, check=True)
