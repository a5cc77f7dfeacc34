"""Every key of every config, harmed in every way we could think of, is refused by its name.

A generator makes one kind of mistake at each key that a file of configs/ writes, in the file's real
text. In the shortest file every other key is written too and harmed with every bad value there is;
the longer ones take turns with a few. A kind passes if none of its mistakes survives;
`pytest -rP tests/test_config_mistakes.py` tells how many it made.

A new key needs a line in OUT_OF_RANGE if its values are bounded, and nothing else.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import programs
import pytest

from irv2 import config, config_file, strict_yaml
from irv2.config_file import ConfigError

CONFIGS = {  # without comments, on which a parser would spend a third of its time
    path.name: re.sub(r"\s*#.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for path in sorted((programs.ROOT / "configs").glob("*.yaml"))
    if path.name != "reference.yaml"  # published results, no run
}
SHORTEST = min(CONFIGS.values(), key=len)
SCHEMA = json.loads(config.json_schema())
DEFAULTS = {key: field.default for key, field in config.FIELDS.items()}
KEYS = list(config.FIELDS)
REQUIRED = tuple(key for key in KEYS if config.FIELDS[key].is_required())
SECTIONS = list(config.Config.model_fields)

# Values, as written in YAML, just outside of what a key may be.
OUT_OF_RANGE = {
    "run.name": ['""', "..", "../../x", "/tmp/x", "a/b", '"a\\0b"'],
    "run.dir": ['""'],
    "run.seed": ["-1", "9223372036854775808"],
    "run.device": ["gpu", "CUDA", '"cuda:0"'],
    "run.timeout_s": ["0", "-600.0", "1000001"],
    "model.drop_rate": ["-0.01", "1.0", "1"],
    "model.bn_momentum": ["0.0", "-0.1", "1.01"],
    "model.blocks": ["[1, 1]", "[1, 1, 1, 1]", "[1, 0, 1]", "[1, 1, -1]", "[]"],
    "model.width": ["0", "-0.5", "0.3", "1.03"],
    "model.init": ['""'],
    "model.freeze": ["head", "Stem", '""'],
    "data.train": ['""', '"https://me:secret@host/a"'],
    "data.val": ['""', '"s3://bucket/a?token=secret"'],
    "data.classes": ['""'],
    "data.image_size": ["74", "0", "-299", "2049"],
    "data.train_sizes": [
        "299",
        "[]",
        "[[0, 74]]",
        "[[0, 99.5]]",
        "[[0.1, 99]]",
        "[[0, 99], [1, 75]]",
    ],
    "data.workers": ["-1"],
    "data.cache_dir": ['""'],
    "data.cache_gb": ["0", "-1.0", "1e999"],
    "data.mean": ["[0.5, 0.5]", "[0.5, 0.5, 0.5, 0.5]", "[]", "[0.5, 0.5, 1e999]"],
    "data.std": ["[0.5, 0.5]", "[0.5, 0.5, 0.5, 0.5]", "[0.5, 0.0, 0.5]", "[0.5, 0.5, -1.0]"],
    "data.crop_area": ["[0.0, 1.0]", "[0.5, 1.01]", "[0.6, 0.5]", "[0.5]", "[0.1, 0.2, 0.3]"],
    "data.crop_aspect": ["[0.0, 1.0]", "[-1.0, 1.0]", "[1.3, 0.7]", "[1.0]", "[1, 2, 3]"],
    "data.hflip": ["-0.01", "1.01"],
    "data.eval_crop": ["0.0", "1.01"],
    "data.eval_interpolation": ["nearest", "BICUBIC"],
    "data.rand_augment": ["-1", "31"],
    "data.random_erasing": ["-0.1", "1.1"],
    "data.mixup": ["-0.1"],
    "data.cutmix": ["-0.1"],
    "data.shuffle_window": ["0", "-1"],
    "data.max_bad_fraction": ["-0.001", "1.01"],
    "train.epochs": ["0", "-1", "1e999", "-1e999"],
    "train.global_batch": ["0", "-640"],
    "train.micro_batch": ["0", "-1", "Auto", "''"],
    "train.precision": ["float32", "FP32", "amp"],
    "train.reduce_dtype": ["bfloat16", "FP32", "fp16"],
    "train.compile": ["blocks", "Graph", "'true'", "1"],
    "train.max_steps": ["0", "-1"],
    "train.max_bad_steps": ["-1"],
    "optim.kind": ["Adam", "rmsprop", "[sgd]", "null"],
    "optim.betas": ["[0.9]", "[0.9, 1.0]", "0.9"],
    "optim.lr": ["0", "0.0", "-0.045", "1e999", "1e-999"],
    "optim.alpha": ["-0.1", "1.0"],
    "optim.eps": ["0.0", "-1e-8"],
    "optim.momentum": ["-0.1", "1.0"],
    "optim.weight_decay": ["-1e-9", "1e999"],
    "optim.clip_norm": ["0.0", "-2.0", "1e999"],
    "optim.layer_decay": ["0.0", "-0.1", "1.01"],
    "schedule.kind": ["step", "Staircase"],
    "schedule.decay_rate": ["0.0", "-0.94", "1.01"],
    "schedule.decay_epochs": ["0", "-2.0"],
    "schedule.warmup_epochs": ["-0.1", "1e999"],
    "schedule.min_lr": ["-1e-9", "1e999"],
    "loss.label_smoothing": ["-0.1", "1.0"],
    "loss.aux_weight": ["-0.4", "1e999"],
    "loss.class_weights": ["Balanced", "[1.0, 2.0]"],
    "ema.decay": ["-0.1", "1.0"],
    "log.profile": ["[0, 3]", "[3, 2]", "[1]", "[1, 2, 3]", "5"],
    "log.to": ["wandb", "[Wandb]", "[tensorboard, mail]"],
    "eval.every_epochs": ["0", "-1.0"],
    "eval.batch": ["0", "-64"],
    "checkpoint.every_steps": ["0", "-1"],
    "checkpoint.keep": ["0", "-1"],
    "log.every_steps": ["0", "-1"],
}

# Values, as written in YAML, that keys of a JSON type do not take.
NOT_A_NUMBER = [
    *["fast", "'0.045'", '"1"', "''", "5%", "64px", "1,5", "1_000", "010", "0x10", "0o7", "0b1"],
    *["1:30", "1e", "1e-3x", "--1", "2024-01-01", ".inf", ".nan", "true", "yes", "[1]", "{a: 1}"],
]
WRONG_TYPE = {
    "number": NOT_A_NUMBER,
    "integer": [*NOT_A_NUMBER, "32.0", "1.5", "1e3", "3e-4", "1" * 310],
    "boolean": ["maybe", "'true'", "yes", "no", "on", "off", "y", "0", "1", "1.0", "[true]", "{}"],
    "string": ["3", "1.5", "4e-5", "true", "[a]", "[]", "{a: b}", "-1"],
    "array": [
        *["0.5", "3", "'0.5, 0.5, 0.5'", "text", "true", "{a: 1}", "2024-01-01", "[a, b, c]"],
        *["[[1], [1], [1]]", "[true, true, true]", "['1', '1', '1']", "[~, ~, ~]", "[{}, {}, {}]"],
    ],
}
NULLS = ["null", "~", ""]

# Values that ask the parser for more than plain values. The first two would leave a file.
HOSTILE = [
    *['!!python/object/apply:os.system ["touch executed"]', "!!python/name:os.system"],
    *["!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [executed]]"],
    *["!!python/module:os", "!!python/object/new:os.system [ls]", "!custom x", "! x"],
    *["!!str 1", "!!float 1", "!!binary aGk=", "!!timestamp 2024-01-01", "!!set {a}"],
    *["[1, !custom x]", "{a: !custom x}", "&a 1", "*nowhere", "&a [*a]", "{? [1] : 1}"],
    *["[" * 50 + "]" * 50, "{a: " * 50 + "}" * 50, r'"a\0b"', r'"a\nb"', r'"\u2028"', r'"\ud800"'],
]
UNREADABLE = ["[1, 2", "{a: 1", "a: b", "]", "@a", "`a", "%a", '"\\q"', "a\x07"]


class Mistake(NamedTuple):
    """A harmed config, the names its message must begin lines with, and words to find in it."""

    text: str
    names: tuple[str, ...]
    words: tuple[str, ...] = ("",)  # one of them
    overrides: tuple[str, ...] = ()


# -------------------------------------------------------------------------- the texts of configs/


@functools.cache
def lines_of(text: str) -> dict[str, int]:
    """section -> index of its line, section.key -> index of its line, of a text in block style."""
    found, section = {}, ""
    for index, line in enumerate(text.splitlines()):
        if match := re.match(r"(\w+):", line):
            section = match[1]
            found[section] = index
        elif match := re.match(r"  (\w+):", line):
            found[f"{section}.{match[1]}"] = index
    return found


@functools.cache
def keys_of(text: str) -> list[str]:
    """The keys to harm in a text."""
    return [key for key in KEYS if text == SHORTEST or key in lines_of(text)]


def some_of(values: list[str], text: str, key: str) -> list[str]:
    """The bad values to try at a key of a text."""
    return values if text == SHORTEST else random.Random(key).sample(values, min(4, len(values)))


def value_of(text: str, key: str) -> str:
    """A good value of the key: the text's own or its default."""
    if key not in lines_of(text):
        return json.dumps(DEFAULTS[key])
    line = text.splitlines()[lines_of(text)[key]]
    return re.sub(r"\s+#.*", "", line.partition(":")[2]).strip()


