"""Makes workers fail at a named place in a named step. Imported by the scripts of these tests, never by hvdlm.

``FAULTS`` in the environment is a JSON list of ``{"worker": 1, "at": "step", "number": 20, "how": "kill"}``. ``worker``
is the number the driver gave, none for whoever comes there first; ``at`` is ``start`` (before hvdlm is called),
``step`` (in the forward pass), ``commit`` (half of it is made), ``join`` (before Horovod is started in generation
``number``), ``recovery`` (the train function is called in that generation), ``checkpoint`` (before the piece ``number``
that a process writes) or ``finish`` (the train function has ended). Each fault happens once in a job: a file says that
it has.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

LOSSY = ("kill", "raise", "exit", "stop")
FAULTS: list[dict[str, Any]] = json.loads(os.environ.get("FAULTS", "[]"))
WORKER = int(os.environ.get("HVDLM_CONTROL", "::-1:").split(":")[-2])


def at(place: str, number: int = 0) -> None:
    """Fail here if a fault says so."""
    for index, fault in enumerate(FAULTS):
        wanted = (fault["at"], fault.get("number", 0))
        if (
            fault["worker"] in (WORKER, None)
            and wanted == (place, number)
            and _may_fail(place, fault["how"])
            and _claim(f"fault-{index}")
        ):
            fail(fault["how"])


def _claim(name: str | Path) -> bool:
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _may_fail(place: str, how: str) -> bool:
    """Whether a worker is left that holds the state: no job survives the loss of all of them."""
    if place == "start" or how not in LOSSY or os.environ.get("ALL_MAY_FAIL"):
        return True
    return may_be_lost(Path(), generation, int(os.environ["HOROVOD_SIZE"]))


def may_be_lost(directory: Path, of_generation: int, size: int) -> bool:
    """Whether one more worker of this generation may be lost; whoever asks loses it."""
    return any(_claim(directory / f"lossy-{of_generation}-{number}") for number in range(size - 1))


def fail(how: str) -> None:
    """Fail in this way."""
    if how == "raise":
        raise RuntimeError("a fault of the test")
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if how == "exit":
        sys.exit(3)
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
    os.kill(os.getpid(), signals[how])
    if how in ("kill", "stop"):
        time.sleep(60)


generation = 0
"""The one this process is in."""
pieces = 0
"""Of checkpoints, that this process has written."""


def install() -> None:
    """Reach the places that are inside hvdlm."""
    from hvdlm.adapters import elastic_engine, engine
    from hvdlm.elastic import Elastic
    from hvdlm.session import Session
    from hvdlm.state import writer
    from hvdlm.state.steward import Steward

    start, session, capture = elastic_engine.start_guarded, Elastic.session, Steward._capture
    write, finish = writer.write, Session.finish

    @functools.wraps(session)
    def counted(self: Any, *args: Any) -> Any:
        global generation
        made = session(self, *args)
        generation = self._assignment.generation
        at("recovery", generation)
        return made

    @functools.wraps(start)
    def starting(*args: Any) -> None:
        at("join", generation + 1)
        start(*args)

    @functools.wraps(capture)
    def captured(self: Any, *args: Any) -> Any:
        at("commit", self.position)
        return capture(self, *args)

    @functools.wraps(write)
    def writing(store: Any, snapshot: Any, check: Any) -> int:
        def checked() -> None:
            global pieces
            pieces += 1
            at("checkpoint", pieces)
            check()

        return write(store, snapshot, checked)

    @functools.wraps(finish)
    def finishing(self: Any) -> None:
        at("finish")
        finish(self)

    Elastic.session, Steward._capture, Session.finish = counted, captured, finishing
    engine.start_guarded, writer.write = starting, writing
