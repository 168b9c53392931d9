"""The launcher's side of a running job: starts it, shows its output, ends it as a whole, finds out why it failed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdlm import wire
from hvdlm.errors import LaunchError, WorkerFailed
from hvdlm.launchers.base import JobSpec
from hvdlm.launchers.crew import Crew
from hvdlm.launchers.failure import Record, explain, root_cause
from hvdlm.launchers.loop import Loop
from hvdlm.launchers.output import Output
from hvdlm.launchers.peers import Peers
from hvdlm.launchers.starter import Starter
from hvdlm.rank_log import RankLog

__all__ = ["Job"]

_SECONDS_FOR_CAUSE = 3.2
"""A worker that lost a peer often ends before the peer that failed (which finalises MPI, and unloads its modules):
wait this long for the cause and its exit code. It leaves time to end what does not heed SIGTERM within 5 seconds."""
_SECONDS_TO_KILL = wire.SECONDS_TO_TERMINATE + 0.5
"""From the request to end until the supervisors are told to kill (they do it by themselves a little before)."""
_SECONDS_TO_KILL_ALL = _SECONDS_TO_KILL + 0.7
"""Until everything this process started is killed."""
_SECONDS_TO_SHOW_PARTIAL = 0.05
_SECONDS_FOR_STARTER = 5.0
"""How long mpirun may take to end after its last worker has."""
_SECONDS_TO_HEAR = 0.5
"""What workers that ended still have to say after mpirun has."""
_START_TIMEOUT_SECONDS = 30


class Job:
    """A job that runs; use as a context manager: nothing it started outlives it.

    Args:
        spec: The job.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._starter: Starter | None = None
        self._starter_ended = False
        self._records: dict[int, Record] = {}
        self._logs: dict[int, RankLog] = {}
        self._when_reached: Callable[[], None] | None = None
        self._stopping = False
        self._exit_code: int | None = None  # set if the job is ended for a reason other than a worker's failure
        self._start_failed: LaunchError | None = None
        self._starter_lost = False

    def __enter__(self) -> Job:
        spec = self._spec
        self._output = Output.of(spec, spec.num_proc, lambda: self._stopping or bool(self._loop.signals))
        self._loop = Loop().__enter__()
        self._peers = Peers(
            spec.num_proc,
            self._loop.selector,
            self._on_output,
            self._on_ended,
            self._on_trouble,
        )
        self._crew = Crew(
            spec.ssh,
            self._loop.selector,
            self._peers,
            pass_env=spec.pass_env,
            on_ready=self._on_ready,
            on_failed=self._on_failed,
            on_lost=self._on_lost,
            show=self._output.command if spec.verbose else None,
        )
        return self

    @property
    def socket_path(self) -> str:
        """Where the supervisors find this process or the agent of their host."""
        return self._peers.path

    @property
    def facts(self) -> dict[str, Mapping[str, Any]]:
        """What the agents of the other hosts said: ``host``, ``python``, ``interfaces``."""
        return {host: link.facts for host, link in self._crew.links.items()}

    def __exit__(self, *_: object) -> None:
        self._kill_all()
        self._crew.close()
        if self._starter is not None:
            self._starter.close()
        self._peers.close()
        self._output.close()
        for log in self._logs.values():
            log.close()
        self._loop.__exit__()

    def when_reached(self, action: Callable[[], None]) -> None:
        """Reach the job's other hosts, then call ``action`` (which starts the workers)."""
        self._when_reached = action
        self._crew.reach(host.name for host in self._spec.hosts)
        self._on_ready("")

    def equip(self, environment: Mapping[str, str], files: Mapping[str, bytes]) -> None:
        """Send an environment and files to the supervisors that another program is going to start."""
        self._crew.equip(environment, files)

    def start_starter(self, name: str, argv: list[str], environment: Mapping[str, str]) -> None:
        """Start the program that starts the supervisors (mpirun)."""
        if self._spec.verbose:
            self._output.command(argv)
        self._starter = Starter(name, argv, environment, self._loop.selector, self._spec.out_of_reach)

    def start_worker(self, worker: int, host: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the supervisor of one worker on one of the job's hosts."""
        self._crew.start(worker, host, command, environment, os.getcwd())

    def wait(self) -> int:
        """Run the job to its end.

        Returns:
            0, or 128 + signal number if a signal to this process ended the job.

        Raises:
            WorkerFailed: A worker failed; the message ends with the traceback of the cause.
            LaunchError: The workers could not be started.
        """
        timeout = _start_timeout(self._spec)
        if not self._spec.out_of_reach:
            self._loop.after(timeout, lambda: self._check_started(timeout))
        while self._peers.any_open or self._is_running():
            limits = ([_SECONDS_TO_SHOW_PARTIAL] if self._output.has_pending else []) + [1.0] * bool(self._crew.links)
            if not self._loop.step(min(limits, default=None)):
                self._output.flush()
            self._handle_signals()
            self._crew.tick()
            if self._all_ended() or (self._stopping and not self._peers.any_open):
                self._crew.finish()
            if self._starter is not None and not self._starter.is_running and not self._starter_ended:
                self._starter_ended = True
                self._loop.after(_SECONDS_TO_HEAR, self._lose_starter)
            if self._output.broken:
                self._stop(wire.TERMINATE, 128 + signal.SIGPIPE)
        self._output.flush()
        return self._result()

    def _is_running(self) -> bool:
        return self._crew.is_running or (self._starter is not None and self._starter.is_running)

    def _all_ended(self) -> bool:
        return len(self._records) == self._spec.num_proc

    def _on_output(self, worker: int, kind: bytes, data: bytes) -> None:
        self._log(worker, kind, data)
        self._output.feed(worker, kind, data)

    def _log(self, worker: int, kind: bytes, data: bytes) -> None:
        if self._spec.remote and not self._spec.out_of_reach:  # see supervisor_command
            if worker not in self._logs:
                self._logs[worker] = RankLog(str(self._spec.logs), worker)
            self._logs[worker].feed(kind, data)

    def _on_ready(self, _: str) -> None:
        if self._when_reached is not None and not self._crew.waiting and not self._stopping:
            action, self._when_reached = self._when_reached, None
            action()

    def _on_failed(self, worker: int, text: str) -> None:
        self._fail_start(
            LaunchError(f"worker {worker} could not be started: {text}.", hint="--verbose shows the commands")
        )

    def _on_lost(self, _: str, error: LaunchError) -> None:
        if not self._peers.all_here:
            self._fail_start(error)
        self._stop(wire.TERMINATE)

    def _fail_start(self, error: LaunchError) -> None:
        self._start_failed = self._start_failed or error
        self._stop(wire.TERMINATE)

    def _on_ended(self, worker: int, record: Record) -> None:
        self._records[worker] = record
        self._log(worker, wire.STDOUT, b"")  # one that printed nothing has logs too
        if record.code != 0:
            if record.secondary:
                self._loop.after(_SECONDS_FOR_CAUSE, lambda: self._stop(wire.TERMINATE))
            else:
                self._stop(wire.TERMINATE)
        if self._all_ended() and not self._stopping:
            self._loop.after(_SECONDS_FOR_STARTER, lambda: self._stop(wire.TERMINATE))

    def _on_trouble(self, _: int) -> None:
        # A process that failed may be long in ending: it finalises MPI, or waits for a thread. The job does not wait.
        self._loop.after(_SECONDS_FOR_CAUSE, lambda: self._stop(wire.TERMINATE))

    def _lose_starter(self) -> None:
        """End the workers of an mpirun that is gone."""
        if self._peers.any_open and not self._stopping:
            self._starter_lost = True
            self._stop(wire.TERMINATE)

    def _handle_signals(self) -> None:
        while self._loop.signals:
            signum = self._loop.signals.pop(0)
            if self._stopping:
                self._exit_code = self._exit_code or 128 + signum
                self._kill_workers()
            elif signum == signal.SIGINT:
                self._stop(wire.INTERRUPT, 128 + signum)
                self._output.message(
                    f"interrupted; ending {self._spec.num_proc} workers (Ctrl-C again kills them at once)"
                )
            else:
                self._stop(wire.TERMINATE, 128 + signum)
                self._output.message(f"{signal.Signals(signum).name} received; ending {self._spec.num_proc} workers")

    def _stop(self, how: bytes, exit_code: int | None = None) -> None:
        if self._stopping:
            return
        self._stopping, self._exit_code = True, exit_code
        self._peers.order(how)
        for link in self._crew.waiting:
            link.kill()
        if not self._peers.all_here or self._all_ended():
            self._signal_processes(signal.SIGTERM)
        more = wire.SECONDS_TO_INTERRUPT if how == wire.INTERRUPT else 0.0
        self._loop.after(_SECONDS_TO_KILL + more, self._kill_workers)
        self._loop.after(_SECONDS_TO_KILL_ALL + more, self._kill_all)

    def _kill_workers(self) -> None:
        self._peers.order(wire.KILL)
        self._loop.after(0.3, lambda: self._signal_processes(signal.SIGTERM))
        self._loop.after(0.6, self._kill_all)

    def _kill_all(self) -> None:
        self._peers.kill_programs()
        self._signal_processes(signal.SIGKILL)

    def _signal_processes(self, signum: int) -> None:
        self._crew.signal(signum)
        if self._starter is not None:
            self._starter.signal(signum)

    def _check_started(self, timeout: float) -> None:
        if self._stopping:
            return
        if self._crew.waiting:
            self._fail_start(self._crew.waiting[0].error())
        elif not self._peers.all_here:
            count = self._spec.num_proc - self._peers.num_here
            message = f"{count} of {self._spec.num_proc} workers did not start within {timeout} s"
            self._fail_start(self._not_started(message))

    def _not_started(self, message: str) -> LaunchError:
        said = "" if self._starter is None else self._starter.said
        return LaunchError(
            f"{message}:\n{said}" if said else f"{message}.",
            hint="hvdlm doctor checks this machine; --verbose shows the commands",
        )

    def _result(self) -> int:
        if self._exit_code is not None:
            return self._exit_code
        death, code = (None, 0) if self._starter is None else self._starter.death()
        if self._starter_lost and self._starter is not None:
            said = death or f"{self._starter.name} ended before its workers did"
            raise WorkerFailed(f"{said} (logs: {self._spec.logs}).", code or 1)
        if self._start_failed is not None:
            raise self._start_failed
        record = root_cause(self._records.values())
        if record is not None:
            raise explain(record, str(self._spec.logs))
        if self._spec.out_of_reach and death is not None:
            raise WorkerFailed(f"{death} (logs: {self._spec.logs})", code)
        if self._all_ended() or self._spec.out_of_reach:
            return 0
        raise self._not_started("; ".join(filter(None, ("the workers did not start", death))))


def _start_timeout(spec: JobSpec) -> int:
    """Seconds for all workers to start: the flag, else the variable horovodrun reads."""
    given = spec.environment.get("HOROVOD_START_TIMEOUT", "")
    return int(spec.flags.get("start_timeout") or (given if given.isdecimal() else 0) or _START_TIMEOUT_SECONDS)