def with_lines(text: str, key: str, *lines: str) -> str:
    """The text with these lines instead of the key's, or in its section if it has none."""
    rows, where, section = text.splitlines(), lines_of(text), key.split(".")[0]
    if key in where:
        rows[where[key] : where[key] + 1] = lines
    elif section in where:
        rows[where[section] + 1 : where[section] + 1] = lines
    else:
        rows += [f"{section}:", *lines]
    return "\n".join(rows) + "\n"


def with_value(text: str, key: str, value: str) -> str:
    """The text with another value for the key."""
    return with_lines(text, key, f"  {key.split('.')[1]}: {value}")


def in_flow_style(text: str, again: str = "") -> str:
    """Every section and key of a text on a line a section, `again` (a key or section) twice."""
    lines = []
    for section in SECTIONS:
        keys = [key for key in KEYS if key.split(".")[0] == section]
        keys += [again] if again in keys else []
        entries = [f"{key.split('.')[1]}: {value_of(text, key)}" for key in keys]
        lines += [f"{section}: {{{', '.join(entries)}}}"] * (2 if section == again else 1)
    return "\n".join(lines) + "\n"


@functools.cache
def spec_of(key: str) -> dict:
    """The JSON schema's entry for a key."""
    section, name = key.split(".")
    definition = SCHEMA["properties"][section]["$ref"].rsplit("/", 1)[1]
    return SCHEMA["$defs"][definition]["properties"][name]


