"""A slow network for real: hosts that are network namespaces of this machine, joined by a bridge, each with a rate.

    h0 --- veth, tbf --- bridge --- veth, tbf --- h1 ...

A token-bucket filter on the host's end limits what a host sends (tc-tbf(8)). It needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

NETWORK = "10.77.0.0/24"
BURST_SECONDS = 1e-3  # of the rate may be sent at once after a pause, and no less than ...
LEAST_BURST = 5 * 1024  # ... so many bytes, several packets
QUEUE = "4000ms"  # that a host may have waiting to be sent: long, so that nothing is dropped


@dataclass(frozen=True)
class Host:
    """A namespace. `prefix` runs a command inside, `environment` tells gloo and torchrun how to find the others."""

    name: str
    address: str
    first_address: str

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]

    @property
    def environment(self) -> Mapping[str, str]:
        return {"GLOO_SOCKET_IFNAME": "net0", "MASTER_ADDR": self.first_address, "TP_SOCKET_IFNAME": "net0"}


def impossible() -> str | None:
    """Why this process cannot make namespaces, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc", "sysctl") if shutil.which(program) is None]
    if missing:
        return f"network namespaces need iproute2 and sysctl: no {' and no '.join(missing)} here"
    try:
        with hosts(1, 1.0, "hsp-probe"):  # a kernel may have namespaces and lack veth, bridges or tbf
            pass
    except subprocess.CalledProcessError as error:
        return f"this machine refuses {' '.join(error.cmd)!r}: {error.stderr.strip()}"
    return None


@contextmanager
def hosts(count: int, megabits: float, base: str = "hsp") -> Iterator[list[Host]]:
    """So many hosts, each of which sends at most `megabits` per second; gone at the end, whatever happens. Their names
    begin with `base` and this process."""
    base = f"{base}-{os.getpid()}"
    burst = max(LEAST_BURST, round(megabits * 1e6 / 8 * BURST_SECONDS))
    switch, names = f"{base}-switch", [f"{base}-h{i}" for i in range(count)]
    with ExitStack() as made:
        for name in (switch, *names):
            _ip("netns", "add", name)
            made.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for i, name in enumerate(names):
            port = f"port{i}"
            _ip("-n", name, "link", "add", "net0", "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", name, "addr", "add", f"{_address(i)}/24", "dev", "net0")
            _ip("-n", name, "link", "set", "net0", "up")
            _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            shape = ["root", "tbf", "rate", f"{megabits:g}mbit", "burst", str(burst), "latency", QUEUE]
            # So that the rate is the limit, and not what TCP makes of a pause.
            _run(["ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_slow_start_after_idle=0"])
            _ip("-n", name, "route", "change", NETWORK, "dev", "net0", "quickack", "1")
            _run(["tc", "-n", name, "qdisc", "add", "dev", "net0", *shape])
        yield [Host(name, _address(i), _address(0)) for i, name in enumerate(names)]


def _address(host: int) -> str:
    return NETWORK.replace("0/24", str(host + 1))


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
