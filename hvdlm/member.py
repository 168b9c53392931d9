"""This worker as a member of an elastic job: how it joins, when it leaves, and how all members agree on that.

The driver (:mod:`hvdlm.launchers.elastic`) forms *generations*: sets of workers that run one Horovod job. A member says
that it is ready, is told its rank in the next generation, and trains until a peer is lost or a change is planned. A
change is planned without a collective: all members pass the same boundaries between steps, so the driver names one that
none has passed yet, each member promises to stop there, and once all have promised, all do. A member that has passed
it already declines, and the driver names a later one. It is a two-phase commit (Gray, "Notes on data base operating
systems", 1978) whose outcome costs steps that are not affected nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvdlm.environment import Environment
from hvdlm.errors import LaunchError, WorkersChanged
from hvdlm.line import Lines, dial
from hvdlm.wire import LEFT_CODE

__all__ = ["Assignment", "Member"]

_BEAT_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Assignment:
    """A place in a generation."""

    generation: int
    rank: int
    size: int
    variables: dict[str, str]
    """What Horovod reads from the environment."""
    lost_at: float | None
    """When the peer whose loss began this generation was lost, seconds since the epoch; None if none was."""
    costs: dict[str, Any]
    """What earlier changes of the workers have cost, and how many there were."""


class Member:
    """One worker of an elastic job. Make one per process.

    Args:
        control: ``address:port:worker:key`` of the driver.
    """

    def __init__(self, control: str) -> None:
        try:
            address, port, worker, key = control.rsplit(":", 3)
            self._line: Lines = dial(address, int(port), int(worker), key)
        except (OSError, ValueError) as error:
            raise LaunchError(f"this worker cannot reach the driver of its job: {error}.") from None
        self.worker = int(worker)
        self._changed = threading.Condition()
        self._assignment: Assignment | None = None
        self._broken = threading.Event()
        self.planned = False
        """Whether the generation that ended last did so by plan."""
        self._plan: dict[str, Any] | None = None
        self._verdict: bool | None = None
        self._boundaries = 0
        self._stopping = False
        self.keeps = False
        """Whether this worker is to write the state, now that the job ends."""
        self.num_leavers = 0
        """How many left by the last planned change."""
        self.leaving: str | None = None
        """Why this worker is to leave, None if it is not."""
        self._on_break: Callable[[], None] = lambda: None
        threading.Thread(target=self._listen, name="hvdlm-member", daemon=True).start()
        threading.Thread(target=self._beat, name="hvdlm-beat", daemon=True).start()
        self._watch_signals()

    def tell(self, kind: str, **fields: Any) -> None:
        """Tell the driver something."""
        self._line.send({"kind": kind, **fields})

    def join(self, held: list[int], cause: str) -> Assignment:
        """Be part of the next generation; waits until there is one.

        Args:
            held: Numbers of the commits this worker holds.
            cause: Why it is ready (``start``, ``lost``, ``planned``).

        Raises:
            SystemExit: The job ends without another generation, or without this worker.
        """
        with self._changed:
            self._assignment, self._plan, self._verdict = None, None, None
            self._boundaries = 0
        self.planned = False
        self.tell("ready", held=held, cause=cause, pid=os.getpid())
        with self._changed:
            while self._assignment is None and not self._stopping:
                # With a limit, so that the main thread runs handlers of signals.
                self._changed.wait(0.2)
            if self._assignment is None:
                raise SystemExit(LEFT_CODE)
            return self._assignment

    def place(self, environment: Environment, assignment: Assignment) -> Environment:
        """The environment of a worker with that place; sets Horovod's variables."""
        os.environ.update(assignment.variables)
        return environment.placed(assignment.rank, assignment.size)

    @property
    def broken(self) -> bool:
        """Whether a peer of the generation this worker was told to start has been lost."""
        return self._broken.is_set()

    def on_break(self, act: Callable[[], None]) -> None:
        """Call this, from another thread, when a peer is lost."""
        self._on_break = act

    def boundary(self, commit: Callable[[], object]) -> None:
        """All members are between the same two steps.

        Args:
            commit: Keeps the state here, so that no step is lost.

        Raises:
            WorkersChanged: All members stop here.
        """
        with self._changed:
            self._boundaries += 1
            plan = self._plan
            if plan is None or self._boundaries < plan["boundary"]:
                return
            while self._verdict is None and not self.broken:
                self._changed.wait(0.2)
            agreed, self._plan, self._verdict = bool(self._verdict), None, None
        if not agreed:
            return
        commit()
        self.planned, self.num_leavers = True, len(plan["leavers"])
        if self.worker in plan["leavers"]:
            self.leaving = self.leaving or "removed"
        raise WorkersChanged(str(plan["why"]))

    def leave(self) -> None:
        """Say goodbye: from now on the end of this process is no failure."""
        self.tell("left", why=self.leaving)

    def _listen(self) -> None:
        while True:
            try:
                messages = self._line.receive()
            except ValueError:
                messages = None
            if messages is None:
                break
            for message in messages:
                self._hear(message)
        # Without a driver there is no job. Its supervisor ends this process if it does not heed the signal.
        self._stopping = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        with self._changed:
            if kind == "assign":
                fields = ("generation", "rank", "size", "variables", "lost_at", "costs")
                self._broken.clear()
                self._assignment = Assignment(**{name: message[name] for name in fields})
            elif kind == "plan":
                ok = self._plan is None and self._boundaries < message["boundary"]
                if ok:
                    self._plan, self._verdict = message, None
                self.tell("promise", plan=message["plan"], ok=ok, boundaries=self._boundaries)
            elif kind in ("confirm", "cancel") and self._plan is not None and self._plan["plan"] == message["plan"]:
                self._verdict = kind == "confirm"
                if kind == "cancel" and self._boundaries < self._plan["boundary"]:
                    self._plan = None
            elif kind == "broken":
                if self._assignment is None or message["generation"] != self._assignment.generation:
                    return  # this worker has left that generation already
                self._broken.set()
            elif kind == "stop":
                self._stopping, self.keeps = True, bool(message.get("write"))
            self._changed.notify_all()
        if kind == "broken":
            self._on_break()

    def _beat(self) -> None:
        while True:
            self.tell("beat", boundaries=self._boundaries)
            time.sleep(_BEAT_SECONDS)

    def _watch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in _SIGNALS:
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _: object) -> None:
        if self._stopping:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            raise SystemExit(128 + signum)
        self.notice(signal.Signals(signum).name)

    def notice(self, why: str) -> None:
        """This worker has to go soon: ask for a change without it."""
        if self.leaving is None:
            self.leaving = why
            self.tell("notice", why=why)
