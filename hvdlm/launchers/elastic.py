"""Elastic jobs: workers are started where discovery finds places, and train together in changing numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from typing import Any

from hvdlm import environment as names_of
from hvdlm import wire
from hvdlm.errors import BelowMinimum, ConfigError, LaunchError, WorkerFailed
from hvdlm.launchers.base import JobSpec, supervisor_command
from hvdlm.launchers.crew import Crew
from hvdlm.launchers.discovery import Discovery, make_source
from hvdlm.launchers.failure import Record, explain, never_started
from hvdlm.launchers.gloo import worker_environment
from hvdlm.launchers.hosts import Host, Slot
from hvdlm.launchers.interfaces import Network, choose_network
from hvdlm.launchers.loop import Loop
from hvdlm.launchers.membership import Membership
from hvdlm.launchers.output import Output
from hvdlm.launchers.peers import Peers
from hvdlm.launchers.places import Place, Places, limits_of, slot_before_the_first
from hvdlm.launchers.rendezvous import Rendezvous
from hvdlm.launchers.switchboard import Switchboard
from hvdlm.network import interface_towards, interfaces
from hvdlm.observe.events import Events
from hvdlm.rank_log import RankLog

__all__ = ["LAUNCHER", "ElasticLauncher"]

_TICK_SECONDS = 0.25
_SECONDS_TO_WRITE = 70.0
_SECONDS_TO_END = wire.SECONDS_TO_TERMINATE + 1.0
_STALL_SECONDS = "600"
"""A worker whose script hangs keeps the others waiting: after this long Horovod gives up, and it is replaced."""


class ElasticLauncher:
    """Runs elastic jobs."""

    def submit(self, spec: JobSpec) -> int:
        """Run the job to its end; see :class:`hvdlm.launchers.base.Launcher`.

        Raises:
            BelowMinimum: Fewer workers than the minimum for longer than the timeout.
        """
        with _ElasticJob(spec) as job:
            return job.wait()


class _ElasticJob:
    def __init__(self, spec: JobSpec) -> None:
        # "remote": hosts may come that do not see our disk, so that the launcher writes the logs of all workers.
        self._spec = dataclasses.replace(spec, remote=True)
        self._logs: dict[int, RankLog] = {}
        self._server: Rendezvous | None = None
        self._ending: float | None = None
        self._exit_code: int | None = None
        self._limits = limits_of(spec.flags, spec.num_proc)
        rest = spec.flags.get("cooldown_range") or (5, 300)
        self._places = Places(float(rest[0]), float(rest[1]))
        self._to_start: dict[int, Place] = {}

    def __enter__(self) -> _ElasticJob:
        spec = self._spec
        self._loop = Loop().__enter__()
        self._output = Output.of(
            spec, max(2, spec.num_proc), lambda: self._ending is not None or bool(self._loop.signals)
        )
        self._events = Events(lambda: spec.run_dir, spec.secrets)
        selector = self._loop.selector
        self._peers = Peers(None, selector, self._on_output, self._on_ended, lambda _: None)
        self._crew = Crew(
            spec.ssh,
            selector,
            self._peers,
            pass_env=spec.pass_env,
            on_ready=self._on_ready,
            on_failed=self._on_failed,
            on_lost=self._on_lost,
            show=self._output.command if spec.verbose else None,
        )
        self._membership = Membership(self._limits, self._places, self)
        self._switchboard = Switchboard(selector, self._on_message)
        source = make_source(spec.flags, spec.hosts, spec.environment)
        self._discovery = Discovery(source, self._say_of_discovery)
        return self

    def __exit__(self, *_: object) -> None:
        self._discovery.close()
        self._peers.kill_programs()
        self._crew.close()
        self._peers.close()
        self._switchboard.close()
        self.break_off()
        self._output.close()
        for log in self._logs.values():
            log.close()
        self._loop.__exit__()

    def wait(self) -> int:
        """Run the job to its end; returns 0, or 128 + signal number if a signal to this process ended it."""
        self._take_hosts(self._discovery.first())
        self._membership.check(time.monotonic())
        self._discovery.start()
        while self._ending is None or self._peers.any_open or self._crew.is_running:
            if not self._loop.step(_TICK_SECONDS):
                self._output.flush()
            self._take_hosts(self._discovery.news())
            self._crew.tick()
            self._handle_signals()
            now = time.monotonic()
            self._membership.check(now)
            if self._membership.over is not None and self._ending is None:
                self._end(now)
            if self._output.broken and self._exit_code is None:
                self._exit_code = 128 + signal.SIGPIPE
                self._end(now)
            if self._ending is not None:
                self._hasten(now)
        self._output.flush()
        return self._result()

    def _end(self, now: float) -> None:
        """End what still runs."""
        self._ending = now + _SECONDS_TO_END
        self._membership.over = self._membership.over or "ended"
        keeper = self._membership.keeper() if self._membership.over == "below" else None
        for number in self._membership.workers:
            self._switchboard.send(number, {"kind": "stop", "write": number == keeper})
        if keeper is None:
            self._peers.order(wire.TERMINATE)
        else:
            self._ending = now + _SECONDS_TO_WRITE  # it ends by itself, once the state is written

    def _hasten(self, now: float) -> None:
        assert self._ending is not None
        if not self._peers.any_open:
            self._crew.finish()
        if now > self._ending:
            self._peers.kill_programs()
            self._crew.signal(signal.SIGKILL)
            self._ending = now + 1.0

    def _result(self) -> int:
        over = self._membership.over
        self.event("over", how=over, exit_code=self._exit_code)
        if self._exit_code is not None:
            return self._exit_code
        if over == "done":
            return 0
        if over == "below":
            raise BelowMinimum(
                f"fewer than {self._limits.least} workers for {self._limits.below:g} s.",
                hint="give it more hosts or a lower --min-np, and start it again (with --resume, where it left off)",
            )
        if self._membership.failure is None:
            raise BelowMinimum(
                "all workers were told to leave, and no others came.", hint="start it again (with --resume)"
            )
        error = explain(self._membership.failure, str(self._spec.logs))
        why = {
            "failed": "no worker is left",
            "lost": "all workers that held the state of the training are lost",
            "resets": f"more than {self._limits.resets} resets (--reset-limit)",
        }[str(over)]
        raise WorkerFailed(f"{why}; the first failure: {error}", error.exit_code)

    # What the membership has done for it: see hvdlm.launchers.roster.Acts.

    def start(self, worker: int, place: Place) -> None:
        """Start a worker there, as soon as its host can be reached."""
        self._to_start[worker] = place
        if self._crew.is_ready(place.host):
            self._on_ready(place.host)
        else:
            self._crew.reach([place.host])

    def send(self, worker: int, message: dict[str, Any]) -> None:
        """Send a worker a message."""
        self._switchboard.send(worker, message)

    def kill(self, worker: int) -> None:
        """Kill a worker that hangs, or is not needed."""
        self._peers.kill_programs(worker)

    def variables(self, slots: tuple[Slot, ...]) -> list[dict[str, str]]:
        """What Horovod needs to know in each worker; serves the rendezvous of a new generation from now on."""
        self.break_off()
        network = self._network({slot.hostname for slot in slots})
        self._server = Rendezvous(network.address, slots)
        self._server.start()
        own = self._server.environment()
        return [worker_environment({}, s, own, network.others.get(s.hostname, network.here)) for s in slots]

    def break_off(self) -> None:
        """The rendezvous of this generation is over: those who still look for the others need not wait."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def event(self, kind: str, **fields: Any) -> None:
        """Write something into ``events.jsonl``."""
        with contextlib.suppress(OSError):  # a full disk stops no job
            self._events.add(kind, **fields)

    def say(self, text: str) -> None:
        """Tell the person something."""
        self._output.message(text)

    def _network(self, hosts: set[str]) -> Network:
        others = {
            host: link.facts["interfaces"]
            for host, link in self._crew.links.items()
            if host in hosts and link.is_open and link.is_ready
        }
        towards = interface_towards(next(iter(others))) if others else None
        return choose_network(self._spec.flags.get("nics") or (), interfaces(), others, towards)

    # What happens.

    def _on_ready(self, host: str) -> None:
        for worker in [worker for worker, place in self._to_start.items() if place.host == host]:
            place = self._to_start.pop(worker)
            try:
                network = self._network({host})
            except ConfigError as error:
                self._on_failed(worker, error.message)
                continue
            environment = worker_environment(
                self._spec.environment,
                slot_before_the_first(worker, place),
                {names_of.CONTROL: self._switchboard.control(worker, network.address)},
                network.others.get(host, network.here),
            )
            environment.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", _STALL_SECONDS)
            command = supervisor_command(self._spec, self._peers.path, worker=worker)
            self._crew.start(worker, host, command, environment, os.getcwd())

    def _on_failed(self, worker: int, text: str) -> None:
        self._to_start.pop(worker, None)
        self._on_ended(worker, never_started(worker, self._membership.workers[worker].place.host, text))

    def _on_lost(self, host: str, error: LaunchError) -> None:
        self.event("host_lost", host=host, text=error.message)
        for worker in [worker for worker, place in self._to_start.items() if place.host == host]:
            self._on_failed(worker, error.message)

    def _on_output(self, worker: int, kind: bytes, data: bytes) -> None:
        if worker not in self._logs:
            self._logs[worker] = RankLog(str(self._spec.logs), worker)
        self._logs[worker].feed(kind, data)
        self._output.feed(worker, kind, data)

    def _on_message(self, worker: int, message: dict[str, Any]) -> None:
        now = time.monotonic()
        self._membership.heard(worker, message, now)
        self._membership.check(now)

    def _on_ended(self, worker: int, record: Record) -> None:
        now = time.monotonic()
        if worker in self._logs:
            self._logs.pop(worker).close()
        if self._ending is None:
            self._membership.ended(worker, record, now, record.time)
            self._membership.check(now)

    def _take_hosts(self, hosts: tuple[Host, ...] | None) -> None:
        if hosts is not None and self._places.update(hosts):
            self.event("hosts", hosts=[str(host) for host in hosts])

    def _say_of_discovery(self, kind: str, text: str) -> None:
        self.event(kind, text=text)
        self.say(text)

    def _handle_signals(self) -> None:
        while self._loop.signals:
            signum = self._loop.signals.pop(0)
            if self._ending is not None:
                self._ending = 0.0
                continue
            self._exit_code = 128 + signum
            self.say(f"{signal.Signals(signum).name} received; ending the workers")
            self._end(time.monotonic())


LAUNCHER = ElasticLauncher()
