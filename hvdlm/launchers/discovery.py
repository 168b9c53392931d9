"""Which hosts an elastic job may use, asked again and again: a file, a program, Slurm, Kubernetes, Google Cloud."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hvdlm.errors import ConfigError
from hvdlm.launchers.discovery_cloud import GoogleGroup
from hvdlm.launchers.hosts import Host, parse_hostfile, parse_hosts

__all__ = ["Discovery", "Fixed", "HostFile", "Script", "Slurm", "Source", "make_source", "parse_found"]

_MAX_OUTPUT_BYTES = 1 << 20
_MPIJOB_SCRIPT = "/etc/mpi/discover_hosts.sh"
"""Where the MPI operator of Kubernetes mounts the program that prints the pods that run."""


class Source(Protocol):
    """One way to find hosts."""

    interval: float
    """Seconds between two questions."""

    def hosts(self) -> tuple[Host, ...]:
        """The hosts there are now.

        Raises:
            ConfigError: It cannot be told now; what was known before goes on to hold.
        """
        ...


class Fixed:
    """Hosts that are given once (``-H``)."""

    interval = 3600.0

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = tuple(hosts)

    def hosts(self) -> tuple[Host, ...]:
        """See :class:`Source`."""
        return self._hosts


class HostFile:
    """A host file that may be edited while the job runs."""

    interval = 0.5

    def __init__(self, path: str) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._hosts: tuple[Host, ...] = ()

    def hosts(self) -> tuple[Host, ...]:
        """See :class:`Source`. The file is read again only if it was written since."""
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise ConfigError(f"cannot read host file {self._path!r}: {error.strerror}.") from None
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._hosts = parse_hostfile(self._path)
            self._stamp = stamp
        return self._hosts


def parse_found(text: str, slots: int | None, where: str) -> tuple[Host, ...]:
    """The hosts a program printed, a line each: ``name``, ``name:slots`` or ``name slots=N``.

    Args:
        text: What it printed.
        slots: Slots of a host that comes without; 1 if None.
        where: The program, for messages.

    Raises:
        ConfigError: A line is no host.
    """
    pairs = []
    for line in text.splitlines():
        content = line.partition("#")[0].strip()
        if not content:
            continue
        name, _, count = content.replace(" slots=", ":").rpartition(":")
        pairs.append(f"{name.strip()}:{count.strip()}" if name else f"{content}:{slots or 1}")
    try:
        return parse_hosts(",".join(pairs)) if pairs else ()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message.partition(': ')[2]}") from None


class Script:
    """A program that prints hosts. One that fails, hangs or prints something else changes nothing.

    Args:
        command: The program and its arguments, as a shell would split them.
        slots: Slots of a host that is printed without.
        timeout: Seconds until it is killed.
    """

    def __init__(
        self, command: str, slots: int | None, *, interval: float = 1.0, timeout: float = 10.0, name: str = ""
    ) -> None:
        self._argv = shlex.split(command)
        self._slots, self._timeout = slots, timeout
        self._name = name or "host discovery script"
        self.interval = interval

    def hosts(self) -> tuple[Host, ...]:
        """See :class:`Source`."""
        return parse_found(self.ask(), self._slots, self._name)

    def ask(self) -> str:
        """Run it; returns what it printed.

        Raises:
            ConfigError: It cannot be run, failed, or did not end in time.
        """
        try:
            process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"{self._name} {self._argv[0]!r} cannot be run: {error.strerror}.") from None
        try:
            out, err = process.communicate(timeout=self._timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started too
            process.communicate()
            raise ConfigError(f"{self._name} did not end within {self._timeout:g} s.") from None
        if process.returncode != 0:
            said = err.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise ConfigError(f"{self._name} failed with code {process.returncode}: {said[0]}")
        if len(out) > _MAX_OUTPUT_BYTES or b"\0" in out:
            raise ConfigError(f"{self._name} printed something that is no list of hosts.")
        return out.decode(errors="replace")


class Slurm:
    """The nodes of the Slurm allocation this process is in, as ``scontrol`` tells them.

    Args:
        job: The allocation (``SLURM_JOB_ID``).
        slots: Workers per node.
    """

    interval = 5.0

    def __init__(self, job: str, slots: int) -> None:
        self._slots = slots
        self._show = Script(f"scontrol show job {shlex.quote(job)} --oneliner", None, name="scontrol show job")

    def hosts(self) -> tuple[Host, ...]:
        """See :class:`Source`."""
        fields = dict(part.split("=", 1) for part in self._show.ask().split() if "=" in part)
        nodes = fields.get("NodeList", "")
        if not nodes or nodes == "(null)":
            raise ConfigError("scontrol names no nodes of this job.", hint="is the allocation still there? squeue --me")
        names = Script(f"scontrol show hostnames {shlex.quote(nodes)}", self._slots, name="scontrol show hostnames")
        return names.hosts()


def make_source(flags: Mapping[str, Any], hosts: Sequence[Host], environment: Mapping[str, str]) -> Source:
    """The source that the flags name, else the one this machine has.

    Args:
        flags: Of the command line.
        hosts: Those of ``-H``.
        environment: Of the job.

    Raises:
        ConfigError: No source is named and none found, or the named one cannot be.
    """
    slots = flags.get("slots")
    chosen = str(flags["host_discovery"]).lower() if "host_discovery" in flags else None
    script = flags.get("host_discovery_script")
    if script:
        return Script(script, slots)
    if "hostfile" in flags:
        return HostFile(flags["hostfile"])
    if chosen in (None, "slurm") and "SLURM_JOB_ID" in environment and shutil.which("scontrol") and not hosts:
        per_node = environment.get("SLURM_NTASKS_PER_NODE", "")
        return Slurm(environment["SLURM_JOB_ID"], slots or (int(per_node) if per_node.isdecimal() else 1))
    if chosen in (None, "kubernetes") and os.access(_MPIJOB_SCRIPT, os.X_OK) and not hosts:
        return Script(_MPIJOB_SCRIPT, slots, name=_MPIJOB_SCRIPT)
    if chosen == "gcloud":
        return GoogleGroup(flags.get("gcloud_group") or "", slots or 1, environment)
    if chosen is not None:
        needs = {"slurm": "an allocation (SLURM_JOB_ID) and scontrol", "kubernetes": _MPIJOB_SCRIPT}[chosen]
        raise ConfigError(f"--host-discovery {chosen} needs {needs}, which is not here.", hint="-H localhost:2")
    if hosts:
        return Fixed(hosts)
    raise ConfigError(
        "an elastic job needs to know where workers may run.",
        hint="-H localhost:2, --hostfile FILE, or --host-discovery-script ./hosts.sh",
    )


class Discovery:
    """Asks a source in a thread of its own, so that one that hangs delays nobody.

    Args:
        source: The source.
        say: Told (kind, text) of trouble, once until it changes.
    """

    def __init__(self, source: Source, say: Callable[[str, str], None]) -> None:
        self._source, self._say = source, say
        self._lock = threading.Lock()
        self._found: tuple[Host, ...] | None = None
        self._trouble: str | None = None
        self._told: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def first(self) -> tuple[Host, ...] | None:
        """Ask once, here and now; None if it cannot be told."""
        self._ask()
        return self.news()

    def start(self) -> None:
        """Begin to ask again and again."""
        self._thread = threading.Thread(target=self._run, name="hvdlm-discovery", daemon=True)
        self._thread.start()

    def news(self) -> tuple[Host, ...] | None:
        """What was found since the last call, None if nothing new; tells of trouble."""
        with self._lock:
            found, self._found, trouble = self._found, None, self._trouble
        if trouble != self._told:
            self._told = trouble
            if trouble is not None:
                self._say("discovery_failed", f"{trouble} The hosts stay as they were; asking again.")
        return found

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._stop.wait(self._source.interval):
            self._ask()

    def _ask(self) -> None:
        trouble, found = None, None
        try:
            found = self._source.hosts()
        except ConfigError as error:
            trouble = error.message
        with self._lock:
            self._trouble = trouble
            if found is not None:
                self._found = found