def types_of(key: str) -> set[str]:
    """The JSON types that a key takes."""
    return {option["type"] for option in spec_of(key).get("anyOf", [spec_of(key)])}


# ----------------------------------------------------------------------------- kinds of mistakes


def misspellings(name: str) -> list[str]:
    """The name as it comes out when typed in haste, or as another program writes it."""
    rng = random.Random(name)
    at = rng.randrange(len(name))
    swap = rng.choice([i for i in range(len(name) - 1) if name[i] != name[i + 1]])
    camel = "".join(part.capitalize() for part in name.split("_"))
    spelt = {
        name[:at] + name[at + 1 :],
        name[:at] + name[at] + name[at:],
        name[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + name[at + 1 :],
        name[:swap] + name[swap + 1] + name[swap] + name[swap + 2 :],
        *[name.upper(), name.capitalize(), camel, camel[0].lower() + camel[1:]],
        *[name.replace("_", "-"), name.replace("_", " "), name.replace("_", ""), f"{name}s"],
    }
    return sorted(spelt - {name})


def misspelt_keys(text: str) -> Iterator[Mistake]:
    for key in keys_of(text):
        section, name = key.split(".")
        absent = (key,) if key in REQUIRED else ()
        for bad in some_of(misspellings(name), text, key):
            harmed = with_lines(text, key, f"  {bad}: {value_of(text, key)}")
            yield Mistake(harmed, (f"{section}.{bad}", *absent), (f"did you mean {key}?",))


def misspelt_sections(text: str) -> Iterator[Mistake]:
    names = {key.split(".")[1] for key in KEYS}  # "val" is no misspelt "eval"
    for section in SECTIONS:
        key = next(key for key in KEYS if key.startswith(f"{section}."))
        whole = with_value(text, key, value_of(text, key))
        absent = tuple(key for key in REQUIRED if key.startswith(f"{section}."))
        for bad in set(misspellings(section)) - names:
            harmed = re.sub(rf"^{section}:", f"{bad}:", whole, flags=re.MULTILINE)
            yield Mistake(harmed, (bad, *absent), (f"did you mean {section}?",))


def misplaced_keys(text: str) -> Iterator[Mistake]:
    """In a section that has none of its name, or outside of all sections."""
    for key in keys_of(text):
        name, value = key.split(".")[1], value_of(text, key)
        foreign = next(f"{s}.{name}" for s in reversed(SECTIONS) if f"{s}.{name}" not in KEYS)
        homes = [other.split(".")[0] for other in KEYS if other.split(".")[1] == name]
        meant = tuple(f"did you mean {home}.{name}?" for home in homes)
        yield Mistake(with_value(text, foreign, value), (foreign,), meant)
        meant = tuple(f"write it as {home}: {{{name}: …}}" for home in homes)
        yield Mistake(f"{text}{key}: {value}\n", (key,), meant)
        if name not in SECTIONS:
            yield Mistake(f"{text}{name}: {value}\n", (name,), meant)


def wrong_values(key: str) -> list[str]:
    """Values of types that a key does not take."""
    kind, *_ = sorted(types_of(key) - {"null"})  # a number or a word ("auto"): no other word
    return WRONG_TYPE[kind] + ([] if "null" in types_of(key) else NULLS)


def wrong_types(text: str) -> Iterator[Mistake]:
    for key in keys_of(text):
        for value in some_of(wrong_values(key), text, key):
            yield Mistake(with_value(text, key, value), (key,))


def out_of_range(text: str) -> Iterator[Mistake]:
    for key in keys_of(text):
        for value in OUT_OF_RANGE.get(key, []):
            yield Mistake(with_value(text, key, value), (key,))


def wrong_overrides(text: str) -> Iterator[Mistake]:
    """Wrong types, values out of range and hostile ones on the command line; the file is short."""
    for key in KEYS if text == SHORTEST else []:
        for value in [*wrong_values(key), *OUT_OF_RANGE.get(key, []), *HOSTILE]:
            yield Mistake("data: {train: a, val: b}", (key,), overrides=(f"{key}={value}",))


def duplicate_keys(text: str) -> Iterator[Mistake]:
    for key in keys_of(text):
        name, value = key.split(".")[1], value_of(text, key)
        for again in (f"{name}: {value}", f"{name}: 0", f'"{name}": {value}', f"'{name}' : ~"):
            yield Mistake(with_lines(text, key, f"  {name}: {value}", f"  {again}"), (key,))
        yield Mistake(in_flow_style(text, key), (key,), ("written twice",))


def duplicate_sections(text: str) -> Iterator[Mistake]:
    for section in SECTIONS:
        once, twice = in_flow_style(text), in_flow_style(text, section)
        braces = f"{{{', '.join(twice.splitlines())}}}"
        for harmed in (twice, braces, f"{once}{section}:\n", f'{once}"{section}": {{}}\n'):
            yield Mistake(harmed, (section,), ("written twice",))
        if section in lines_of(text):
            yield Mistake(f"{text}{section}:\n", (section,), ("written twice",))


def hostile_values(text: str) -> Iterator[Mistake]:
    for key in keys_of(text):
        section, name = key.split(".")
        for value in some_of(HOSTILE, text, key):
            yield Mistake(with_value(text, key, value), (key,))
        entry = f"{name}: {value_of(text, key)}"
        for mark in ("&a", "!x"):
            yield Mistake(with_lines(text, key, f"  {mark} {entry}"), (key,))
        merged = with_lines(text, key, f"  {entry}", f"  <<: {{{entry}}}")
        yield Mistake(merged, (f"{section}.<<",))


def unreadable_lines(text: str) -> Iterator[Mistake]:
    """Invalid YAML is reported by its line, or by the next: some ends are missed only there."""
    for key in keys_of(text):
        name = key.split(".")[1]
        lines = [f"  {name}: {value}" for value in UNREADABLE]
        for line in some_of(
            [*lines, f"\t{name}: 1", f"  \t{name}: 1", f"  {name}: 1\n  x"], text, key
        ):
            harmed = with_lines(text, key, line)
            index = lines_of(with_value(text, key, "1"))[key]
            yield Mistake(harmed, (), (f"line {index + 1}", f"line {index + 2}"))


# How many mistakes of a kind there are at least, so that no generator can pass by running dry.
KINDS: dict[Callable[[str], Iterator[Mistake]], int] = {
    misspelt_keys: 600,
    misspelt_sections: 200,
    misplaced_keys: 300,
    wrong_types: 1000,
    out_of_range: 200,
    wrong_overrides: 2000,
    duplicate_keys: 500,
    duplicate_sections: 150,
    hostile_values: 1500,
    unreadable_lines: 700,
}


def test_every_key_of_every_config_is_harmed():
    assert keys_of(SHORTEST) == KEYS
    for text in CONFIGS.values():
        written = [line for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]
        assert len(written) == len(lines_of(text))
        assert set(lines_of(text)) <= {*KEYS, *SECTIONS}


def test_every_bounded_key_has_values_out_of_range():
    bounds = re.compile('"(minimum|maximum|exclusiveM.+?|min.+?|max.+?|enum|const)": ')
    bounded = {key for key in KEYS if bounds.search(json.dumps(spec_of(key)))}
    assert set(OUT_OF_RANGE) == bounded


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_the_same_text_without_a_mistake_is_accepted(text, tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(text, encoding="utf-8")
    original = config_file.load(path)
    for key in keys_of(text):
        path.write_text(with_value(text, key, value_of(text, key)), encoding="utf-8")
        assert config_file.load(path) == original
    path.write_text(in_flow_style(text), encoding="utf-8")
    assert config_file.load(path) == original


# ------------------------------------------------------------------------------------ are refused


def escaped(mistake: Mistake, path: Path) -> str | None:
    """How a mistake got past, or was met otherwise than promised; None if refused by name."""
    path.write_text(mistake.text, encoding="utf-8")
    try:
        config_file.load(path, mistake.overrides)
    except ConfigError as error:
        message = str(error)
    except Exception as error:
        return f"crashed: {error!r}"
    else:
        return "accepted"
    lines = [line.removeprefix(f"{path}: ") for line in message.splitlines()]
    named = {name for line in lines for name in mistake.names if re.match(rf"{name}[.:=]", line)}
    blames_others = len(named) < len(mistake.names) or len(lines) > 3
    if blames_others or not any(words in message for words in mistake.words):
        return message[:300]
    return None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_mistake_is_refused_by_name(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mistakes = [mistake for text in CONFIGS.values() for mistake in kind(text)]
    reasons = [(mistake, escaped(mistake, Path("harmed.yaml"))) for mistake in mistakes]
    survivors = [(mistake.names, reason) for mistake, reason in reasons if reason]
    print(f"{kind.__name__}: {len(mistakes)} injected, {len(mistakes) - len(survivors)} refused")
    assert survivors == []
    assert len(mistakes) >= KINDS[kind]
    assert os.listdir() == ["harmed.yaml"], "a value was executed"


# ------------------------------------------------------------------------------------ whole files

ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
FILES = {
    "billion laughs": (b"a0: &a0 [ha]\n" + ALIASES.encode(), "a0: line 1: no anchors"),
    "50 MB of lines": (b"# nothing but comment\n" * 2_300_000, "over 128,000 bytes"),
    "50 MB in a line": (b"x" * 50_000_000, "over 128,000 bytes"),
    "a long name": (b"run: {name: x" + b"x" * 40_000 + b"}", "longer than"),
    "lists in lists": (b"data: " + b"[" * 30_000, "nested too deep"),
    "mappings in mappings": (b"data: " + b"{a: " * 7_000, "data.a.a.a.a.a.a.a.a: line 1: nested"),
    "items of items": (b"- " * 15_000, "nested too deep"),
    "two documents": (b"data: {train: a}\n---\nrun: {}\n", "line 2: a second document"),
    "a document after the end": (b"run: {}\n...\n---\nrun: {}\n", "line 3: a second document"),
    "an escape too large": (rb'run: {name: "\UFFFFFFFF"}', "not valid YAML"),
    "NUL": (b"data:\n  train: \0\n", "line 2: not valid YAML: character 0x0"),
    "no text": (bytes(range(256)), "cannot be read"),
    "Latin-1": ("data: {train: größe}".encode("latin-1"), "cannot be read"),
    "UTF-16": ("data: {train: a, val: b}".encode("utf-16"), "cannot be read"),
    "a tab before a section": (b"\tdata: {}\n", "line 1"),
    "keys that are lists": (b"? [1, 2]\n: 3\n", "line 1: a key must be a name"),
    "keys without end": (b"? " + b"x" * 20_000 + b"\n: 1\n", "line 1: a key must be a name"),
    "a key of two lines": (b'run: {"na\\nme": 1}\n', "run.na?me: line 1: no control characters"),
    "an open quote": (b"data:\n  train: 'a\n  val: b\n", "line 2"),
    "a bad directive": (b"%YAML 9.9\n---\ndata: {}\n", "line 1"),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_a_hostile_file_is_refused_at_once_in_one_short_line(content, words, tmp_path):
    path = tmp_path / "harmed.yaml"
    path.write_bytes(content)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        config_file.load(path)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    assert words in line
    assert len(line) < 500 + len(str(path))
    assert seconds < 2
    assert peak < 20e6


def test_the_configs_are_far_from_the_limit_of_length():
    assert max(map(len, CONFIGS.values())) < strict_yaml.MAX_LENGTH / 5


@pytest.mark.parametrize("form", ["{:e}", "{:.5E}", "+{:.12f}", "{:.4e}"])
def test_a_fraction_may_be_written_with_an_exponent_at_every_key(form, tmp_path):
    path = tmp_path / "study.yaml"
    fractions = [key for key in KEYS if "number" in types_of(key)]
    assert len(fractions) > 15
    for key in fractions:
        section, name = key.split(".")
        number = form.format(DEFAULTS[key])
        path.write_text(with_value(SHORTEST, key, number), encoding="utf-8")
        assert getattr(getattr(config_file.load(path), section), name) == float(number)


@pytest.mark.parametrize(
    "value", ["2024-01-01", "1:30", "010", "0x10", "no", "on", "1_000", ".inf"]
)
def test_what_only_looks_like_a_date_or_a_number_is_a_name(value, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(with_value(SHORTEST, "run.name", value), encoding="utf-8")
    assert config_file.load(path).run.name == value


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_marks_and_line_ends_of_windows_are_no_mistake(encoding, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(SHORTEST, encoding="utf-8")
    original = config_file.load(path)
    path.write_bytes(SHORTEST.replace("\n", "\r\n").encode(encoding))
    assert config_file.load(path) == original


# --------------------------------------------------------------------------------- before a device


def test_reading_a_config_does_not_even_import_torch():
    probe = "import sys; from irv2.config_file import load; load(sys.argv[1]); print(*sys.modules)"
    path = programs.ROOT / "configs" / "quickstart.yaml"
    finished = subprocess.run(
        [sys.executable, "-c", probe, path], cwd=programs.ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert "irv2.config" in finished.stdout.split()
    assert not {"torch", "numpy"} & set(finished.stdout.split())


# What is done to the shortest config, and how the lines on stderr begin.
HARM = {
    "several": (
        {
            "data.hflip": "  hflip: often",
            "train.epochs": "  epochs: 0",
            "optim.weight_decay": "  weight_deacy: 4e-5",
            "loss.aux_weight": "  aux_weight: 1:30",
        },
        [
            *["data.hflip='often': ", "train.epochs=0: ", "optim.weight_deacy=4e-05: unknown key"],
            "loss.aux_weight='1:30': ",
        ],
    ),
    "hostile": (
        {"run.name": '  name: !!python/object/apply:os.system ["touch executed"]'},
        ["harmed.yaml: run.name: line "],
    ),
}


def start_training(folder: Path, harm: dict[str, str]) -> subprocess.Popen[str]:
    """Start train.py where joining the process group, or asking for a GPU, would fail."""
    text = functools.reduce(lambda text, key: with_lines(text, key, harm[key]), harm, SHORTEST)
    folder.mkdir()
    (folder / "harmed.yaml").write_text(text, encoding="utf-8")
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    place = {"MASTER_ADDR": "", "MASTER_PORT": ""}
    arguments = ("--config", "harmed.yaml", "run.device=cuda")
    return programs.start("train.py", *arguments, cwd=folder, env=ranks | place)


@pytest.mark.slow
def test_train_py_tells_each_fault_in_a_line_and_leaves_nothing(tmp_path):
    for name, (harm, starts) in HARM.items():
        ended = programs.finish(start_training(tmp_path / name, harm))
        lines = ended.stderr.removeprefix("train.py: ").splitlines()
        assert ended.returncode == 1
        assert len(lines) == len(starts), lines
        assert all(line.startswith(start) for line, start in zip(lines, starts)), lines
        assert ended.stdout == ""
        assert os.listdir(tmp_path / name) == ["harmed.yaml"]
