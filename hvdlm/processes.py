"""What the kernel does for us when processes die (Linux). Standard library only."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = [
    "adopt_orphans",
    "at_end_of_script",
    "children",
    "die_with_parent",
    "end_at_once",
    "report_uncaught_exceptions",
    "step_aside",
]

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process ``signum`` when its parent dies. Kept across ``exec``."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that they can be found and ended."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children(pid: int | None = None) -> list[int]:
    """The process ids of a process's children, ours if none is named; as far as the kernel tells."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # the process, or one of its threads, has ended
        tasks = f"/proc/{pid or os.getpid()}/task"
        for task in os.listdir(tasks):
            with open(f"{tasks}/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def step_aside() -> None:
    """Go on in a child process, out of reach of what kills this one's group; this one passes signals on and waits.

    It ends as the child does, and the child gets SIGTERM if this one is killed. Call it before there are threads.
    """
    parent = os.getpid()
    passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # none is lost between the fork and the handlers
    child = os.fork()
    if child == 0:
        os.setsid()
        die_with_parent(signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # killed in between
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    for signum in passed_on:
        signal.signal(signum, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def at_end_of_script(end: Callable[[bool], None]) -> None:
    """Call ``end`` at exit with whether the script ends badly: by an exception, or with a code other than 0."""
    failing = False
    excepthook, leave = sys.excepthook, sys.exit

    def on_exception(*info: Any) -> None:
        nonlocal failing
        failing = True
        excepthook(*info)

    def on_exit(status: Any = None, /) -> Any:
        nonlocal failing
        failing = failing or status not in (None, 0)
        leave(status)

    sys.excepthook, sys.exit = on_exception, on_exit
    atexit.register(lambda: end(failing))


@functools.cache  # once a process, however often hvdlm starts in it
def report_uncaught_exceptions() -> None:
    """Tell the supervisor at once when an exception ends this process, so that the other workers need not wait.

    Between its traceback and its end a Python process may wait for a thread for ever. Does nothing in a process that
    no supervisor started.
    """
    parent = os.getppid()
    try:
        supervised = b"hvdlm.worker" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return
    if not supervised:
        return
    show = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        show(kind, value, traceback)
        sys.stderr.flush()
        if os.getppid() == parent:
            os.kill(parent, signal.SIGUSR1)

    sys.excepthook = hook


def end_at_once(code: int) -> None:
    """End this process from any thread, whatever its main thread waits for; what was written is flushed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
