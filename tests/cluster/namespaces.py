"""Hosts made of network namespaces, each with a name and one Ethernet link to a switch.

Everything is in namespaces of its own, so the machine's network is not touched, and goes with
them. Needs iproute2 and the right to make namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from programs import ROOT, children, environment

INTERFACE = "eth0"
PORT = 29400
FRAME_BYTES = "9000"  # few large frames, for a delayed link is a Python program
# Each host has a name of its own for the messages that tell one.
NAMED = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')


def ip(*arguments: str) -> None:
    """Run iproute2's ip. Raises CalledProcessError, whose stderr tells why."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Host:
    """A network namespace with the address 10.77.0.<number>, and what was started in it."""

    def __init__(self, number: int, switch: str, delay_ms: float = 0.0) -> None:
        """`delay_ms`: what a frame takes on the link, each way."""
        self.number, self.name = number, f"{switch}-host{number}"
        self.address = f"10.77.0.{number}"
        self._processes: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", self.name)
        port = f"port{number}"
        self._cable: subprocess.Popen[str] | None = None
        if delay_ms > 0:
            self._cable = delay_line(self.name, switch, port, delay_ms)
        else:
            ends = (INTERFACE, "netns", self.name, "type", "veth", "peer", "name", port)
            ip("link", "add", *ends, "netns", switch)
        for place, device in ((self.name, INTERFACE), (switch, port)):
            ip("-n", place, "link", "set", device, "mtu", FRAME_BYTES)
        ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", INTERFACE)
        ip("-n", self.name, "link", "set", "lo", "up")
        self.plug("up")

    def plug(self, state: str) -> None:
        """Have the link "up" or "down"."""
        ip("-n", self.name, "link", "set", INTERFACE, state)

    def limit(self, mbit_s: int) -> None:
        """Let no more than so many Mbit/s leave the host."""
        shape = ["rate", f"{mbit_s}mbit", "burst", "256kb", "latency", "400ms"]
        command = ["tc", "-n", self.name, "qdisc", "replace", "dev", INTERFACE, "root", "tbf"]
        subprocess.run([*command, *shape], check=True, capture_output=True, text=True)

    def start(
        self,
        log: Path,
        *command: object,
        nnodes: str,
        torchrun: Sequence[str] = (),
        before: Sequence[object] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a program under torchrun as a person would on this host; its output is in `log`.

        The first host keeps the rendezvous. `before`: a command that executes its arguments.
        """
        options = [
            f"--nnodes={nnodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=10.77.0.1:{PORT}",
            f"--rdzv-conf=is_host={self.number == 1},last_call_timeout=15",
            f"--local-addr={self.address}",
            *torchrun,
        ]
        words = ["ip", "netns", "exec", self.name, *NAMED, f"host{self.number}", *before]
        words += [sys.executable, "-m", "torch.distributed.run", *options, "--", ROOT / command[0]]
        own = {"GLOO_SOCKET_IFNAME": INTERFACE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [str(word) for word in (*words, *command[1:])],
                env=environment() | own,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return process

    def vanish(self) -> None:
        """Take the link down and kill every process, so that nobody is told."""
        self.plug("down")
        self.kill()

    def kill(self) -> None:
        """SIGKILL whatever was started here and is still there."""
        for process in self._processes:
            if process.poll() is None:
                for pid in (process.pid, *children(process.pid)):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()

    def remove(self) -> None:
        """End all that runs here; the namespace is left to be deleted."""
        self.kill()
        if self._cable is not None:
            self._cable.kill()
            self._cable.communicate()


def delay_line(namespace: str, switch: str, port: str, delay_ms: float) -> subprocess.Popen[str]:
    """A slow cable from a host to a port of the switch."""
    ends = [namespace, INTERFACE, switch, port]
    command = [sys.executable, str(Path(__file__).with_name("delay_line.py")), *ends, str(delay_ms)]
    cable = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert cable.stdout is not None and cable.stdout.readline() == "ready\n"
    for place, device in ((namespace, INTERFACE), (switch, port)):
        ip("-n", place, "link", "set", device, "txqueuelen", "10000")
    return cable


@contextmanager
def hosts(count: int, delay_ms: float = 0.0) -> Iterator[list[Host]]:
    """So many hosts on one switch, the first next to it and the links of the others `delay_ms`
    long; removed at the end with all that runs in them."""
    switch = f"irv2-{os.getpid()}"
    made: list[Host] = []
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number in range(1, count + 1):
            made.append(Host(number, switch, delay_ms if number > 1 else 0.0))
        yield made
    finally:
        for host in made:
            host.remove()
        for name in Path("/run/netns").glob(f"{switch}*"):
            ip("netns", "delete", name.name)


def reason_against() -> str | None:
    """Why this machine can have no such hosts; None where it can."""
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is missing (Debian: iproute2, util-linux)"
    try:
        with hosts(1) as (host,):
            host.limit(100)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    return None


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes], times: int = 1) -> None:
    """Wait until a program's output has `text` so many times."""
    deadline = time.monotonic() + 600
    while (said := log.read_text()).count(text) < times:
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.2)


def finished(process: subprocess.Popen[bytes], log: Path) -> int:
    """A program's exit status, at its end."""
    try:
        return process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        raise AssertionError(log.read_text()) from None
