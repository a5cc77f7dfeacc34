"""scripts/predict.py from the outside: timm's probabilities, streams, and what cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import calling
import programs
import pytest
import small_meta
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from small_network import randomised
from small_weights import SYNSETS, VIEW, WORDS

from data import pictures, workers
from data.names import LONGEST, shown, width
from data.pictures import Picture
from data.transforms import EvalView
from irv2.network import imagenet_names, weights
from irv2.network.model import inception_resnet_v2
from irv2.run import checkpoint, trained
from scripts import predict

call = partial(calling.call, predict)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven photographs of several kinds, two of them in a folder below, and no image."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "below").mkdir()
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for k, name in enumerate(["a.jpg", "b.png", "c.JPEG", "d.webp", "e.jpg"]):
        images[k % 2].crop((20 * k, 10 * k, 400, 300)).save(root / name)
    images[0].crop((0, 0, 100, 400)).save(root / "below" / "f.jpg")
    images[1].convert("L").save(root / "below" / "g.jpg")
    (root / "notes.txt").write_text("no image")
    return root


def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    return programs.start("scripts/predict.py", *arguments, text=False, **options)


@pytest.mark.slow
def test_probabilities_are_those_of_timms_model_and_transform(photographs, tmp_path):
    theirs = randomised(timm.create_model("inception_resnet_v2", num_classes=6))
    path = tmp_path / "weights.safetensors"
    weights.write(path, theirs.state_dict(), {"data": json.dumps(VIEW)})
    transform = timm.data.create_transform(
        (3, 75, 75),
        interpolation="bilinear",
        crop_pct=VIEW["eval_crop"],
        mean=VIEW["mean"],
        std=VIEW["std"],
    )
    files = ["a.jpg", "b.png", "c.JPEG", "d.webp", "e.jpg", "below/f.jpg", "below/g.jpg"]
    images = [transform(Image.open(photographs / file).convert("RGB")) for file in files]
    with torch.inference_mode():
        expected = theirs(torch.stack(images)).softmax(1)
    assert expected.std(0).max() > 1e-3

    arguments = ("--weights", path, "--batch", 3, "--top", 6, "--json")
    status, out, error = call(photographs, *arguments)
    assert (status, error) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(photographs / file) for file in files]
    for line, row in zip(lines, expected):
        found = {p["class"]: p["probability"] for p in line["predictions"]}
        assert list(found) == [str(i) for i in row.argsort(descending=True).tolist()]
        assert found == pytest.approx({str(i): row[i].item() for i in range(6)}, rel=1e-4)


def test_one_line_a_picture_with_classes_in_words(photographs, small_weights):
    files = [photographs / "a.jpg", photographs / "below"]
    status, out, _ = call(*files, "--weights", small_weights, "--top", 2)
    assert status == 0
    lines = out.splitlines()
    names = [str(photographs / file) for file in ("a.jpg", "below/f.jpg", "below/g.jpg")]
    assert [line.split()[0] for line in lines] == [shown(name, LONGEST) for name in names]
    columns = max(len(shown(name, LONGEST)) for name in names)
    rest = [line[columns:] for line in lines]
    assert all(text.startswith("  ") and text[2:].startswith(tuple(WORDS)) for text in rest)
    assert all(text.count(" %") == 2 for text in rest)
    _, out, _ = call(*files, "--weights", small_weights, "--json")
    first = json.loads(out.splitlines()[0])["predictions"]
    assert {(p["class"], p["name"]) for p in first} == set(zip(SYNSETS, WORDS))
    assert sum(p["probability"] for p in first) == pytest.approx(1)
    assert imagenet_names.in_words(["n00000000"]) == ["n00000000"]  # a folder that is no synset


def test_no_two_classes_of_imagenet_have_one_name():
    names = imagenet_names.in_words(imagenet_names.synsets())
    assert len(set(names)) == 1000
    assert [name for name in names if name.startswith("crane")] == [
        "crane (n02012849)",
        "crane (n03126707)",
    ]
    assert names[0] == "tench"


@pytest.mark.slow
def test_what_cannot_be_used_has_a_line_and_the_rest_goes_on(photographs, small_weights, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff\xe9 odd.jpg"
    shutil.copy(photographs / "a.jpg", odd)
    (tmp_path / "damaged.jpg").write_bytes((photographs / "a.jpg").read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    listed = [
        os.fsencode(photographs / "a.jpg"),
        os.fsencode(tmp_path / "missing.jpg"),
        odd,
        os.fsencode(tmp_path / "damaged.jpg"),
        os.fsencode(tmp_path / "empty"),
        os.fsencode(tmp_path / "pipe.jpg"),
        os.fsencode(photographs / "b.png"),  # no end of line
    ]
    expected = {
        1: "cannot be read (No such file",
        3: "cannot be decoded (",
        4: "no images in it",
        5: "cannot be read (not a regular file)",
    }

    def check_errors(error: str) -> None:
        lines = error.splitlines()
        assert len(lines) == len(expected)
        for line, (place, reason) in zip(lines, expected.items()):
            assert line.startswith(f"{os.fsdecode(listed[place])}: {reason}")

    process = start("-", "--weights", small_weights, "--batch", "2", stdin=subprocess.PIPE)
    out, error = process.communicate(b"\n".join(listed), timeout=300)
    assert process.returncode == 1
    check_errors(os.fsdecode(error))
    first = [line.partition(b"  ")[0].rstrip().decode() for line in out.splitlines()]
    as_text = [os.fsdecode(listed[place]) for place in (0, 2, 6)]
    assert first == [shown(name, LONGEST) for name in as_text]

    status, out, error = call(*map(os.fsdecode, listed), "--weights", small_weights, "--json")
    assert status == 1
    check_errors(error)
    assert out.isascii()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [os.fsencode(line["image"]) for line in lines] == listed
    for place, line in enumerate(lines):
        assert ("error" in line) == (place in expected) != ("predictions" in line)


def test_names_act_on_no_terminal_and_widen_no_column(capsys):
    names = ["a.jpg", "\x1b[2J\n\u202e\udce9.jpg", "日" * 40 + ".jpg", "x" * 300 + ".jpg"]
    answer = [predict.Prediction(0, "c", "cat\x1b[0m", 1.0)]
    predict.Table()([(Picture(name, None), answer) for name in names])
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and out.count("\n") == len(names)
    lines = out.splitlines()
    assert lines[1].startswith(r"\x1b[2J\n\u202e\xe9.jpg ")
    assert lines[3].startswith("x" * 30 + "…" + "x" * 25 + ".jpg  ")
    assert {width(line) for line in lines} == {LONGEST + len(r"  cat\x1b[0m 100.0 %")}
    predict.show_json([(Picture(names[3], None), answer)])
    assert json.loads(capsys.readouterr().out)["image"] == names[3]


@pytest.fixture
def piped(tmp_path: Path) -> Iterator[Callable[[bytes], list[pictures.Unseen]]]:
    """Images that "-" yields for what is written to standard input."""
    before = os.dup(0)

    def run(content: bytes) -> list[pictures.Unseen]:
        (tmp_path / "stdin").write_bytes(content)
        with open(tmp_path / "stdin", "rb") as file:
            os.dup2(file.fileno(), 0)
        return list(pictures.named(["-"]))

    yield run
    os.dup2(before, 0)
    os.close(before)


@pytest.mark.parametrize("name", ["a.jpg", "b.png", "d.webp"])
def test_standard_input_may_be_a_picture(photographs, piped, name):
    content = (photographs / name).read_bytes()
    assert piped(content) == [("-", content)]
    seen = pictures.see(pictures.Encoded("-", content), EvalView(75, 0.8, "bilinear"))
    assert seen.pixels.shape == (75, 75, 3)
    broken = pictures.see(pictures.Encoded("-", content[:50]), EvalView(75, 0.8, "bilinear"))
    assert broken.path == "-" and broken.error.startswith("cannot be decoded")


def test_standard_input_may_be_a_list_by_lines_or_nul(photographs, piped):
    a, below = photographs / "a.jpg", photographs / "below"
    expected = [str(a), str(below / "f.jpg"), str(below / "g.jpg")]
    for end in "\n", "\0":
        assert piped(f"{a}{end}{below}{end}".encode()) == expected
        assert piped(f"{a}{end}{end}{below}".encode()) == expected
    assert piped(f"{a}\0x\ny.jpg\0-\0".encode()) == [str(a), "x\ny.jpg", "-"]
    assert piped(b"missing.jpg\n") == ["missing.jpg"]


def test_a_list_whose_first_name_looks_like_a_picture_is_one(piped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BMW.jpg").touch()
    assert piped(b"BMW.jpg\0b.jpg\0") == ["BMW.jpg", "b.jpg"]


@pytest.mark.parametrize("content", [b"\x7fELF\2\1\1\0\0\0" * 50, b"PK\3\4", b""])
def test_what_is_neither_picture_nor_list_is_one_line(piped, content):
    (picture,) = piped(content)
    what = "is neither a picture nor a list of their names" if content else "is empty"
    assert (picture.path, picture.error) == ("-", what)


def test_standard_input_without_an_end_is_left(piped, photographs, monkeypatch):
    """No more is kept of it than a picture, or a name, can have."""
    monkeypatch.setattr(pictures, "MAX_BYTES", 10_000)
    endless = (photographs / "a.jpg").read_bytes() + bytes(40_000)
    assert piped(endless) == [Picture("-", None, "cannot be read (over 10,000 bytes)")]
    assert piped(b"x" * 200_000) == [Picture("-", None, "holds a name of over 65,536 bytes")]


def test_a_file_of_names_is_read(photographs, tmp_path, small_weights):
    (tmp_path / "list").write_bytes(os.fsencode(photographs / "a.jpg") + b"\0")
    options = ("--weights", small_weights, "--json")
    status, out, error = call("--files-from", tmp_path / "list", *options)
    assert (status, error, out.count("\n")) == (0, "", 1)
    status, out, error = call("--files-from", tmp_path / "none", *options)
    assert (status, error) == (
        1,
        f"{tmp_path / 'none'}: cannot be read (No such file or directory)\n",
    )


@pytest.mark.slow
def test_a_stream_is_answered_line_by_line_and_ctrl_c_ends_it_quietly(photographs, small_weights):
    process = start("-", "--weights", small_weights, "--batch", "1", stdin=subprocess.PIPE)
    for name in ("a.jpg", "b.png"):
        process.stdin.write(os.fsencode(photographs / name) + b"\n")
        process.stdin.flush()
        whole = shown(str(photographs / name), LONGEST)
        assert process.stdout.readline().startswith(whole.encode())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130  # though standard input stays open
    assert process.stdout.read() == process.stderr.read() == b""
    process.communicate()


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_it_quietly(photographs, small_weights):
    files = [photographs / "a.jpg"] * 50
    process = start(*files, "--weights", small_weights, "--batch", "1", as_user=True)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_weights_that_will_not_do_are_told_in_one_line(photographs, small_weights, tmp_path):
    def written(name: str, model: torch.nn.Module, **metadata: object) -> tuple[str, Path]:
        texts = {key: json.dumps(value) for key, value in metadata.items()}
        weights.write(tmp_path / name, model.state_dict(), texts)
        return "--weights", tmp_path / name

    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(small_weights.read_bytes()[:100_000])
    colour, grey = (
        inception_resnet_v2(3, channels, blocks=(1, 1, 1), width=0.25) for channels in (3, 1)
    )
    small = {"blocks": [1, 1, 1]}
    for source, message in (
        (("--run", tmp_path / "nowhere"), "no checkpoint in it"),
        (("--weights", tmp_path / "nowhere.pth"), "no such weights file"),
        (("--weights", truncated), "damaged or not a safetensors file"),
        (written("other.safetensors", timm.create_model("resnet18")), "not an Inception-ResNet-v2"),
        (written("grey.safetensors", grey, **small), "images of 1 channels"),
        (
            written("two.safetensors", colour, classes=["a", "b"], **small),
            "3 outputs, but names for 2",
        ),
    ):
        status, out, error = call(photographs, *source)
        assert (status, out) == (1, "")
        assert message in error and error.count("\n") == 1, error


def test_a_url_is_no_picture_and_its_secrets_are_not_repeated(tmp_path, small_weights):
    url = "https://me:secret@host/x.jpg?sig=secret"
    (tmp_path / "list").write_text(url)
    for words in ((url,), ("--files-from", tmp_path / "list"), ("--run", url, "x.jpg")):
        network = () if "--run" in words else ("--weights", small_weights)
        for form in ((), ("--json",)):
            status, out, error = call(*words, *network, *form)
            assert status in (1, 2) and "secret" not in out + error


def test_a_run_whose_classes_are_not_its_outputs_is_refused(tmp_path, small_weights):
    state, about = weights.read(str(small_weights)).state, small_meta.meta(1, classes=["a", "b"])
    checkpoint.save(tmp_path / "checkpoints", 1, {"ema": state}, about)
    with pytest.raises(weights.WeightsError, match="has 3 outputs, but names for 2"):
        trained.load_run(tmp_path, "ema", print)


def test_a_list_that_fails_in_its_middle_is_not_taken_for_its_end(photographs):
    def names() -> Iterator[str]:
        yield str(photographs / "a.jpg")
        raise OSError(5, "Input/output error")

    with pictures.read_ahead(names(), EvalView(75, 0.9, "bilinear"), 4) as coming:
        assert next(coming).error == ""
        with pytest.raises(OSError, match="Input/output"):
            next(coming)


def test_a_picture_that_is_long_in_coming_is_named(photographs, monkeypatch, caplog):
    def slow(path: str, _limit: int) -> bytes:
        time.sleep(0.3)
        return Path(path).read_bytes()

    monkeypatch.setattr(pictures, "read_regular", slow)
    monkeypatch.setattr(workers, "SLOW_S", 0.05)
    path = str(photographs / "a.jpg")
    with pictures.read_ahead([path], EvalView(75, 0.9, "bilinear"), 4) as coming:
        assert [picture.error for picture in coming] == [""]
    assert f"waiting since 0.05 s for {path}" in caplog.text
