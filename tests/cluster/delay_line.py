"""A cable on which every frame takes longer: python delay_line.py NETNS DEVICE NETNS DEVICE MS.

Makes a tap device in each network namespace and carries frames between them, each MS milliseconds
after it came, until it is killed. What tc's netem does, for kernels that are built without it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
TAP_WITHOUT_HEADER = 0x1002  # IFF_TAP | IFF_NO_PI
LARGEST_FRAME = 65_600


def open_tap(namespace: str, name: str) -> int:
    """Make a tap device in a namespace; returns its descriptor. This thread stays there."""
    with open(f"/run/netns/{namespace}") as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", name.encode(), TAP_WITHOUT_HEADER))
    return tap


def carry(source: int, target: int, delay_s: float) -> None:
    """Pass on frames for ever, each `delay_s` after it came."""
    under_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()

    def deliver() -> None:
        while True:
            due, frame = under_way.get()
            time.sleep(max(0.0, due - time.monotonic()))
            with suppress(OSError):  # the other end is down: lost, as on any cable
                os.write(target, frame)

    threading.Thread(target=deliver, daemon=True).start()
    while True:
        frame = os.read(source, LARGEST_FRAME)
        under_way.put((time.monotonic() + delay_s, frame))


if __name__ == "__main__":
    one, other = open_tap(*sys.argv[1:3]), open_tap(*sys.argv[3:5])
    delay_s = float(sys.argv[5]) / 1000
    print("ready", flush=True)
    threading.Thread(target=carry, args=(one, other, delay_s), daemon=True).start()
    carry(other, one, delay_s)
