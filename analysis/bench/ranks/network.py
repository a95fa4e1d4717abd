"""The networks that join ranks: this machine's loopback, or a slow one of network namespaces.

    h0 --- veth, tbf --- bridge --- veth, tbf --- h1 ...

Each namespace is a host. A token-bucket filter on its end of the link limits its sending rate (tc-tbf(8)). This needs
root and iproute2; without them the ranks pretend a slow link by waiting.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hybrid_sp.comm.link import Link

NETWORK = "10.77.0.0/24"
BURST_SECONDS = 1e-3  # the burst after a pause, in seconds at the full rate, and at least ...
LEAST_BURST = 5 * 1024  # ... this number of bytes, several packets
QUEUE = "4000ms"  # how long a packet may wait to be sent; long, so that the link drops none


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network of ranks: words for the report, and the command prefix and environment of each rank.

    link  the network that the ranks pretend; None for a real one
    """

    words: str
    ranks: list[tuple[list[str], dict[str, str]]]
    link: Link | None = None


def loopback(ranks: int) -> Network:
    """Return a network of processes on this machine."""
    shared = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": str(ranks)}
    places: list[tuple[list[str], dict[str, str]]] = [([], shared | {"LOCAL_RANK": str(i)}) for i in range(ranks)]
    return Network(words="one machine, loopback", ranks=places)


@contextmanager
def slow_link(ranks: int, megabits: float) -> Iterator[Network]:
    """Yield a network in which each rank is a host behind a link of this rate, or pretends to be one."""
    reason = impossible()
    if reason is None:
        with hosts(ranks, megabits) as found:
            words = f"{ranks} network namespaces, tc tbf {megabits:g} Mbit/s each"
            alone = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            yield Network(words=words, ranks=[(host.prefix, {**host.environment, **alone}) for host in found])
        return
    words = f"a pretended link of {megabits:g} Mbit/s and 0.1 ms ({reason})"
    yield Network(words=words, ranks=loopback(ranks).ranks, link=Link(latency=1e-4, bandwidth=megabits * 1e6 / 8))


@dataclass(frozen=True)
class Host:
    """The namespace of a host. `prefix` runs a command in it; with `environment` gloo and torchrun find the others."""

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
    """Return the reason that stops this process from making namespaces, or None if it can make them."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [program for program in ("ip", "tc", "sysctl") if shutil.which(program) is None]:
        return f"network namespaces need iproute2 and sysctl: no {' and no '.join(missing)} here"
    try:
        with hosts(1, 1.0, "hsp-probe"):  # a kernel may have namespaces and lack veth, bridges or tbf
            pass
    except subprocess.CalledProcessError as error:
        return f"this machine refuses {' '.join(error.cmd)!r}: {error.stderr.strip()}"
    return None


@contextmanager
def hosts(count: int, megabits: float, base: str = "hsp") -> Iterator[list[Host]]:
    """Make `count` hosts that each send at most `megabits` per second, and remove them at the end in any case.

    Their names begin with `base` and the number of this process.
    """
    base = f"{base}-{os.getpid()}"
    burst = max(LEAST_BURST, round(megabits * 1e6 / 8 * BURST_SECONDS))
    switch, names = f"{base}-switch", [f"{base}-h{i}" for i in range(count)]
    with ExitStack() as made:
        for name in (switch, *names):
            if not _exists(name):  # else "add" refuses, and it is not ours to remove
                made.callback(_remove, name)  # first, for a signal may come while it is made
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for i, name in enumerate(names):
            _ip("-n", name, "link", "add", "net0", "type", "veth", "peer", "name", f"port{i}", "netns", switch)
            _ip("-n", name, "addr", "add", f"{_address(i)}/24", "dev", "net0")
            _ip("-n", name, "link", "set", "net0", "up")
            _ip("-n", switch, "link", "set", f"port{i}", "master", "bridge0", "up")
            shape = ["root", "tbf", "rate", f"{megabits:g}mbit", "burst", str(burst), "latency", QUEUE]
            # Otherwise TCP restarts slowly after a pause, and the rate is not the limit.
            _run(["ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_slow_start_after_idle=0"])
            _ip("-n", name, "route", "change", NETWORK, "dev", "net0", "quickack", "1")
            _run(["tc", "-n", name, "qdisc", "add", "dev", "net0", *shape])
        yield [Host(name, _address(i), _address(0)) for i, name in enumerate(names)]


def _address(host: int) -> str:
    return NETWORK.replace("0/24", str(host + 1))


def _exists(name: str) -> bool:
    return _file(name).exists()


def _file(name: str) -> Path:
    return Path("/var/run/netns", name)


def _remove(name: str) -> None:
    """Remove a namespace. One that a signal has stopped half-way is a file alone, which `ip` does not remove."""
    if _exists(name):
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        _file(name).unlink(missing_ok=True)


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
