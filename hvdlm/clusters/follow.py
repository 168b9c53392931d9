"""From a rendered file to the end of the job: submit, follow, show its output, cancel on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvdlm.errors import LaunchError

__all__ = ["Cluster", "JobState", "Stream", "Tool", "follow", "write_file"]

_ENDED = ("succeeded", "failed")
_SECONDS_BETWEEN_LOOKS = 1.0
_FAILURES_TOLERATED = 30
"""Looks at a job in a row that may fail (the controller restarts, the network is gone) before we give up."""


@dataclass(frozen=True)
class JobState:
    """What a cluster says about a job."""

    phase: str
    """``waiting``, ``running``, ``succeeded`` or ``failed``."""
    detail: str = ""
    """What it waits for, or why it failed, in the cluster's words."""
    exit_code: int = 0


class Cluster(Protocol):
    """One job on one cluster."""

    def submit(self, path: Path) -> str:
        """Hand a rendered file over; returns what the cluster calls the job."""
        ...

    def state(self, job: str) -> JobState: ...

    def output(self, job: str) -> bytes:
        """What the job has written since the last call."""
        ...

    def cancel(self, job: str) -> None: ...

    def close(self) -> None:
        """End what still follows the job."""
        ...

    def commands(self, job: str) -> str: ...


class Tool:
    """The command-line tools of a cluster.

    Args:
        target: Its name, for messages.
        job: The job's name, for messages.
    """

    def __init__(self, target: str, job: str) -> None:
        self.target, self.job = target, job

    def require(self, name: str, hint: str) -> None:
        """Raise if a tool is not installed."""
        if shutil.which(name) is None:
            raise LaunchError(f"{self.target}: {name} is not installed here.", hint=hint)

    def ask(self, *argv: str, timeout: float = 60) -> str:
        """Run a tool and return what it says.

        Raises:
            LaunchError: It fails or hangs; the message has its words.
        """
        try:
            # In a session of its own, so that a Ctrl-C for us does not reach it: it may be cancelling the job.
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise LaunchError(f"{self.target}: {argv[0]} gave no answer within {timeout:.0f} s.") from None
        except OSError as error:
            raise LaunchError(f"{self.target}: {argv[0]} cannot be run: {error.strerror}.") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()
            raise LaunchError(f"{self.target}: {' '.join(argv[:2])} failed with code {done.returncode}: {said[-2000:]}")
        return done.stdout.decode(errors="replace")


class Stream:
    """A command that writes for long, read without waiting.

    Args:
        argv: The command.
        errors: Whether what it writes to stderr is read too; else nobody sees it.
    """

    def __init__(self, argv: list[str], *, errors: bool = False) -> None:
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout
        os.set_blocking(self._pipe.fileno(), False)

    def read(self) -> tuple[bytes, str]:
        """(what is new, when the command ended in RFC 3339 or empty while it runs)."""
        over = self._process.poll() is not None  # asked first: all it wrote is in the pipe then
        new = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._pipe.fileno(), 65536):
                new += part
        if not over:
            return new, ""
        self.close()
        return new, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    @property
    def pid(self) -> int:
        """Of the command, which leads a process group."""
        return self._process.pid

    def code(self) -> int | None:
        """The command's exit code, None while it runs."""
        return self._process.poll()

    def close(self, grace: float = 0.0) -> None:
        """End the command and what it started.

        Args:
            grace: Seconds it gets to end after it is asked to.
        """
        if grace and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()


def follow(
    cluster: Cluster, path: Path, show: Callable[[bytes], None], tell: Callable[[str], None], *, detach: bool = False
) -> int:
    """Submit a job and stay until it ends.

    Ctrl-C (or SIGTERM) cancels the job and waits for its end; a second one leaves at once.

    Args:
        cluster: Where it goes.
        path: The rendered file.
        show: Gets the job's output.
        tell: Gets a line for the person.
        detach: Leave once it is submitted.

    Returns:
        0, the job's exit code, or 128 + signal number if a signal to this process cancelled it.
    """
    with _signals() as signals:
        job = cluster.submit(path)
        tell(f"job {job} submitted; by hand: {cluster.commands(job)}")
        if detach:
            return 0
        try:
            return _stay(cluster, job, show, tell, signals)
        finally:
            cluster.close()


def _stay(
    cluster: Cluster, job: str, show: Callable[[bytes], None], tell: Callable[[str], None], signals: list[int]
) -> int:
    cancelled = failures = 0
    last = JobState("")
    while True:
        try:
            state = cluster.state(job)
            show(cluster.output(job))
            failures = 0
        except LaunchError as error:
            failures += 1
            if failures == 1 and not cancelled:
                tell(f"{error.message}; looking again")
            if failures >= _FAILURES_TOLERATED:
                raise
            if cancelled:  # what was deleted cannot be asked for
                return _was_cancelled(job, cancelled, tell)
            state = last
        if (state.phase, state.detail) != (last.phase, last.detail) and state.phase not in ("", *_ENDED):
            tell(f"job {job} is {state.phase}" + (f" ({state.detail})" if state.detail else ""))
        last = state
        if state.phase in _ENDED:
            break
        deadline = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        while time.monotonic() < deadline and not signals:
            time.sleep(0.05)
        if signals and cancelled:
            tell(f"job {job} was told to end; not waiting for it")
            return cancelled
        if signals:
            cancelled = 128 + signals.pop(0)
            tell(f"cancelling job {job} (Ctrl-C again leaves at once)")
            cluster.cancel(job)
    with contextlib.suppress(LaunchError):
        show(cluster.output(job))
    if cancelled:
        return _was_cancelled(job, cancelled, tell)
    if last.phase == "failed":
        tell(f"job {job} failed" + (f" ({last.detail})" if last.detail else ""))
    return last.exit_code


def _was_cancelled(job: str, code: int, tell: Callable[[str], None]) -> int:
    tell(f"job {job} was cancelled")
    return code


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask us to end, in the order they came."""
    found: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old = {number: signal.signal(number, lambda signum, _: found.append(signum)) for number in numbers}
    try:
        yield found
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def write_file(path: Path, text: str) -> None:
    """Write a rendered file that only the person can read."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
