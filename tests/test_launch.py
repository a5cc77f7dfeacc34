"""Checks of scripts/launch that need no cluster; with one: cluster/test_slurm.py."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT
from torch.distributed import run as torchrun

from irv2 import config_file

LAUNCH = ROOT / "scripts" / "launch"
RANK = LAUNCH / "rank.sh"


# ---------------------------------------------------------------------------------- Kubernetes


def schema(kind: str) -> type:
    """The published model of a kind of object."""
    name = "kubeflow_trainer_api.models"
    models = pytest.importorskip(name, reason=f"no {name}: the TrainJob is NOT checked")
    return {
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
    }[kind]


@pytest.fixture
def objects() -> dict[str, dict[str, Any]]:
    """The file's objects by name."""
    documents = yaml.safe_load_all((LAUNCH / "kubeflow-trainjob.yaml").read_text())
    return {document["metadata"]["name"]: document for document in documents}


def is_known(document: dict[str, Any]) -> bool:
    """True if the schema takes the object and keeps every key; models drop what they don't know."""
    return schema(document["kind"]).from_dict(document).to_dict() == document


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every mapping with keys of the schema's within an object."""
    free = {"requests", "limits"}  # whose keys are names of resources
    if isinstance(value, dict) and not free & set(path):
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, key))


def test_the_trainjob_and_its_claims_follow_the_published_schema(objects):
    assert sorted(objects) == ["irv2", "irv2-data", "irv2-runs"]
    assert all(map(is_known, objects.values()))


def test_a_key_that_the_schema_lacks_is_noticed_wherever_it_is(objects):
    job = objects["irv2"]
    paths = list(places(job))
    assert len(paths) > 20
    for path in paths:
        wrong = copy.deepcopy(job)
        place = wrong
        for key in path:
            place = place[key]
        place["noSuchKey"] = "x"
        assert not is_known(wrong), path


def test_the_trainjob_says_what_train_py_takes(objects):
    arguments = objects["irv2"]["spec"]["trainer"]["args"]
    parsed = torchrun.parse_args(arguments)
    assert (parsed.training_script, parsed.rdzv_backend) == ("/irv2/train.py", "c10d")
    option, *overrides = parsed.training_script_args
    cfg = config_file.load(str(ROOT / option.removeprefix("--config=/irv2/")), overrides)
    pod = pod_of(objects["irv2"])
    mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
    for directory in (cfg.directory, Path(cfg.data.train), Path(cfg.data.val)):
        assert "/".join(directory.parts[:2]).replace("//", "/") in mounts
    claims = {
        v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]
    }
    assert set(claims) == set(mounts.values())
    assert set(claims.values()) - {None} == set(objects) - {"irv2"}


def test_pods_are_given_longer_than_torchrun_gives_its_ranks(objects):
    variables = {each["name"]: each["value"] for each in objects["irv2"]["spec"]["trainer"]["env"]}
    assert (
        30
        < int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        < pod_of(objects["irv2"])["terminationGracePeriodSeconds"]
    )


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    return node["template"]["spec"]["template"]["spec"]


# ---------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize("script", ["slurm.sbatch", "rank.sh"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_slurm_reads_every_option_of_the_script():
    """It stops at the first line that is neither blank nor a comment."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(options) == 10 and max(options) < first_command


# What the script asks of Slurm: an address, ranks that leave their status, a place in the queue.
SLURM = {
    "scontrol": 'case "$*" in *hostnames*) echo here ;; *node*) echo NodeAddr=localhost ;; esac',
    "srun": 'for rank in 0 1; do echo 75 > "$STATUSES/rank-$rank"; done; exit 1',
}


def test_ranks_are_counted_wherever_their_files_lie(tmp_path):
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    facts = {"JOB_ID": 7, "NNODES": 1, "JOB_NODELIST": "here"}
    environment = {f"SLURM_{name}": str(value) for name, value in facts.items()}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RANKS_PER_NODE": "2"}
    environment |= {"PYTHON": sys.executable, "PROGRAM": str(LAUNCH.parents[1] / "train.py")}
    environment["LOGS"] = str(tmp_path / "logs\nof two lines")
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 75, done.stderr
    assert "all 2 ranks stopped with a checkpoint (75): requeued" in done.stdout


def test_slurm_warns_earlier_than_torchrun_loses_patience():
    text = (LAUNCH / "slurm.sbatch").read_text()
    (warning,) = (line for line in text.splitlines() if line.startswith("#SBATCH --signal="))
    timeout = text.partition("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")[2].split()[0]
    assert int(timeout) < int(warning.rpartition("@")[2])


@pytest.mark.parametrize("status", [0, 1, 75])
def test_a_rank_leaves_its_status(tmp_path, status):
    environment = {"STATUSES": str(tmp_path), "RANK": "3", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([RANK, "bash", "-c", f"exit {status}"], env=environment)
    assert ended.returncode == status
    assert [path.name for path in tmp_path.iterdir()] == ["rank-3"]
    assert (tmp_path / "rank-3").read_text() == f"{status}\n"


@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_rank_that_is_signalled_decides_for_itself_when_it_ends(tmp_path, name):
    """As torchrun does it: the signal goes to all processes of the rank's group."""
    environment = {"STATUSES": str(tmp_path), "RANK": "0", "PATH": "/usr/bin:/bin"}
    rank = f"trap 'sleep 0.2; exit 75' {name}; kill -s {name} 0; sleep 20 & wait; exit 1"
    ended = subprocess.run([RANK, "bash", "-c", rank], env=environment, start_new_session=True)
    assert ended.returncode == 75
    assert (tmp_path / "rank-0").read_text() == "75\n"
