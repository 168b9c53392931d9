"""Several hosts on one machine: network namespaces with their own host names, joined by a bridge, each with an sshd.

Everything is made under a prefix of this process and taken away again, in the order the kernel needs: processes first,
then interfaces, then namespaces.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_LABS = itertools.count()

__all__ = ["Lab", "lab"]

SUBNET, OTHER_SUBNET = "10.77.0", "10.78.0"
"""The network of ``eth0``, and that of ``eth1``, which jobs are told not to use."""


@dataclass(frozen=True)
class Host:
    """One namespace."""

    name: str
    namespace: str
    address: str
    sshd: int
    """Process id of its sshd."""


@dataclass(frozen=True)
class Lab:
    """The hosts that are up."""

    hosts: Sequence[Host]

    def start(
        self, host: Host, command: Sequence[str], *, cwd: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a host, in a session of its own."""
        return subprocess.Popen(
            [*inside(host.namespace, host.name), *command],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, host: Host, command: Sequence[str], *, timeout: float, cwd: Path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host; the whole process group is killed when time is out."""
        job = self.start(host, command, cwd=cwd, env=env)
        try:
            out, err = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            out, err = job.communicate()
            raise AssertionError(f"still running after {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
        except BaseException:
            os.killpg(job.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, job.returncode, out, err)

    def listening(self, host: Host) -> list[tuple[str, int]]:
        """(address, port) of every TCP socket that listens on a host, without the sshd's."""
        shown = subprocess.run(
            ["ip", "netns", "exec", host.namespace, "cat", "/proc/net/tcp", "/proc/net/tcp6"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        found = []
        for line in shown.stdout.splitlines():
            words = line.split()
            if words[0] == "sl" or words[3] != "0A":
                continue
            address, _, port = words[1].partition(":")
            # The kernel shows words of four bytes, each in the order of this machine.
            raw = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
            found.append((str(ipaddress.ip_address(raw)), int(port, 16)))
        return [entry for entry in found if entry[1] != 22]

    def processes(self) -> list[int]:
        """Processes in the namespaces other than the sshds."""
        return [pid for host in self.hosts for pid in self.processes_of(host)]

    def processes_of(self, host: Host) -> list[int]:
        """Processes on a host other than its sshd and what that has started to log somebody in."""
        return [pid for pid in _processes(host.namespace) if pid != host.sshd and not _is_sshd(pid)]


def inside(namespace: str, name: str) -> list[str]:
    """The words before a command that put it on a host."""
    return ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, (command, done.stderr)


def _processes(namespace: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, timeout=30, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
    except OSError:
        return True  # it has ended meanwhile


@contextlib.contextmanager
def lab(directory: Path, count: int = 2, rate: str | None = None, second_network: bool = False) -> Iterator[Lab]:
    """Bring up ``count`` hosts named h1, h2, ...

    Args:
        directory: For keys, sshd's files and logs.
        count: How many.
        rate: Limit of each link as ``tc`` writes it (``100mbit``); unlimited if None.
        second_network: Whether each host has an ``eth1`` in another network too.
    """
    # A namespace may take a while to go: the next laboratory of this process has names of its own.
    prefix = f"hv{os.getpid() % 10000}{next(_LABS)}"
    bridge = f"{prefix}b"
    names = [(f"h{i + 1}", f"{prefix}h{i + 1}", f"{SUBNET}.{i + 1}") for i in range(count)]
    hosts: list[Host] = []
    try:
        _keys(directory)
        for made in [bridge, f"{bridge}2"][: 1 + second_network]:
            _do("ip", "link", "add", made, "type", "bridge")
            _do("ip", "link", "set", made, "up")
        for name, namespace, address in names:
            _configure(directory, namespace, names)
            _do("ip", "netns", "add", namespace)
            _connect(namespace, f"{prefix}v{name}", bridge, "eth0", address)
            if second_network:
                other = address.replace(SUBNET, OTHER_SUBNET)
                _connect(namespace, f"{prefix}w{name}", f"{bridge}2", "eth1", other)
            _do("ip", "-n", namespace, "link", "set", "lo", "up")
            if rate:
                limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
                _do("tc", "-n", namespace, "qdisc", "add", "dev", "eth0", "root", *limit)
            hosts.append(Host(name, namespace, address, _sshd(directory, name, namespace)))
        yield Lab(hosts)
    finally:
        for _, namespace, _ in names:
            _end_processes(namespace)
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=30, check=False)
            shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)
        for made in (bridge, f"{bridge}2"):
            subprocess.run(["ip", "link", "delete", made], capture_output=True, timeout=30, check=False)
        with contextlib.suppress(OSError):
            os.rmdir("/etc/netns")


def _connect(namespace: str, outer: str, bridge: str, inner: str, address: str) -> None:
    _do("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", namespace)
    _do("ip", "link", "set", outer, "master", bridge, "up")
    _do("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", inner)
    _do("ip", "-n", namespace, "link", "set", inner, "up")


def _keys(directory: Path) -> None:
    for name in ("host", "user"):
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name))
    shutil.copy(directory / "user.pub", directory / "authorized_keys")


def _configure(directory: Path, namespace: str, names: Sequence[tuple[str, str, str]]) -> None:
    """Files that ``ip netns exec`` mounts over /etc on this host only: names, and how its ssh finds its keys."""
    etc = Path("/etc/netns") / namespace
    (etc / "ssh").mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, _, address in names)]
    (etc / "hosts").write_text("\n".join(lines) + "\n")
    known = directory / "known_hosts"
    (etc / "ssh" / "ssh_config").write_text(
        f"Host *\n  IdentityFile {directory / 'user'}\n  UserKnownHostsFile {known}\n  LogLevel ERROR\n"
        "  StrictHostKeyChecking accept-new\n"
    )


def _sshd(directory: Path, name: str, namespace: str) -> int:
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, as its service makes it
    sshd = subprocess.Popen(
        [
            *inside(namespace, name),
            *("/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", str(directory / "host")),
            *("-o", f"AuthorizedKeysFile={directory / 'authorized_keys'}", "-o", "StrictModes=no"),
            *("-o", "PidFile=none", "-o", "PermitRootLogin=yes", "-o", "UsePAM=no", "-o", "MaxStartups=50"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=open(directory / f"sshd-{name}.log", "w"),  # noqa: SIM115 (it outlives this function)
    )
    deadline = time.monotonic() + 10
    probe = [*inside(namespace, name), "ssh", name, "true"]
    while subprocess.run(probe, capture_output=True, timeout=20, check=False).returncode:
        assert time.monotonic() < deadline and sshd.poll() is None, (directory / f"sshd-{name}.log").read_text()
        time.sleep(0.1)
    return sshd.pid


def _end_processes(namespace: str) -> None:
    """A namespace is deleted only when nothing runs in it."""
    deadline = time.monotonic() + 10
    while pids := _processes(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        if time.monotonic() > deadline:
            raise AssertionError(f"processes {pids} do not end")
        time.sleep(0.05)
