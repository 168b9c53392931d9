"""The worker's side of an elastic job: a train function is called again from its top after each change of the workers.

What outlives a change in this process: the person's objects, the commits in memory, and this module.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from hvdlm.adapters.elastic_engine import hang_up
from hvdlm.environment import HANDED_OVER, Environment
from hvdlm.errors import ConfigError, EngineLost, PeerLost, Reset
from hvdlm.gce import watch_preemption
from hvdlm.member import Assignment, Member
from hvdlm.options import Options
from hvdlm.session import Session
from hvdlm.state.handover import hand_over, take_over
from hvdlm.state.history import History
from hvdlm.state.steward import Steward
from hvdlm.state.writer import Writer
from hvdlm.wire import LEFT_CODE, is_secondary

__all__ = ["Elastic", "elastic_of", "refuse_wrap"]

R = TypeVar("R")
_SECONDS_TO_WRITE = 60.0
"""How long the end of a job waits for its last checkpoint."""

_elastic: Elastic | None = None


def elastic_of(environment: Environment) -> Elastic | None:
    """This process's part in an elastic job, None in any other job. The first call joins it."""
    global _elastic
    if _elastic is None and environment.control is not None:
        member = Member(environment.control)
        _elastic = Elastic(member, environment.handed_over)
        if environment.metadata_host is not None:
            watch_preemption(environment.metadata_host, lambda: member.notice("preempted by Google Cloud"))
    return _elastic


def refuse_wrap(environment: Environment) -> None:
    """Raise in an elastic job.

    Raises:
        ConfigError: It is one.
    """
    if environment.control is not None:
        raise ConfigError(
            "hvdlm.wrap in an elastic job: after a change of the workers there is no train function to call again.",
            hint="put the training into a function, decorated with @hvdlm.distribute",
        )


class Elastic:
    """What this worker does in an elastic job: a :class:`hvdlm.state.part.Part` of each of its sessions.

    Args:
        member: Its line to the driver.
        handed_over: Descriptor of the commits of the process whose place this one takes, None if there was none.
    """

    def __init__(self, member: Member, handed_over: int | None = None) -> None:
        self._member = member
        self._assignment: Assignment | None = None
        self._cause = "start"
        self._session: Session | None = None
        self._history = History()
        if handed_over is not None:
            take_over(handed_over, self._history)
            os.environ[HANDED_OVER] = ""
        self._options: Options | None = None
        self._reached = 0  # samples trained on when the last generation ended
        self._costs: dict[str, Any] = {}
        self._counted = True
        member.on_break(hang_up)

    def session(self, make: Callable[..., Session], environment: Environment) -> Session:
        """Join the next generation, and make the session of it.

        Args:
            make: Makes a session of an environment.
            environment: Of this process.
        """
        try:
            self._assignment = self._member.join(self._history.numbers, self._cause)
        except SystemExit:
            if self._member.keeps:
                self._write_newest()
            raise
        self._costs, self._counted = dict(self._assignment.costs), False
        placed = self._member.place(environment, self._assignment)
        self._session = session = make(environment=placed, history=self._history, part=self)
        return session

    def run(self, once: Callable[[], R]) -> R:
        """Call the train function until it comes to its end.

        Args:
            once: Makes a session, attaches everything, and calls the function.

        Raises:
            SystemExit: This worker leaves the job.
        """
        while True:
            try:
                result = once()
            except Reset as reset:
                self._end_generation(reset)
            except Exception as error:
                # TensorFlow wraps what Horovod says into an error of its own.
                if not is_secondary(f"{type(error).__name__}: {error}"):
                    raise
                self._end_generation(PeerLost(str(error)))
            else:
                self._cause = "start"
                self._member.tell("finished")
                return result

    def _end_generation(self, reset: Reset) -> None:
        planned = self._member.planned
        self._cause = "planned" if planned else "lost"
        if isinstance(reset, EngineLost):
            self._replace()
        if self._session is not None:
            self._options = self._session.resolved.options
            self._reached = self._session.account.samples
            self._session.adapter.stop()
            self._session = None
        if planned and self._member.leaving is not None:
            assert self._assignment is not None
            if self._member.num_leavers < self._assignment.size:
                return  # it is let go when the others are ready: until then one of them may be lost
            if self._assignment.rank == 0:
                self._write_newest()  # nobody stays who holds it
            self._member.leave()
            raise SystemExit(LEFT_CODE)

    def _write_newest(self) -> None:
        """Write the newest commit to the store, if the job has one; nobody will hold it in memory any more."""
        newest, options = self._history.newest, self._options
        if newest is None or options is None or not options.checkpoint_dir:
            return
        writer = Writer(options.checkpoint_dir, options.checkpoint_keep)
        writer.submit(newest)
        written = writer.wait(_SECONDS_TO_WRITE)
        writer.close()
        self._member.tell("written", step=newest.number, ok=written)

    def _replace(self) -> None:
        """Become a new process of the same script, which joins anew with the commits of this one."""
        handle = hand_over(self._history)
        if handle is not None:
            os.environ[HANDED_OVER] = str(handle)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, sys.orig_argv)

    # See hvdlm.state.part.Part.

    def lost(self) -> bool:
        """Whether a worker of this generation was lost."""
        return self._member.broken

    def boundary(self, steward: Steward, made: bool) -> None:
        """All members are between the same two steps."""
        if not self._counted:
            self._count()
        if made:
            self._member.tell("commit", number=steward.position)
        self._member.boundary(lambda: steward.commit_now(whole=True))

    def restored(self, samples: int) -> None:
        """What was trained on beyond this is trained on again."""
        self._costs["lost_steps"] += self._history.lost
        self._costs["samples_retrained"] += max(0, self._reached - samples)

    def figures(self) -> dict[str, Any]:
        """For the summary."""
        return dict(self._costs)

    def _count(self) -> None:
        """The first step after a change is done."""
        self._counted = True
        assert self._assignment is not None
        if self._assignment.lost_at is not None:
            seconds = time.time() - self._assignment.lost_at
            self._costs["recovery_seconds"] = round(self._costs["recovery_seconds"] + seconds, 3)
        if self._assignment.rank == 0 and self._assignment.generation > 1:
            self._member.tell("going", costs=self._costs)
