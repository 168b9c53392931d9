"""Workers on this host and on others, started and ended the same way."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence

from hvdlm.errors import LaunchError
from hvdlm.launchers.hosts import is_local
from hvdlm.launchers.link import HostLink
from hvdlm.launchers.passing import passed_on
from hvdlm.launchers.peers import Peers
from hvdlm.launchers.ssh import Ssh

__all__ = ["Crew"]


class Crew:
    """Starts supervisors: a process here, or through an agent on another host (see :mod:`hvdlm.agent`).

    What they say arrives at ``peers``. Call :meth:`tick` about once a second, and :meth:`close` at the end.

    Args:
        ssh: How other hosts are reached.
        selector: Where pipes and sockets are watched; the data of a key is what to call when it is ready.
        peers: Hears the supervisors.
        pass_env: More variables of the environment to pass to other hosts, as patterns.
        on_ready: Called with a host whose agent has answered.
        on_failed: Called with (worker, reason) for each worker that could not be started.
        on_lost: Called with (host, reason) when a host cannot be reached, or no longer.
        show: Called with each command that is run; None to show nothing.
    """

    def __init__(
        self,
        ssh: Ssh,
        selector: selectors.BaseSelector,
        peers: Peers,
        *,
        pass_env: Sequence[str] = (),
        on_ready: Callable[[str], None] = lambda _: None,
        on_failed: Callable[[int, str], None] = lambda *_: None,
        on_lost: Callable[[str, LaunchError], None] = lambda *_: None,
        show: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self._ssh, self._selector, self._peers, self._pass_env = ssh, selector, peers, tuple(pass_env)
        self._on_ready, self._on_failed, self._on_lost = on_ready, on_failed, on_lost
        self._show = show or (lambda _: None)
        self._local: dict[str, bool] = {}
        self.links: dict[str, HostLink] = {}
        """Host -> the connection to it, for hosts other than this one."""
        self.processes: list[subprocess.Popen[bytes]] = []
        """The supervisors on this host."""

    def is_here(self, host: str) -> bool:
        """Whether a host is this machine."""
        if host not in self._local:
            self._local[host] = is_local(host)
        return self._local[host]

    def reach(self, hosts: Iterable[str]) -> None:
        """Start the agents of those hosts that are other machines; ``on_ready`` is called as they answer."""
        for host in hosts:
            link = self.links.get(host)
            if not self.is_here(host) and (link is None or not link.is_open):
                if link is not None:
                    link.close()
                self.links[host] = HostLink(
                    host,
                    self._ssh,
                    self._selector,
                    self._peers,
                    on_ready=self._ready,
                    on_failed=self._on_failed,
                    on_lost=lambda link, error: self._on_lost(link.host, error),
                )
                self._show(self.links[host].command)

    def is_ready(self, host: str) -> bool:
        """Whether workers can be started on a host now."""
        if self.is_here(host):
            return True
        link = self.links.get(host)
        return link is not None and link.is_open and link.is_ready

    @property
    def waiting(self) -> list[HostLink]:
        """Hosts that have not answered yet."""
        return [link for link in self.links.values() if not link.is_ready]

    def start(
        self, worker: int, host: str, command: Sequence[str], environment: Mapping[str, str], directory: str
    ) -> None:
        """Start the supervisor of a worker on a host that is ready.

        The environment is inherited by a supervisor here. To another host it travels through ssh, and only the part of
        it that :func:`hvdlm.launchers.passing.passed_on` lets through.

        Args:
            worker: Its number, unique in the job; ``peers`` reports under it.
            host: Where.
            command: The supervisor's command (see :func:`hvdlm.launchers.base.supervisor_command`).
            environment: The environment of the worker.
            directory: Its working directory.
        """
        self._show(command)
        if not self.is_here(host):
            passed = passed_on(environment, self._pass_env)
            self.links[host].start_worker(worker, command, passed, directory)
            return
        try:
            process = subprocess.Popen(
                list(command),
                cwd=directory,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self._on_failed(worker, f"cannot run {command[0]!r}: {error.strerror}")
            return
        self.processes.append(process)

    def equip(self, environment: Mapping[str, str], files: Mapping[str, bytes]) -> None:
        """Prepare every host for supervisors that another program starts there.

        Args:
            environment: Sent to them: all of it on this host, on others what :meth:`start` would pass.
            files: Small files to be put beside their socket: name -> content.
        """
        self._peers.equip(environment, files)
        passed = passed_on(environment, self._pass_env)
        for link in self.links.values():
            link.listen(self._peers.path, passed, files)

    def tick(self) -> None:
        """Give the agents a sign of life."""
        for link in self.links.values():
            link.pulse()

    @property
    def is_running(self) -> bool:
        """Whether a process of ours lives: a supervisor here, or the ssh of another host."""
        return any(process.poll() is None for process in self.processes) or any(
            not link.is_over for link in self.links.values()
        )

    def finish(self) -> None:
        """All workers have ended: let the agents end."""
        for link in self.links.values():
            link.finish()

    def signal(self, signum: int) -> None:
        """Send every supervisor here a signal; SIGKILL ends the connections to other hosts too."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
        if signum == signal.SIGKILL:
            for link in self.links.values():
                link.kill()

    def close(self) -> None:
        """End everything and wait for what runs here."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for link in self.links.values():
            link.close()

    def _ready(self, link: HostLink) -> None:
        link.listen(self._peers.path)
        self._on_ready(link.host)
