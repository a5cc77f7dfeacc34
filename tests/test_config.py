"""The schema: what it accepts, what its messages lead to, what may change between two runs.

Mistakes at every single key are in test_config_mistakes.py.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from places import take

from data.errors import DataError, ImageError, StorageError, WorkerError
from data.names import without_secrets
from irv2 import cli, config, config_file
from irv2.config_file import ConfigError
from irv2.network import weights
from irv2.run import resume
from irv2.training.distributed import Place

ROOT = Path(__file__).parents[1]
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if path.name != "reference.yaml"  # published results, no run
]
KEYS = list(config.FIELDS)
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
SECRET_URL = "https://me:s3cr3t@host.example:8080/a/b?X-Amz-Signature=s3cr3t"


def load(directory: Path, text: str = MINIMAL, *overrides: str) -> config.Config:
    """Load a YAML text from a file called study.yaml."""
    path = directory / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return config_file.load(path, overrides)


def built(**sections: dict) -> config.Config:
    """The config of these entries and the required ones."""
    data = {"train": "a", "val": "b", **sections.pop("data", {})}
    return config_file.from_tree({"data": data, **sections})


def faults(**sections: dict) -> list[str]:
    """The lines of the error of a config that has nothing else wrong."""
    with pytest.raises(ConfigError) as caught:
        built(**sections)
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
    (tmp_path / "...yaml").write_text(MINIMAL)
    assert config_file.load(tmp_path / "...yaml").directory == Path("runs/run")


def test_compile_true_of_older_configs_means_regions(tmp_path):
    ways = {"false": False, "true": "regions", "regions": "regions", "graph": "graph"}
    for text, mode in ways.items():
        assert load(tmp_path, MINIMAL, f"train.compile={text}").train.compile == mode


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


def test_every_key_is_described():
    table = config_file.describe()
    for key, field in config.FIELDS.items():
        assert len(field.description) >= 8, key
        assert re.search(rf"^  {re.escape(key)} \(.+\)$", table, re.MULTILINE), key
        assert field.description in table, key


def test_every_default_is_itself_accepted():
    tree: dict[str, dict] = {}
    for key, field in config.FIELDS.items():
        section, name = key.split(".")
        if not field.is_required():
            tree.setdefault(section, {})[name] = copy.deepcopy(field.default)
    assert built(**tree) == built()


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


@pytest.mark.parametrize(
    "kind, own",
    [
        ("rmsprop_tf", {"alpha": 0.9, "eps": 1.0, "momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "nesterov": False}),
        ("adamw", {"betas": [0.9, 0.999], "eps": 1e-8}),
        ("lamb", {"betas": [0.9, 0.999], "eps": 1e-6}),
    ],
)
def test_each_optimizer_has_its_own_keys_with_its_own_defaults(tmp_path, kind, own):
    cfg = load(tmp_path, MINIMAL, f"optim.kind={kind}", "optim.lr=0.1")
    assert cfg.optim.hyper_parameters == own
    assert built(**{k: v for k, v in cfg.model_dump().items() if k != "run"}).optim == cfg.optim
    others = {"alpha": 0.5, "eps": 0.5, "momentum": 0.5, "nesterov": True, "betas": [0.5, 0.5]}
    for key in others.keys() & own.keys():
        changed_to = load(tmp_path, MINIMAL, f"optim.kind={kind}", "optim.lr=0.1",
                          f"optim.{key}={json.dumps(others[key])}")  # fmt: skip
        assert changed_to.optim.hyper_parameters == own | {key: others[key]}
    for key in others.keys() - own.keys():
        value = f"optim.{key}={json.dumps(others[key])}"
        with pytest.raises(ConfigError, match=rf"optim\.{key}=.*: not a key of optim\.kind={kind}"):
            load(tmp_path, MINIMAL, f"optim.kind={kind}", "optim.lr=0.1", value)


def test_a_recorded_step_has_one_size(tmp_path):
    sizes = "data.train_sizes=[[0, 224], [0.6, 299]]"
    assert load(tmp_path, MINIMAL, sizes).data.sizes == [(0, 224), (0.6, 299)]
    with pytest.raises(ConfigError, match=r"train\.compile=graph .* not with data\.train_sizes"):
        load(tmp_path, MINIMAL, sizes, "train.compile=graph")


def test_keys_that_just_agree_are_accepted():
    agreeing = built(
        model={"aux_logits": True},
        data={"image_size": 299},
        schedule={"warmup_epochs": 4.9, "min_lr": 0.1},
        train={"epochs": 5},
        optim={"lr": 0.1},
    )
    assert agreeing.model.aux_logits


def test_all_mistakes_are_reported_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "data: {train: 3}\noptim: {lr: fast, beta: [1]}\ntrian: {epochs: 1}\n")
    lines = str(caught.value).splitlines()
    assert [re.split("[=:]", line)[0] for line in lines] == [
        *["data.train", "data.val", "optim.lr", "optim.beta"],
        "trian",
    ]


@pytest.mark.parametrize("key", ["data.train", "data.val", "data.trian", None])
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
    """None: where the key was forgotten."""
    override = url if key is None else f"{key}={url}"
    words = r"://.*an override is written section\.key=" if key is None else f"{key}=.*://"
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path, MINIMAL, override)
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://host:8080/a@b/", "s3://bucket/a@b", "http://host:80"])
def test_a_url_without_one_is_accepted(tmp_path, url):
    assert load(tmp_path, MINIMAL, f"data.train={url}").data.train == url


@pytest.mark.parametrize("text", ["", "train: {epochs: 1}\n", "data:\n", "data: {}\n"])
def test_required_keys_are_asked_for_by_name(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    for key in ("data.train", "data.val"):
        assert f"{key}: must be given" in str(caught.value)


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


def test_a_missing_file_a_directory_and_a_pipe_are_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: cannot be read: .*not a regular file"):
        config_file.load(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such config file"):
        config_file.load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        config_file.load(tmp_path)


# ------------------------------------------------------------------------------- secrets of URLs


def test_what_is_no_secret_stays():
    for text in (
        "https://host.example:8080/a/b: no such object",
        "s3://bucket/train-00001.tar: 503, tried again",
        "runs/a@b: why? because #1",
        "timm:inception_resnet_v2.tf_in1k: not available",
    ):
        assert without_secrets(text) == text


def test_user_password_query_and_fragment_go():
    shown = "https://…@host.example:8080/a/b?…"
    assert without_secrets(f"at {SECRET_URL} now") == f"at {shown} now"
    assert without_secrets(f"{SECRET_URL}: no") == f"{shown}: no"
    assert without_secrets("s3://KEY:sec/ret@bucket/a") == "s3://…@bucket/a"
    assert without_secrets("https://host/a#s3cr3t") == "https://host/a#…"
    assert "s3cr3t" not in without_secrets(f"{Path(SECRET_URL)}: no such file")


@pytest.mark.parametrize("read", [weights.read, config_file.load], ids=["weights", "config"])
def test_programs_do_not_repeat_them(read, capsys):
    body = functools.partial(read, SECRET_URL)
    assert cli.exit_status(body) == 1
    said = capsys.readouterr().err
    assert "host.example" in said and "no such" in said and "s3cr3t" not in said


# ------------------------------------------------------------------------------- errors of one rank


@pytest.mark.parametrize("kind", [DataError, ImageError, StorageError, WorkerError, OSError])
def test_what_only_one_rank_knows_is_said_by_that_rank(kind, monkeypatch, capsys):
    def body() -> int:
        raise kind("words")

    take(monkeypatch, Place(1, 2, 1, 2))
    assert cli.exit_status(body) == 1
    assert ("rank 1: words" in capsys.readouterr().err) == (kind is not DataError)


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
    assert config_file.load(path).run.name == path.stem
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"


# ------------------------------------------------------------------------------- continuing a run


def changed(key: str, value: object, **sections: dict) -> list[str]:
    """Differences once `key` of a config has been changed."""
    before = built(**sections).model_dump()
    after = copy.deepcopy(before)
    section, name = key.split(".")
    assert after[section][name] != value
    after[section][name] = value
    return resume.differences(before, after)


def test_machine_keys_are_keys():
    assert set(KEYS) >= config.MACHINE_KEYS


def test_continuing_a_run_notices_its_experiment_but_not_its_machine():
    for key in KEYS:
        lines = changed(key, "something else")
        is_free = key in config.MACHINE_KEYS or key == "train.epochs"
        assert len(lines) == (0 if is_free else 1), key
        assert all(line.startswith(f"{key}: ") and "'something else'" in line for line in lines)


def test_what_makes_another_experiment_is_no_machine_key():
    keys = {"run.seed", "train.global_batch", "optim.lr", "data.image_size", "model.blocks"}
    keys.add("train.accelerate")  # other sums are rounded, and optimizer slots have other names
    assert not config.MACHINE_KEYS & keys


def test_a_run_may_move_to_another_machine():
    keys = {"train.micro_batch", "data.workers", "data.train", "data.classes", "run.device"}
    assert keys <= config.MACHINE_KEYS


def test_a_staircase_run_may_be_made_longer_but_a_cosine_one_may_not():
    assert changed("train.epochs", 300.0) == []
    lines = changed("train.epochs", 300.0, schedule={"kind": "cosine"})
    assert lines == ["train.epochs: 200 -> 300.0"]


def test_sizes_that_change_at_a_share_of_the_epochs_fix_these():
    lines = changed("train.epochs", 300.0, data={"train_sizes": [[0, 224], [0.6, 299]]})
    assert lines == ["train.epochs: 200 -> 300.0"]


def test_a_key_that_an_older_config_lacks_has_its_default():
    before = built().model_dump()
    after = copy.deepcopy(before)
    del before["optim"]["layer_decay"], before["loss"]["class_weights"], before["model"]["init"]
    assert resume.differences(before, after) == []
    after["optim"]["layer_decay"] = 0.5
    assert resume.differences(before, after) == ["optim.layer_decay: 1.0 -> 0.5"]


def test_equal_configs_do_not_differ():
    dumped = built().model_dump()
    assert resume.differences(dumped, copy.deepcopy(dumped)) == []


def test_another_optimizer_takes_nothing_of_the_files(tmp_path):
    text = (
        MINIMAL + "optim: {lr: 0.045, eps: 1.0, momentum: 0.9, weight_decay: 1.0, clip_norm: 3.0}\n"
    )
    for given in (MINIMAL, text):
        with pytest.raises(ConfigError, match=r"optim\.lr must be given with optim\.kind=adamw"):
            load(tmp_path, given, "optim.kind=adamw")
    optim = load(tmp_path, text, "optim.kind=adamw", "optim.lr=0.1").optim
    assert (optim.lr, optim.eps, optim.momentum) == (0.1, 1e-8, None)
    assert (optim.weight_decay, optim.clip_norm) == (4e-5, 3.0)
    assert load(tmp_path, text, "optim.kind=rmsprop_tf").optim.weight_decay == 1.0
