"""Several seeds: mean and spread, two configs on the same images, and the runs themselves."""

from __future__ import annotations

import gzip
import math
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import yaml
from browser import WIDTHS, assert_shown, cells, opened
from calling import call

from irv2 import config_file
from irv2.report import seeds
from irv2.report.seeds import Answers, Seeds, SeedsError
from irv2.report.statistics import bootstrap_difference
from scripts import seeds as program

CONFIG = "data: {train: 'synthetic:8x2', val: 'synthetic:4x2'}\n"
IMAGES = [f"{i}.png" for i in range(200)]


def answers(share: float, seed: int) -> Answers:
    return Answers(IMAGES, np.random.default_rng(seed).random(len(IMAGES)) < share)


def write(folder: Path, of: Answers) -> None:
    """Write what validate.py --report writes of each image, as far as it is read."""
    folder.mkdir(parents=True)
    lines = ["image,label,correct", *(f"{i},a,{int(c)}" for i, c in zip(of.images, of.correct))]
    (folder / seeds.PREDICTIONS).write_bytes(gzip.compress("\n".join(lines).encode()))


@pytest.fixture
def two() -> list[Seeds]:
    """Two configs of three seeds, the second better by 20 points or so."""
    return [Seeds(n, {s: answers(p, 10 * k + s) for s in range(3)})
            for k, (n, p) in enumerate((("plain", 0.6), ("better", 0.8)))]  # fmt: skip


def test_the_spread_is_that_of_one_run(two):
    top1 = two[0].top1
    assert (two[0].mean, two[0].deviation) == (statistics.mean(top1), statistics.stdev(top1))
    assert two[0].deviation == pytest.approx(np.std(top1, ddof=1))
    assert f"{two[0].mean:.2f} ± {two[0].deviation:.2f} % (3 seeds" in seeds.spread(two[0])
    alone = Seeds("one", {0: answers(0.5, 0)})
    assert math.isnan(alone.deviation) and "±" not in seeds.spread(alone)


def test_each_pair_is_a_sign_test_of_the_images_that_differ(two):
    compared = seeds.compare(*two)
    for seed, pair in compared.pairs.items():
        first, second = (each.answers[seed].correct for each in two)
        assert (pair.only_first, pair.only_second) == (
            (first & ~second).sum(),
            (second & ~first).sum(),
        )
        n, k = pair.only_first + pair.only_second, min(pair.only_first, pair.only_second)
        closed = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
        assert pair.p_value == pytest.approx(closed, rel=1e-9)
        assert pair.p_value == pytest.approx(scipy.stats.binomtest(k, n).pvalue, rel=1e-9)
    assert compared.difference == pytest.approx(two[1].mean - two[0].mean)
    assert compared.interval.low < compared.difference < compared.interval.high
    assert compared.interval.low > 5


def test_the_interval_of_one_run_each_is_the_normal_one():
    """With one seed only images are drawn, and their paired difference has a known deviation."""
    first, second = (answers(p, s).correct for p, s in ((0.6, 1), (0.7, 2)))
    deviation = 100 * np.std(second.astype(float) - first) / math.sqrt(len(first))
    low, high = bootstrap_difference(first[None], second[None])
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.08)


def test_seeds_that_differ_widen_the_interval():
    steady = np.tile(answers(0.6, 1).correct, (4, 1))
    spread = np.stack([answers(share, 1).correct for share in (0.3, 0.5, 0.7, 0.9)])
    widths = [np.ptp(bootstrap_difference(steady, other)) for other in (steady, spread)]
    assert widths[1] > widths[0] + 10


def test_few_seeds_spread_as_much_as_their_deviation_says():
    """Runs that are all right and all wrong: drawn with replacement, their mean is one of three."""
    never, always = np.zeros(50, bool), np.ones(50, bool)
    low, high = bootstrap_difference(never[None], np.stack([never, always]))
    assert (low, high) == pytest.approx((50 - 50 * math.sqrt(2), 50 + 50 * math.sqrt(2)))


def test_other_images_are_refused(two):
    two[1].answers[2] = Answers(IMAGES[::-1], two[1].answers[2].correct)
    with pytest.raises(SeedsError, match="better, seed 2: was asked other images"):
        seeds.compare(*two)


