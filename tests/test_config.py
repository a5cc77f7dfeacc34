"""The schema: what it accepts, what its messages lead to, what may change between two runs.

Mistakes at every single key are in test_config_mistakes.py.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from irv2 import config
from irv2.config import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if path.name != "reference.yaml"  # published results, no run
]
KEYS = [key for key, _, _ in config.fields()]
DEFAULTS = {key: default for key, default, _ in config.fields()}
PROMISED = {
    "run": ["name", "dir", "seed", "device"],
    "model": ["drop_rate", "aux_logits"],
    "data": ["train", "val", "image_size", "workers"],
    "train": ["epochs", "global_batch", "micro_batch", "precision", "max_steps"],
    "optim": ["lr", "alpha", "eps", "momentum", "weight_decay", "clip_norm"],
    "loss": ["label_smoothing"],
    "ema": ["decay"],
    "eval": ["every_epochs"],
    "checkpoint": ["every_steps", "keep"],
    "log": ["every_steps"],
}
MINIMAL = "data: {train: images/train, val: images/val}\n"


def load(directory: Path, text: str = MINIMAL, *overrides: str) -> config.Config:
    """Load a YAML text from a file called study.yaml."""
    path = directory / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, overrides)


def faults(**sections: dict) -> list[str]:
    """The lines of the error of a config that has nothing else wrong."""
    tree = {"data": {"train": "a", "val": "b"}}
    for section, entries in sections.items():
        tree[section] = {**tree.get(section, {}), **entries}
    with pytest.raises(ConfigError) as caught:
        config.build(tree)
    return str(caught.value).splitlines()


# ------------------------------------------------------------------------------ what may be said


def test_the_promised_names_exist():
    assert {f"{s}.{name}" for s, names in PROMISED.items() for name in names} <= set(KEYS)


def test_the_papers_recipe_is_the_default(tmp_path):
    cfg = load(tmp_path)
    optim, schedule = cfg.optim, cfg.schedule
    assert (optim.lr, optim.alpha, optim.eps, optim.momentum) == (0.045, 0.9, 1.0, 0.9)
    assert schedule.kind == "staircase"
    assert (schedule.decay_rate, schedule.decay_epochs) == (0.94, 2.0)
    assert (cfg.model.drop_rate, cfg.model.blocks) == (0.2, [10, 20, 9])
    assert cfg.data.image_size == 299


def test_a_run_is_named_after_its_file_unless_it_names_itself(tmp_path):
    assert load(tmp_path).run.name == "study"
    assert load(tmp_path).directory == Path("runs/study")
    assert load(tmp_path, MINIMAL + "run: {name: mine}").directory == Path("runs/mine")
    assert load(tmp_path, MINIMAL, "run.dir=elsewhere").directory == Path("elsewhere")


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "+3.e-04", "0.0003", "3.0e-4", ".3e-3"])
def test_every_way_to_write_a_small_number_is_a_number(tmp_path, text):
    assert load(tmp_path, MINIMAL + f"optim: {{lr: {text}}}").optim.lr == 3e-4
    assert load(tmp_path, MINIMAL, f"optim.lr={text}").optim.lr == 3e-4


def test_a_whole_number_does_for_a_fraction_but_not_the_other_way(tmp_path):
    assert load(tmp_path, MINIMAL, "train.epochs=3").train.epochs == 3.0
    with pytest.raises(ConfigError, match=r"train\.global_batch=32\.0"):
        load(tmp_path, MINIMAL, "train.global_batch=32.0")


def test_overrides_are_read_as_yaml_and_win_over_the_file(tmp_path):
    text = MINIMAL + "optim: {lr: 0.5, clip_norm: 3.0}\nmodel: {aux_logits: false}\n"
    cfg = load(
        tmp_path,
        text,
        "optim.lr=0.25",
        "optim.clip_norm=null",
        "model.aux_logits=true",
        "model.blocks=[1, 2, 3]",
        "run.name=other",
        "data.train=synthetic:640x10",
        "train.epochs=1",
        "train.epochs=2",
    )
    assert cfg.optim.lr == 0.25
    assert cfg.optim.clip_norm is None
    assert cfg.model.aux_logits is True
    assert cfg.model.blocks == [1, 2, 3]
    assert cfg.run.name == "other"
    assert (cfg.data.train, cfg.data.val) == ("synthetic:640x10", "images/val")
    assert cfg.train.epochs == 2.0


def test_an_equals_sign_may_stand_in_a_value(tmp_path):
    assert load(tmp_path, MINIMAL, "data.train=images/a=b").data.train == "images/a=b"


def test_a_dumped_config_reads_back_the_same(tmp_path):
    cfg = load(tmp_path, MINIMAL, "optim.lr=0.3", "run.name=again", "optim.clip_norm=null")
    assert load(tmp_path, yaml.safe_dump(cfg.model_dump())) == cfg


# ---------------------------------------------------------------------------------- every key


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_described(key):
    description = next(d for k, _, d in config.fields() if k == key)
    assert len(description) >= 8
    table = config.describe()
    assert re.search(rf"^  {re.escape(key)} \(.+\)$", table, re.MULTILINE)
    assert description in table


def test_every_default_is_itself_accepted():
    tree = {"data": {"train": "a", "val": "b"}}
    for key, default in DEFAULTS.items():
        section, name = key.split(".")
        if default is not ...:
            tree.setdefault(section, {})[name] = copy.deepcopy(default)
    assert config.build(tree) == config.build({"data": {"train": "a", "val": "b"}})


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("optim.learning_rate", "lr"),
        ("optim.learnig_rate", "lr"),
        ("optim.weightdecay", "optim.weight_decay"),
        ("train.lr", "optim.lr"),
        ("train.weight_decay", "optim.weight_decay"),
        ("model.dropout_rate", "model.drop_rate"),
        ("data.img_size", "data.image_size"),
        ("train.batch", "eval.batch"),
        ("ema.ema_decay", "ema.decay"),
    ],
)
def test_a_name_from_another_program_leads_to_ours(bad, good):
    section, name = bad.split(".")
    (fault,) = faults(**{section: {name: 1}})
    assert re.search(rf"\b{re.escape(good)}\b", fault.split("unknown key")[1]), fault


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        (
            {"model": {"aux_logits": True}, "data": {"image_size": 75}},
            ["model.aux_logits", "data.image_size"],
        ),
        (
            {"schedule": {"warmup_epochs": 5}, "train": {"epochs": 5}},
            ["schedule.warmup_epochs", "train.epochs"],
        ),
        ({"schedule": {"min_lr": 0.2}, "optim": {"lr": 0.1}}, ["schedule.min_lr", "optim.lr"]),
        ({"model": {"freeze": "stem"}}, ["model.freeze", "model.init"]),
        (
            {"model": {"freeze": "backbone", "init": "a.pth", "aux_logits": True}},
            ["model.freeze", "model.aux_logits"],
        ),
    ],
)
def test_keys_that_contradict_each_other_are_both_named(sections, keys):
    (fault,) = faults(**sections)
    assert all(key in fault for key in keys)


def test_keys_that_just_agree_are_accepted():
    data = {"train": "a", "val": "b", "image_size": 299}
    agreeing = {
        "model": {"aux_logits": True},
        "schedule": {"warmup_epochs": 4.9, "min_lr": 0.1},
        "train": {"epochs": 5},
        "optim": {"lr": 0.1},
    }
    assert config.build({"data": data, **agreeing}).model.aux_logits


def test_all_mistakes_are_reported_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "data: {train: 3}\noptim: {lr: fast, betas: [1]}\ntrian: {epochs: 1}\n")
    lines = str(caught.value).splitlines()
    assert [re.split("[=:]", line)[0] for line in lines] == [
        *["data.train", "data.val", "optim.lr", "optim.betas"],
        "trian",
    ]


@pytest.mark.parametrize("key", ["data.train", "data.val", "data.trian"])
@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@host/a",
        "https://secret@host/a",
        "s3://AKIA:sec/ret@bucket/a",
        "https://host/a?token=secret",
        "https://host/a#secret",
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(tmp_path, key, url):
    path = tmp_path / "study.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=f"{key}=.*://") as caught:
        config.load(path, [f"{key}={url}"])
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"://.*an override is written section\.key=") as caught:
        config.load(path, [url])  # the key was forgotten
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://host:8080/a@b/", "s3://bucket/a@b", "http://host:80"])
def test_a_url_without_one_is_accepted(tmp_path, url):
    path = tmp_path / "study.yaml"
    path.write_text(MINIMAL)
    assert config.load(path, [f"data.train={url}"]).data.train == url


@pytest.mark.parametrize("text", ["", "train: {epochs: 1}\n", "data:\n", "data: {}\n"])
def test_required_keys_are_asked_for_by_name(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert re.search(r"data\.train: must be given", str(caught.value))
    assert re.search(r"data\.val: must be given", str(caught.value))


def test_a_section_whose_lines_are_all_commented_out_is_one_left_out(tmp_path):
    assert load(tmp_path, MINIMAL + "optim:\n  # lr: 0.1\n") == load(tmp_path)
    assert load(tmp_path, MINIMAL + "optim:\n", "optim.lr=0.1").optim.lr == 0.1


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        (MINIMAL + "optim: {lr: 1}\noptim: {alpha: 0.5}\n", "optim", 3),
        (MINIMAL + "optim:\n  lr: 1\n  lr: 1\n", "optim.lr", 4),
        (MINIMAL + "optim: {lr: 1, 'lr': 2}\n", "optim.lr", 2),
    ],
)
def test_a_key_written_twice_is_refused_with_its_line(tmp_path, text, key, line):
    with pytest.raises(ConfigError, match=rf"study\.yaml: {key}: line {line}: written twice"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "override",
    [
        *["optim.lr", "lr=1", "=1", ".lr=1", "optim.=1", "", "--lr"],
        *["optim.lr=[", "optim.lr=a: b: c", "optim.lr={x: 1, x: 2}", "optim.lr.x=1"],
    ],
)
def test_an_override_that_cannot_be_read_is_refused_and_quoted(tmp_path, override):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL, override)
    assert override.split("=")[0] in str(caught.value)


@pytest.mark.parametrize("override", ["optim.lr=fast", "optim.learning=1", "data.workers=1.5"])
def test_an_override_obeys_the_same_schema(tmp_path, override):
    with pytest.raises(ConfigError, match=re.escape(override.split("=")[0])):
        load(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    "text",
    [
        *["[1, 2]", "text", "data: [1]", "data: [", "a: b: c", "\t- x", "- a\nb: 1"],
        *["data: {train: a, val: b}\n---\nrun: {}", "1: 2", "null: 1", "data: *nowhere"],
        *["? [1, 2]\n: 3", "? {a: 1}\n: 3"],
    ],
)
def test_a_file_that_is_no_config_is_an_error_to_act_on_not_a_crash(tmp_path, text):
    with pytest.raises(ConfigError):
        load(tmp_path, text)


def test_a_missing_file_and_a_directory_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such config file"):
        config.load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        config.load(tmp_path)


# ------------------------------------------------------------------------------- files in configs/


def test_the_schema_for_editors_is_current():
    written = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert written == config.json_schema(), "write it anew: python -m irv2.config"


def test_the_schema_for_editors_has_every_key_and_refuses_others():
    schema = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
    found = []
    for section, spec in schema["properties"].items():
        definition = schema["$defs"][spec["$ref"].rsplit("/", 1)[1]]
        assert definition["additionalProperties"] is False
        found += [f"{section}.{name}" for name in definition["properties"]]
    assert sorted(found) == sorted(KEYS)


def test_there_are_configs_to_start():
    assert {"quickstart.yaml", "fashion_mnist.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_of_this_repository_loads_and_points_editors_at_the_schema(path):
    assert config.load(path).run.name == path.stem
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"


# ------------------------------------------------------------------------------- continuing a run


def changed(key: str, value: object, before: dict | None = None) -> list[str]:
    """What differs once `key` of a default config has been changed."""
    before = before or config.build({"data": {"train": "a", "val": "b"}}).model_dump()
    after = copy.deepcopy(before)
    section, name = key.split(".")
    assert after[section][name] != value
    after[section][name] = value
    return config.differences(before, after)


def test_machine_keys_are_keys():
    assert set(KEYS) >= config.MACHINE_KEYS


@pytest.mark.parametrize("key", KEYS)
def test_continuing_a_run_notices_its_experiment_but_not_its_machine(key):
    found = changed(key, "something else")
    is_free = key in config.MACHINE_KEYS or key == "train.epochs"
    assert len(found) == (0 if is_free else 1)
    assert all(line.startswith(f"{key}: ") and "'something else'" in line for line in found)


@pytest.mark.parametrize(
    "key", ["run.seed", "train.global_batch", "optim.lr", "data.image_size", "model.blocks"]
)
def test_what_makes_another_experiment_is_no_machine_key(key):
    assert key not in config.MACHINE_KEYS


@pytest.mark.parametrize("key", ["train.micro_batch", "data.workers", "data.train", "run.device"])
def test_a_run_may_move_to_another_machine(key):
    assert key in config.MACHINE_KEYS


def test_a_staircase_run_may_be_made_longer_but_a_cosine_one_may_not():
    tree = {"data": {"train": "a", "val": "b"}, "schedule": {"kind": "cosine"}}
    assert changed("train.epochs", 300.0) == []
    cosine = config.build(tree).model_dump()
    assert changed("train.epochs", 300.0, before=cosine) == ["train.epochs: 200 -> 300.0"]


def test_a_key_that_an_older_config_lacks_has_its_default():
    before = config.build({"data": {"train": "a", "val": "b"}}).model_dump()
    after = copy.deepcopy(before)
    del before["optim"]["layer_decay"], before["loss"]["class_weights"], before["model"]["init"]
    assert config.differences(before, after) == []
    after["optim"]["layer_decay"] = 0.5
    assert config.differences(before, after) == ["optim.layer_decay: 1.0 -> 0.5"]


def test_equal_configs_do_not_differ():
    dumped = config.build({"data": {"train": "a", "val": "b"}}).model_dump()
    assert config.differences(dumped, copy.deepcopy(dumped)) == []
