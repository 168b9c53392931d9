"""Which failure of a job is the cause, and what to say about it."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

from hvdlm.errors import WorkerFailed

__all__ = ["Record", "explain", "never_started", "root_cause"]

_ANOTHER_BUILD = re.compile(
    r"horovod/.*undefined symbol|Extension horovod\.\w+ has not been built|horovod/.*cannot open shared object file"
)
_TAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """How one worker ended."""

    rank: int
    host: str
    code: int
    """Exit code; 128 + signal number if a signal ended it."""
    signal: int | None
    seconds: float
    """How long it ran."""
    time: float
    """When it ended, seconds since the epoch."""
    traceback: str | None
    """The last traceback in its stderr."""
    tail: str
    """The end of its stderr."""
    secondary: bool
    """Whether the traceback only says that another worker left."""
    asked: int | None
    """The signal it was sent on the job's behalf before it ended, None if it ended by itself."""
    traceback_before_asked: bool
    """Whether there was a traceback before that signal."""
    memory_mib: int | None = None
    """What it used when it was ended for using more than it may; None if it was not."""
    max_memory_mib: int | None = None
    """What it may use."""

    @property
    def exit_code(self) -> int:
        """The job's exit code: 1, as Python would give, if its traceback was out and we cut its end short."""
        return 1 if self.asked is not None and self.traceback_before_asked and self.signal else self.code

    @property
    def why(self) -> str:
        """What happened to it, in a few words."""
        if self.memory_mib is not None:
            return f"used {self.memory_mib:,} MiB of memory, more than --max-memory, {self.max_memory_mib:,} MiB"
        return f"killed by signal {self.signal}" if self.signal else f"exit code {self.code}"

    @property
    def order(self) -> tuple[int, float]:
        """Causes sort before consequences, then by time."""
        if self.asked is not None:
            if self.traceback_before_asked:
                return (3 if self.secondary else 1), self.time
            return 4, self.time
        return (2 if self.secondary else 0), self.time


def root_cause(records: Iterable[Record]) -> Record | None:
    """The failure the others follow from; None if no worker failed."""
    return min((record for record in records if record.code != 0), key=lambda record: record.order, default=None)


def explain(record: Record, logs: str) -> WorkerFailed:
    """The error for a failed job; the worker's traceback is its last part.

    Args:
        record: The cause.
        logs: Directory of the logs.
    """
    lines = [f"rank {record.rank} on {record.host} {_how(record)} after {record.seconds:.1f} s (logs: {logs})."]
    if record.order[0] > 1:
        lines.append("It is not the cause: another worker left the job before; see the logs of the other ranks.")
    text = record.traceback or ""
    if _ANOTHER_BUILD.search(text or record.tail):
        lines.append(
            "Horovod seems to be built for another version of the framework.\n"
            "HINT: hvdlm doctor shows which; hvdlm build-horovod --force builds it anew"
        )
    if record.memory_mib is not None:
        lines.append("HINT: a smaller batch, more workers, or a larger --max-memory")
    if text:
        lines += [f"The traceback of rank {record.rank}:", "", text]
    elif record.tail.strip():
        tail = record.tail.rstrip().splitlines()[-_TAIL_LINES:]
        lines += [f"It left no traceback. The end of its stderr ({len(tail)} lines):", "", *tail]
    else:
        lines.append("It left no traceback and nothing on stderr.")
    return WorkerFailed("\n".join(lines), record.exit_code)


def _how(record: Record) -> str:
    if record.memory_mib is not None:
        return (
            f"used {record.memory_mib:,} MiB of memory, more than the {record.max_memory_mib:,} MiB of --max-memory, "
            "and was ended"
        )
    if record.exit_code != record.code:
        return "failed, and had not ended"
    if record.signal is None:
        return f"failed with exit code {record.code}"
    try:
        name = signal.Signals(record.signal).name
    except ValueError:
        name = f"signal {record.signal}"
    memory = " (the kernel kills so when memory runs out)" if record.signal == signal.SIGKILL else ""
    return f"was killed by {name}{memory}"


def never_started(worker: int, host: str, text: str) -> Record:
    """The end of a worker that could not even be started."""
    return Record(
        rank=worker,
        host=host,
        code=255,
        signal=None,
        seconds=0.0,
        time=time.time(),
        traceback=None,
        tail=text,
        secondary=False,
        asked=None,
        traceback_before_asked=False,
    )
