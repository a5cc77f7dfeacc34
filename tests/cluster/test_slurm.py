"""scripts/launch/slurm.sbatch on a real Slurm, unpacked and started for these tests.

python -m pytest -m cluster tests/cluster/test_slurm.py --report docs/reliability.md
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from ports import free_port
from programs import ROOT, environment
from same_run import assert_same_end, steps
from slurm_cluster import Slurm
from small_run import STEPS, arguments

from irv2.report.markdown import replace_section

pytestmark = pytest.mark.cluster
SBATCH = "scripts/launch/slurm.sbatch"
TWO_NODES, ONE_NODE = ("--nodes=2", 1), ("--nodes=1", 2)  # and ranks a node


@pytest.fixture(scope="module")
def slurm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Slurm]:
    """A cluster; its parameter, if a test gives one: whom a signal to a job's step reaches."""
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    try:
        with slurm_cluster.running(folder, getattr(request, "param", "linuxproc")) as cluster:
            yield cluster
    except slurm_cluster.SlurmMissingError as error:
        pytest.skip(f"{error}: slurm.sbatch is NOT tested")


def submit(
    slurm: Slurm, logs: Path, shape: tuple[str, int], *words: object, program: str = "train.py"
) -> int:
    """Submit the script as it is, but for the time, on CPUs; returns the job's number."""
    nodes, ranks_per_node = shape
    variables = {
        "PYTHON": sys.executable,
        "PROGRAM": program,
        "LOGS": str(logs),
        "PORT": str(free_port()),
        "RANKS_PER_NODE": str(ranks_per_node),
    }
    options = [nodes, "--gpus-per-node=0", "--cpus-per-task=1", f"--output={logs}/job-%j.out"]
    options += [f"--chdir={ROOT}", "--time=20"]
    logs.mkdir(exist_ok=True)
    slurm_with = Slurm(slurm.folder, {**environment(), **slurm.environment, **variables})
    return int(slurm_with.ask("sbatch", "--parsable", *options, ROOT / SBATCH, *words))


def output(logs: Path, job: int) -> str:
    path = logs / f"job-{job}.out"
    return path.read_text() if path.exists() else ""


def wait_for(slurm: Slurm, logs: Path, job: int, text: str) -> None:
    """Wait until a job has said something."""
    while text not in output(logs, job):
        state = slurm.state(job)["JobState"]
        assert state not in slurm_cluster.ENDED, f"{state}: {output(logs, job)}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def on_one_node(slurm: Slurm, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two ranks on one node that nothing interrupted."""
    place = tmp_path_factory.mktemp("on_one_node")
    job = submit(slurm, place / "logs", ONE_NODE, *arguments(config, place / "run"))
    state, said = slurm.wait(job), output(place / "logs", job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), said
    return place / "run"


@pytest.mark.parametrize("slurm", ["pgid", "linuxproc"], indirect=True)
def test_a_job_at_its_limit_is_requeued_and_ends_as_one_that_was_not(
    slurm: Slurm, config: Path, on_one_node: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    """On two nodes. The limit is set when training has begun, however long that took: to two or
    three minutes from then, so that the warning comes within one; each of 6 steps takes 15 s.
    """
    logs = tmp_path / "logs"
    words = ("slow-step=15", *arguments(config, tmp_path / "run", "data.workers=1"))
    job = submit(slurm, logs, TWO_NODES, *words, program="tests/harmed.py")
    wait_for(slurm, logs, job, "step 1/")
    hours, minutes, _ = map(int, slurm.state(job)["RunTime"].split(":"))
    slurm.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 3}")
    wait_for(slurm, logs, job, "requeued")
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    state, said = slurm.wait(job), output(logs, job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), said
    assert "start 0: all 2 ranks stopped with a checkpoint (75): requeued" in said
    assert "continuing after step" in said
    assert_same_end(tmp_path / "run", on_one_node)
    for start in ("0", "1"):  # a file for every rank of every start
        found = [path.read_text() for path in (logs / str(job) / start).rglob("stdout.log")]
        assert len(found) == 2 and sum(f"/{STEPS}" in text for text in found) == 1
    if (page := request.config.getoption("--report")) is not None:
        controller = (slurm.folder / "daemons.log").read_text()
        replace_section(page, "slurm", requeue_log(said, controller, job, tmp_path))


def test_a_mistake_is_not_requeued(slurm: Slurm, config: Path, tmp_path: Path):
    words = arguments(config, tmp_path / "run", "optim.lr=-1")
    job = submit(slurm, tmp_path / "logs", ONE_NODE, *words)
    state = slurm.wait(job, timeout_s=300)  # requeued, it would never end
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")
    said = output(tmp_path / "logs", job)  # torchrun ends one rank with SIGTERM when the other has
    assert re.search(r"the 2 ranks that left one: 1( 143)?; not requeued", said), said


def test_a_cancelled_job_has_saved_and_stays_cancelled(slurm: Slurm, config: Path, tmp_path: Path):
    words = ("slow-step=5", *arguments(config, tmp_path / "run"))
    job = submit(slurm, tmp_path / "logs", ONE_NODE, *words, program="tests/harmed.py")
    wait_for(slurm, tmp_path / "logs", job, "step 1/")
    slurm.ask("scancel", job)
    state = slurm.wait(job)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    assert steps(tmp_path / "run")


def requeue_log(said: str, controller: str, job: int, folder: Path) -> str:
    """Lines of a job's output and Slurm's controller on its starts and ends, paths shortened."""
    told = ("slurm.sbatch:", "slurmstepd", "[default0]:continuing", "[default0]:step")
    told += ("[default0]:stopped", "[default0]:finished")
    lines = [line for line in said.splitlines() if line.startswith(told)]
    lines += ["", *(line for line in controller.splitlines() if f"JobId={job} " in f"{line} ")]
    return "```\n" + "\n".join(lines).replace(f"{folder}/", "") + "\n```"
