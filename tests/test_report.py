"""The pages that report on training runs and evaluations: in a browser, against other counts."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
from browser import WIDTHS, assert_shown, cells, opened
from calling import call
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score
from written_runs import eval_line, train_line, write_run

from irv2 import result_files
from irv2.report import evaluations, page, plots
from irv2.report.evaluations import Content
from irv2.report.markdown import replace_section
from irv2.report.statistics import wilson
from irv2.report.thumbnails import thumbnail
from irv2.training.metrics import Collector, Scored
from scripts import report

EXAMPLE = programs.ROOT / "docs" / "results" / "fashion_mnist"
OF_ONE = ["README.md", "config.yaml", "curves.png", "index.html", "log.jsonl", "validate.json"]
SECTIONS = ["headline", "facts", "classes", "pairs", "mistakes", "calibration", "sizes"]
IMAGES, CLASSES, EMPTY = 420, 8, 5
HOSTILE = "<script>alert(1)</script>"
LOG = [
    {"kind": "train", "step": 1, "epoch": 0.5, "loss": None, "lr": 0.1, "images_per_s": 9.0},
    {"kind": "train", "step": 2, "epoch": 1.0, "loss": 1.0, "lr": 0.1, "images_per_s": 9.5},
    {"kind": "eval", "step": 2, "epoch": 1.0, "weights": "ema", "top1": 60.0, "top5": 99.0},
]


# ---------------------------------------------------------------------------------- evaluations


def made(scores: torch.Tensor, labels: torch.Tensor) -> Content:
    """An evaluation of these scores; image 7 i shows a shade of grey of its own."""
    collector = Collector()
    sizes = np.random.default_rng(0).integers(100, 500, (len(labels), 2), np.int32)
    collector.add(Scored(scores, labels, [7 * i for i in range(len(labels))], sizes))
    (predictions,) = collector.predictions()
    classes = [f"n{i:02}" for i in range(scores.shape[1])]
    names = [HOSTILE, "猫 & ÿ", "x" * 200, *classes[3:]][: len(classes)]
    return Content(
        title="<b>a run</b>, step 2",
        facts=[("weights", f"{HOSTILE}.safetensors"), ("images", "of a test")],
        predictions=predictions,
        classes=classes,
        names=names,
        image_name=lambda index: f"folder/caf\udce9-{index}.png",
        thumbnail=lambda index: Image.new("L", (300, 200), index % 256),
        log=LOG,
    )


def resized(subject: Content, size: np.ndarray) -> Content:
    """The same evaluation of images of other sizes."""
    return replace(subject, predictions=replace(subject.predictions, size=size))


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
    evaluations.write(folder, made(scores, labels))
    return folder


@pytest.fixture
def shown(chromium, written) -> Iterator:
    """The evaluation's page, opened."""
    with opened(chromium, written / "index.html", 1280) as opened_page:
        yield opened_page


def test_names_cannot_write_into_a_page(written):
    html = (written / "index.html").read_text("utf-8")
    assert HOSTILE not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_confusions_share_is_one_of_the_true_classs_images(scores, labels):
    page_of = made(scores, labels)
    matrix = confusion_matrix(labels, scores.argmax(1), labels=range(CLASSES))
    pairs = evaluations.confused_pairs(page_of)
    assert len(pairs) == evaluations.PAIRS
    for pair in pairs:
        true, predicted = page_of.names.index(pair.true), page_of.names.index(pair.predicted)
        assert pair.images == matrix[true, predicted]
        assert pair.share == pytest.approx(100 * pair.images / matrix[true].sum())


@pytest.mark.parametrize("width", WIDTHS)
def test_every_section_is_shown_without_a_network(chromium, written, width):
    with opened(chromium, written / "index.html", width) as shown:
        assert_shown(shown, [*SECTIONS, "matrix", "training"])
        assert shown.title() == "<b>a run</b>, step 2"
        loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
        assert shown.eval_on_selector_all("img", loaded)
        assert shown.locator("#mistakes img").count() == evaluations.MISTAKES
        assert shown.locator("#training svg").count() == 4
        assert HOSTILE in shown.locator("#facts").inner_text()
    html = (written / "index.html").read_text("utf-8")
    assert HOSTILE not in html and "http://www.w3.org" not in html.partition("<svg")[0]


