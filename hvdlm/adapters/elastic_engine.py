"""Horovod in a job whose workers come and go: a lost peer is one kind of exception, and never ends this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hvdlm.errors import EngineLost, PeerLost

__all__ = ["Guarded", "hang_up", "start_guarded"]

_SECONDS_TO_NOTICE = 3.0
"""After a peer was lost while this one looks for the others: how long Horovod may take to find out by itself."""

_sockets: set[int] = set()
"""Inodes of the sockets that Horovod opened in this process, for :func:`hang_up`."""


class Guarded:
    """A ``horovod.<framework>`` module whose calls raise :class:`PeerLost` where a worker of the job is gone."""

    def __init__(self, hvd: Any) -> None:
        from horovod.common.exceptions import HorovodInternalError

        self._hvd, self._lost = hvd, HorovodInternalError

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._hvd, name)
        if isinstance(value, type) or not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return value(*args, **kwargs)
            except self._lost as error:
                raise PeerLost(str(error)) from None

        setattr(self, name, call)  # the next time it is found without this method
        return call


def start_guarded(hvd: Any, lost: Callable[[], bool]) -> None:
    """Initialise Horovod where a peer may be lost meanwhile.

    Horovod's thread does not catch what Gloo throws while it connects: ``std::terminate`` would abort the process, and
    the state in its memory with it. While it connects, that thread is parked instead.

    Raises:
        PeerLost: A peer was lost, and Horovod has noticed before it began.
        EngineLost: A peer was lost while Horovod was connecting: this process cannot start it again.
    """
    if lost():
        raise PeerLost("a worker was lost before the others had found each other")
    _sockets.clear()
    before = _open_sockets()
    failure: list[BaseException] = []

    def start() -> None:
        try:
            hvd.init()
        except BaseException as error:  # told to the thread that waits
            failure.append(error)

    with _parked_instead_of_aborted():
        thread = threading.Thread(target=start, name="hvdlm-start", daemon=True)
        thread.start()
        since: float | None = None
        while thread.is_alive():
            thread.join(0.02 if since is None else 0.1)
            if since is None and lost():
                since = time.monotonic()
            if since is not None and time.monotonic() - since > _SECONDS_TO_NOTICE:
                raise EngineLost("a worker was lost while the others were finding each other")
    _sockets.update(_open_sockets() - before)
    if failure:
        raise PeerLost(str(failure[0])) if lost() else failure[0]


def hang_up() -> None:
    """Close Horovod's connections under its hands, so that what waits for a peer that is lost fails at once.

    A peer whose machine was cut off sends nothing, not even that it is gone.
    """
    for handle in _handles():
        with contextlib.suppress(OSError):
            if os.fstat(handle).st_ino in _sockets:
                with socket.socket(fileno=os.dup(handle)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


def _handles() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return []


def _open_sockets() -> set[int]:
    found = set()
    for handle in _handles():
        with contextlib.suppress(OSError):
            status = os.fstat(handle)
            if stat.S_ISSOCK(status.st_mode):
                found.add(status.st_ino)
    return found


@contextlib.contextmanager
def _parked_instead_of_aborted() -> Iterator[None]:
    """Within, a C++ thread that dies of an exception sleeps for ever."""
    try:
        runtime = ctypes.CDLL("libstdc++.so.6")
        replace = runtime._ZSt13set_terminatePFvvE  # std::set_terminate
    except (OSError, AttributeError):
        yield
        return
    replace.argtypes, replace.restype = [ctypes.c_void_p], ctypes.c_void_p
    pause = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p)
    before = replace(pause)
    try:
        yield
    finally:
        replace(before)
