"""The program that starts the supervisors in place of the launcher: mpirun."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from hvdlm.processes import die_with_parent

__all__ = ["Starter"]

_TAIL_BYTES = 8192


class Starter:
    """Runs it, and keeps the end of what it says.

    Args:
        name: What it is called in messages.
        argv: Its command.
        environment: Its environment.
        selector: Where its output is watched; the data of a key is what to call when it is ready.
        shown: Whether its output is that of workers, and passed on.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        selector: selectors.BaseSelector,
        shown: bool = False,
    ) -> None:
        self.name, self._selector, self._shown, self._tail = name, selector, shown, b""
        self._process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,  # the launcher's socket carries the input of rank 0
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - no other thread runs yet
        )
        for pipe, ours in ((self._process.stdout, 1), (self._process.stderr, 2)):
            assert pipe is not None
            self._watch(pipe, ours)

    @property
    def is_running(self) -> bool:
        """Whether it lives."""
        return self._process.poll() is None

    @property
    def said(self) -> str:
        """The end of its output."""
        return self._tail.decode(errors="replace").strip()

    def death(self) -> tuple[str | None, int]:
        """(what happened to it, the exit code a shell would give); (None, 0) if it ended well."""
        code = self._process.returncode
        if not code:
            return None, 0
        if code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}", 128 - code
        return f"{self.name} exited with code {code}", code

    def signal(self, signum: int) -> None:
        """Send it, and what it started here, a signal."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signum)

    def close(self) -> None:
        """Wait for its end (see that it comes first) and close its pipes."""
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _watch(self, pipe: IO[bytes], ours: int) -> None:
        fd = pipe.fileno()

        def read() -> None:
            data = os.read(fd, 65536)
            if not data:
                self._selector.unregister(fd)
            elif self._shown:
                os.write(ours, data)
            self._tail = (self._tail + data)[-_TAIL_BYTES:]

        self._selector.register(fd, selectors.EVENT_READ, read)