def test_figures_are_those_of_scikit_learn(shown, scores, labels):
    answers = scores.argmax(1).numpy()
    matrix = confusion_matrix(labels, answers, labels=range(CLASSES))
    right = int(np.trace(matrix))
    low, high = wilson(right, IMAGES)
    mean = 100 * recall_score(labels, answers, average=None, labels=np.unique(labels)).mean()
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


def test_headers_sort(shown):
    first = cells(shown, "#per-class")
    keys = {0: lambda row: row[0], 2: lambda row: int(row[2]), 3: lambda row: int(row[3])}
    for column, key in keys.items():
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


def test_the_most_confident_mistakes_come_first(shown, scores, labels):
    softmax = torch.softmax(scores.double(), 1)
    sure, answers = softmax.max(1)
    mistakes = torch.where(answers != labels, sure, -1).argsort(descending=True)[:24].tolist()
    captions = shown.locator("#mistakes figcaption").all_inner_texts()
    for caption, image in zip(captions, mistakes):
        said, true, name = caption.replace("\xa0", " ").splitlines()
        assert said.endswith(f", {100 * sure[image]:.1f} %")
        assert true.endswith(f", {100 * softmax[image, labels[image]]:.1f} %")
        assert name.endswith(f"-{7 * image}.png")


def test_calibration_and_sizes(scores, labels):
    subject = made(scores, labels)
    sure, correct = evaluations.confidence(subject.predictions), scores.argmax(1) == labels
    edges = np.digitize(sure, np.linspace(0, 1, 16)[1:-1])
    gaps = [(edges == k, sure[edges == k].mean()) for k in np.unique(edges)]
    error = sum(m.sum() * abs(correct.numpy()[m].mean() - mean) for m, mean in gaps) / IMAGES
    assert evaluations.calibrated(subject.predictions).error == pytest.approx(100 * error)

    rows = evaluations.size_rows(subject)
    shorter = subject.predictions.size.min(1)
    assert len(rows) == evaluations.SIZE_BINS and rows[0].low == shorter.min()
    for row in rows:
        mine = (shorter >= row.low) & (shorter <= row.high)
        assert row.top1 == (int(correct.numpy()[mine].sum()), int(mine.sum()))
    assert sum(row.top1.images for row in rows) == IMAGES
    two = resized(subject, np.array([[60, 40], [30, 50]] * (IMAGES // 2), np.int32))
    bounds = [(row.low, row.high, row.top1.images) for row in evaluations.size_rows(two)]
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
    counts = torch.bincount(labels, minlength=CLASSES).tolist()
    assert [line["images"] for line in table] == list(map(str, counts))
    assert table[EMPTY]["top1"] == ""


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "\nx", "\uff1dx"])
def test_no_name_is_a_formula_in_a_table(name, scores, labels):
    subject = made(scores, labels)
    names = [name] * CLASSES
    subject = replace(subject, classes=names, names=names, image_name=lambda _: name)
    table = evaluations.per_class_csv(evaluations.class_rows(subject))
    for line in csv.DictReader(io.StringIO(table, newline="")):
        assert {line["class"], line["name"]} == {f"'{name}"}
        assert line["mistaken_for"] in ("", f"'{name}")
    for line in csv.DictReader(io.StringIO(evaluations.predictions_csv(subject), newline="")):
        assert {line[key] for key in ("image", "label", "class_1", "class_5")} == {f"'{name}"}


@pytest.mark.slow
def test_the_same_evaluation_gives_the_same_bytes(written, scores, labels, tmp_path):
    evaluations.write(tmp_path, made(scores, labels))
    for name in ("index.html", "per_class.csv", "predictions.csv.gz"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("width", WIDTHS)
def test_two_classes_and_not_one_mistake(chromium, tmp_path, width):
    labels = torch.arange(40) % 2
    subject = made(20.0 * torch.nn.functional.one_hot(labels).float(), labels)
    subject = replace(subject, log=[], names=subject.classes)
    subject = resized(subject, np.full((40, 2), [30, 20]))
    evaluations.write(tmp_path, subject)
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
    evaluations.write(tmp_path, subject)
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
    evaluations.write(tmp_path, subject)
    with opened(chromium, tmp_path / "index.html", 390) as shown:
        picture = shown.locator("#mistakes img").first
        assert picture.evaluate("e => [e.naturalWidth, e.clientWidth]") == [8, 112]
        assert picture.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "index.html").mkdir()
    with pytest.raises(OSError):
        page.write(tmp_path / "index.html", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_a_picture_is_scaled_down_as_a_whole():
    picture = thumbnail(Image.new("L", (300, 200)), "a/b.png")
    content = base64.b64decode(picture.source.partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (112, 75)
    assert (picture.name, picture.is_tiny) == ("b.png", False)


def test_a_diagram_takes_the_pages_colours_and_its_text_stays_text():
    drawn = plots.inline_svg(lambda axes: axes.set(xlabel="epoch"), "a diagram")
    assert "var(--ink)" in drawn and plots.INK not in drawn
    assert ">epoch</text>" in drawn


def test_the_log_of_a_run_is_found_beside_its_weights(tmp_path):
    line = {"kind": "train", **train_line(1)}
    (tmp_path / "log.jsonl").write_text(json.dumps(line))
    within = tmp_path / "checkpoints" / "step-000000001"
    for place in (tmp_path / "best.safetensors", within):
        assert [line["step"] for line in result_files.log_beside(str(place))] == [1]
    assert result_files.log_beside(str(within / "deeper" / "a.pth")) == []


def test_what_is_less_than_everything_is_not_rounded_up_to_it():
    assert [page.percent(x, 2) for x in (100.0, 99.999, 0.001, 98.611)] == [
        *("100.00", "99.99", "0.00", "98.61")
    ]


def test_report_does_without_torch():
    code = "import sys, irv2.report.evaluations, irv2.report.runs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=programs.ROOT, check=True)


# ---------------------------------------------------------------------------------- runs


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A run of 6 steps, evaluated after each second one."""
    lines = [train_line(step, data_wait=0.25) for step in range(1, 7)]
    for step in (2, 4, 6):
        lines += [eval_line(step, "ema", 90.0 - step), eval_line(step, "raw", 20.0)]
    config = {"run": {"name": "study <b>"}, "optim": {"lr": 0.045, "eps": 1.0}}
    return write_run(tmp_path / "study", lines, config)


def rows_of(summary: str) -> dict[str, str]:
    """A run's summary, by the first word of its lines."""
    return dict(line.split(maxsplit=1) for line in summary.splitlines())


@pytest.mark.slow
def test_a_run_is_summed_up_and_drawn(study, tmp_path):
    (study / "validate.json").write_text(json.dumps(eval_line(2, "ema", 1.0)))
    out = tmp_path / "out"
    done = programs.run("scripts/report.py", study, "--out", out, as_user=True)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert rows["top-1"] == "84.00 %"  # averaged, of the last step, not of the older validate.json
    assert rows["pace"] == "40 images/s (median), 25% of the time on data"
    assert rows["time"].startswith("0 min 1 s")
    page = (out / "README.md").read_text()
    assert page.startswith(r"# study \<b\>") and "| 1.50 | ema | 84.00 |" in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == OF_ONE
    for name in ("log.jsonl", "config.yaml", "validate.json"):
        assert (out / name).read_bytes() == (study / name).read_bytes()


def test_what_validate_measured_of_the_last_step_counts(study):
    result = {"top1": 50.0, "top5": 75.0, "images": 40, "weights": "ema", "step": 6}
    (study / "validate.json").write_text(json.dumps(result))
    rows = rows_of(call(report, study).out)
    assert rows["top-1"] == "50.00 %" and rows["evaluated"].startswith("40 images")
    (study / "validate.json").write_text('{"top1": 50.0, "step": 6}')
    rows = rows_of(call(report, study).out)
    assert (rows["top-1"], rows["top-5"], rows["evaluated"]) == ("50.00 %", "\u2013", "\u2013")


def test_what_validate_measured_of_an_earlier_step_does_not_count(study):
    result = {"top1": 50.0, "top5": 75.0, "images": 40, "weights": "ema", "step": 4}
    (study / "validate.json").write_text(json.dumps(result))
    rows = rows_of(call(report, study).out)
    assert rows["top-1"] == "84.00 %" and rows["evaluated"].startswith("50 images")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_run_that_an_older_version_made(chromium, tmp_path, width):
    status, _, stderr = call(report, EXAMPLE, "--out", tmp_path)
    assert status == 0, stderr
    low, high = wilson(9008, 10_000)
    with opened(chromium, tmp_path / "index.html", width) as shown:
        assert_shown(shown, ["headline", "curves", "results"])
        assert "90.08 %" in shown.locator("#headline").inner_text()
        assert f"{low:.2f} \u2013 {high:.2f}" in shown.locator("#results").inner_text()
        assert shown.locator("#curves svg").count() == 4
        assert shown.locator("#differences").count() == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_runs_stand_side_by_side(chromium, study, tmp_path, width):
    config = {"run": {"name": "other"}, "optim": {"lr": 0.1, "eps": 1.0}, "ema": {"decay": 0.9}}
    other = write_run(tmp_path / "other", [train_line(1), train_line(2, loss=None)], config)
    out = tmp_path / "out"
    status, stdout, stderr = call(report, study, other, "--out", out)
    assert status == 0, stderr
    assert stdout.count("trained ") == 2 and "no evaluation yet" in stdout
    assert [path.name for path in out.iterdir()] == ["index.html"]
    with opened(chromium, out / "index.html", width) as shown:
        assert_shown(shown, ["headline", "curves", "results", "differences"])
        assert cells(shown, "#differences") == [
            ["run.name", "study <b>", "other"],
            ["optim.lr", "0.045", "0.1"],
            ["ema.decay", "\u2013", "0.9"],
        ]
        results = cells(shown, "#results")
        assert [row[0] for row in results] == ["study <b>", "other"]
        assert results[0][1] == "84.00 %" and results[1][1] == "\u2013"
        assert [row[4:6] for row in results] == [["1.5", "6"], ["0.5", "2"]]
        # A line for each run, in its own colour.
        colours = shown.eval_on_selector_all(
            "#curves .legend .swatch", "all => all.map(e => getComputedStyle(e).backgroundColor)"
        )
        drawn = shown.eval_on_selector_all(
            "#curves svg:first-of-type path", "all => all.map(e => getComputedStyle(e).stroke)"
        )
        assert len(set(colours)) == 2 and set(colours) <= set(drawn)


def test_runs_of_one_name_are_told_apart_by_their_folders(study, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(study, twin)
    assert call(report, study, twin, "--out", tmp_path / "out")[0] == 0
    html = (tmp_path / "out" / "index.html").read_text()
    assert str(twin) in html and "Nothing: every key has the same value." in html


def test_a_run_that_is_still_training_has_curves(tmp_path):
    run = write_run(tmp_path / "run", [train_line(1), {"kind": "bad_step", "step": 2}], {})
    status, stdout, stderr = call(report, run, "--out", tmp_path / "out")
    assert status == 0, stderr
    rows = rows_of(stdout)
    assert rows["evaluated"] == "no evaluation yet" and "top-1" not in rows
    assert "no evaluation yet" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / "README.md").read_text().startswith("# run\n")


def test_the_page_may_be_written_into_the_run_itself(study):
    log = (study / "log.jsonl").read_bytes()
    assert call(report, study, "--out", study)[0] == 0
    assert (study / "log.jsonl").read_bytes() == log and (study / "index.html").exists()


@pytest.mark.parametrize("name", ["nothing", "config.yaml", "validate.json"])
def test_what_is_no_run_is_one_line(study, tmp_path, name):
    if name == "nothing":
        (study / "log.jsonl").unlink()
    else:
        (study / name).write_text("[a, {b: \n - c")
    status, stdout, stderr = call(report, EXAMPLE, study, "--out", tmp_path / "out")
    assert status == 1 and stderr.count("\n") == 1, stderr
    assert str(study) in stderr and stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "run: text"),
        ("config.yaml", "run: {name: &a [*a]}"),
        ("config.yaml", "a: " + "[" * 100_000),
        ("config.yaml", "a" * 40_000),
        ("validate.json", '{"top1": "high"}'),
        ("validate.json", '{"top1": 101}'),
        ("validate.json", '{"step": 6, "top1": 50, "images": true}'),
        ("validate.json", '{"step": 6, "top1": 50, "images": 2, "top1_correct": 3}'),
        ("validate.json", '{"a": ' * 5000),
        ("validate.json", "[" + "1" * 5000 + "]"),
    ],
)
def test_a_file_of_wrong_values_is_named_in_a_line(study, file, content):
    (study / file).write_text(content)
    status, _, stderr = call(report, study)
    assert status == 1 and stderr.count("\n") == 1, stderr
    assert f"{study / file}: cannot be read (" in stderr