DAMAGED = gzip.compress(bytes(1000))[:12] + b"\xff" * 9  # zlib calls it an invalid stored block
TABLES = {
    "empty": b"",
    "no gzip": b"no gzip",
    "cut off": gzip.compress(b"\xff\xfe")[:-4],
    "damaged": DAMAGED,
    "no text": gzip.compress(b"\xff\xfe"),
    "no answers": gzip.compress(b"image,label\n1,a\n"),
    "no images": gzip.compress(b"image,label,correct\n"),
    "another word": gzip.compress(b"image,label,correct\n1,a,yes\n"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_validate_did_not_write_is_refused_by_name(tmp_path, kind):
    (tmp_path / seeds.PREDICTIONS).write_bytes(TABLES[kind])
    with pytest.raises(SeedsError, match=seeds.PREDICTIONS):
        seeds.read(tmp_path)


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """Programs that would be started; validate.py leaves a table."""
    started: list[list[str]] = []

    def start(command: list[str]) -> SimpleNamespace:
        started.append([Path(command[1]).name, *command[2:]])
        if "--config" in command:
            cfg = config_file.load(command[command.index("--config") + 1], command[4:])
            cfg.directory.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(cfg.model_dump())
            (cfg.directory / "config.yaml").write_text(text)
        if "--report" in command:
            folder = Path(command[-1])
            write(folder, answers(0.5, len(started)))
        return SimpleNamespace(returncode=3 if "optim.lr=3" in command else 0)

    monkeypatch.setattr(subprocess, "run", start)
    return started


@pytest.fixture
def configs(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{name}.yaml" for name in ("plain", "better")]
    for path in paths:
        path.write_text(CONFIG)
    return paths


def test_every_seed_of_every_config_is_trained_and_evaluated_once(tmp_path, configs, commands):
    out = tmp_path / "out"
    words = ("--config", *configs, "--seeds", 2, "--first", 5, "--out", out, "optim.lr=0.1")
    status, said, error = call(program, *words)
    assert status == 0, error
    trained = [command for command in commands if command[0] == "train.py"]
    assert [command[2:] for command in trained] == [
        [str(path), "optim.lr=0.1", f"run.seed={n}", f"run.dir={out}/{path.stem}/seed-{n}"]
        for path in configs
        for n in (5, 6)
    ]
    assert len(commands) == 8 and (out / "index.html").exists()
    assert "plain" in said and "difference" in said
    assert call(program, *words).out.count(": done") == 4 and len(commands) == 8
    for changed in ("optim.lr=0.2", "train.epochs=3"):
        status, _, error = call(program, *words, changed)
        assert status == 1 and len(commands) == 8
        assert "seed-5: was trained otherwise (" in error and changed.partition("=")[0] in error


def test_a_task_of_an_array_is_one_run_and_no_page(tmp_path, configs, commands):
    out = tmp_path / "out"
    words = ("--config", *configs, "--seeds", 2, "--out", out, "--task")
    assert call(program, *words, 3).status == 0
    assert [f"run.dir={out}/better/seed-1" in command for command in commands] == [True, False]
    assert not (out / "index.html").exists()
    assert call(program, *words, 4).status == 2


def test_what_fails_ends_the_rest_with_its_status(tmp_path, configs, commands):
    words = ("--config", configs[0], "--seeds", 2, "--out", tmp_path / "out")
    assert call(program, *words, "optim.lr=3").status == 3 and len(commands) == 1
    status, _, error = call(program, *words, "optim.rl=3")
    assert status == 1 and "optim.rl" in error and len(commands) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_two_configs(chromium, tmp_path, two, width):
    seeds.write(tmp_path, two, seeds.compare(*two), "python scripts/seeds.py …")
    with opened(chromium, tmp_path / "index.html", width) as shown:
        assert_shown(shown, ["headline", "results", "comparison"])
        rows = cells(shown, "#results")
        assert [row[0] for row in rows] == ["plain", "better"] and len(rows[0]) == 5
        assert [row[0] for row in cells(shown, "#comparison")] == ["0", "1", "2"]
