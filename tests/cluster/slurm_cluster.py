"""A real Slurm of two nodes on this machine: Debian's packages, unpacked but not installed.

Needs no rights, changes nothing outside the folder, and is gone when the folder is.
"""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ports import free_port

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("node1", "node2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmctldDebug=verbose
SlurmdParameters=config_overrides
MessageTimeout=60
TCPTimeout=30
"""
# cred_expire: a requeued job waits until its old credentials have expired, 120 s by default.


class SlurmMissingError(RuntimeError):
    """Slurm cannot be had on this machine."""


@dataclass(frozen=True)
class Slurm:
    """A running cluster. `environment` is what its commands need."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *command: object, tries: int = 1) -> str:
        """The output of one of Slurm's commands. Raises CalledProcessError if it fails."""
        words = [str(word) for word in command]
        result = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=120
        )
        if result.returncode != 0 and tries > 1:
            return self.ask(*command, tries=tries - 1)
        result.check_returncode()
        return result.stdout

    def state(self, job: int) -> dict[str, str]:
        """Output of `scontrol show job`, asked again if a busy machine answers too late."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job, tries=3).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: int, timeout_s: float = 1200) -> dict[str, str]:
        """Wait until a job has ended for good; returns its last state."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.state(job)
            if state["JobState"] in ENDED:
                return state
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is still {state['JobState']}")
            time.sleep(1)


def unpack(folder: Path) -> Path:
    """Fetch the packages and unpack them below `folder`. Raises SlurmMissingError."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise SlurmMissingError("no apt-get and dpkg here")
    (folder / "packages" / "partial").mkdir(parents=True)
    command = ["apt-get", "install", "--yes", "--no-install-recommends", "--download-only"]
    options = (f"Dir::Cache::archives={folder}/packages", "Debug::NoLocking=true")
    command += [part for option in options for part in ("-o", option)]
    fetched = subprocess.run([*command, *PACKAGES], capture_output=True, text=True)
    if fetched.returncode != 0:
        reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SlurmMissingError(f"apt-get fetches no slurm ({reason}); apt-get update?")
    root = folder / "root"
    root.mkdir()
    for package in (folder / "packages").glob("*.deb"):
        subprocess.run(["dpkg", "--extract", package, root], check=True)
    return root


def write_configuration(folder: Path, plugins: Path, proctrack: str) -> None:
    """slurm.conf and munge's key."""
    host = socket.gethostname()
    names = {"folder": folder, "plugins": plugins, "host": host, "user": getpass.getuser()}
    lines = [CONF.format(port=free_port(), proctrack=proctrack, **names)]
    for node in NODES:
        address = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
        lines.append(f"NodeName={node} {address} CPUs=4 State=UNKNOWN\n")
    lines.append(f"PartitionName=all Nodes={','.join(NODES)} Default=YES State=UP\n")
    (folder / "slurm.conf").write_text("".join(lines))
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()


@contextmanager
def running(folder: Path, proctrack: str) -> Iterator[Slurm]:
    """Unpack and start Slurm in a new folder; at the end stop it and remove the folder.

    `proctrack`: whom a signal to a step reaches. "linuxproc": every process of it; "pgid", and
    "cgroup", which clusters prefer and few containers allow: the task, torchrun, alone.
    Raises SlurmMissingError where it cannot be had, RuntimeError where it does not start.
    """
    folder.mkdir(mode=0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        root = unpack(folder)
        libraries = f"usr/lib/{sysconfig.get_config_var('MULTIARCH')}"
        plugins = next(p for p in (root, Path("/")) if (p / libraries / "slurm-wlm").is_dir())
        plugins = plugins / libraries / "slurm-wlm"
        programs = f"{root}/usr/sbin:{root}/usr/bin:{os.environ['PATH']}:/usr/sbin"
        environment = {name: v for name, v in os.environ.items() if not name.startswith("SLURM")}
        environment |= {
            "PATH": programs,
            "LD_LIBRARY_PATH": f"{root / libraries}:{plugins}",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        write_configuration(folder, plugins, proctrack)

        def daemon(name: str, *options: object) -> None:
            command = [shutil.which(name, path=programs), *map(str, options)]
            with open(folder / "daemons.log", "a") as log:
                process = subprocess.Popen(  # in a session of its own: Ctrl-C is for the test
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            stack.callback(process.wait)
            stack.callback(process.terminate)

        files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        munge = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in files]
        daemon("munged", "--foreground", "--force", *munge)
        daemon("slurmctld-wlm", "-D")
        stepd = shutil.which("slurmstepd-wlm", path=programs)
        for node in NODES:
            daemon("slurmd-wlm", "-D", "-N", node, "-d", stepd)
        slurm = Slurm(folder, environment)
        wait_until_idle(slurm)
        stack.callback(end_jobs, slurm)
        yield slurm


def wait_until_idle(slurm: Slurm, timeout_s: float = 30) -> None:
    """Wait until all nodes can take jobs. Raises RuntimeError with what the daemons said."""
    deadline, states = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        try:
            states = slurm.ask("sinfo", "--noheader", "--Node", "--format=%T")
        except subprocess.CalledProcessError as error:
            states = error.stderr
        if states.split() == ["idle"] * len(NODES):
            return
        time.sleep(0.5)
    said = (slurm.folder / "daemons.log").read_text()[-2000:]
    raise RuntimeError(f"Slurm does not start on {platform.platform()}: {states}\n{said}")


def end_jobs(slurm: Slurm, timeout_s: float = 60) -> None:
    """Cancel every job and wait until no process of one is left."""
    slurm.ask("scancel", f"--user={getpass.getuser()}")
    deadline = time.monotonic() + timeout_s
    while slurm.ask("squeue", "--noheader", tries=3) and time.monotonic() < deadline:
        time.sleep(0.5)