@pytest.mark.parametrize(
    "odd",
    [
        {"loss": None, "lr": None, "images_per_s": None},
        {"images_per_s": 1e-300},
        {"images_per_s": 0.0},
        {"data_wait": None},
        {"loss": 3e38, "lr": 3e38, "grad_norm": 3e38, "images_per_s": 3e38, "epoch": 3e38},
        {"step": 2**62, "images_seen": 2**62},
    ],
)
def test_odd_numbers_of_a_log_are_summed_up_and_drawn(tmp_path, odd):
    lines = [train_line(1), {**train_line(2), **odd}]
    lines += [eval_line(2, "ema", 0.0, loss=None, images=0), eval_line(2, "raw", 100.0, top5=0)]
    run = write_run(tmp_path / "run", lines, {})
    status, _, stderr = call(report, run, "--out", tmp_path / "out")
    assert (status, stderr) == (0, "")


def test_names_are_shown_as_they_are_and_write_nothing_into_a_readme(tmp_path):
    name = "a|b # [x](http://h) `c` <b> *d*"
    lines = [train_line(1), eval_line(1, "|ema|", 50.0)]
    run = write_run(tmp_path / "run ``x\n", lines, {"run": {"name": name}})
    status, out, stderr = call(report, run, "--out", tmp_path / "out")
    assert (status, stderr) == (0, "")
    page = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert page[0] == r"# a\|b \# \[x\](http://h) \`c\` \<b\> \*d\*"
    assert page[2].startswith("Made by ``` python scripts/report.py '") and r"``x\n" in page[2]
    assert r"| 0.25 | \|ema\| | 50.00 | 100.00 | 0.5000 | 50 |" in page
    assert r"run ``x\n" in out


# ---------------------------------------------------------------------------------- the docs


def test_only_the_named_section_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    around = "top\n<!-- a: begin -->\n{}\n<!-- a: end -->\n<!-- b: begin -->\n<!-- b: end -->"
    page.write_text(around.format("old"))
    for text in ("new\n", "newer"):
        replace_section(page, "a", text)
    assert page.read_text() == around.format("newer")
    with pytest.raises(ValueError, match="no section 'c'"):
        replace_section(page, "c", "lost")
    assert page.read_text() == around.format("newer")
