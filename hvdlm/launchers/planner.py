"""How the members of a running generation are brought to stop at one boundary: see :mod:`hvdlm.member`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdlm.launchers.roster import Worker

__all__ = ["Planner"]

_SECONDS_TO_HAND_OVER = 25.0
"""How long the last worker that holds the state stays after a notice, for another to come: a preempted machine of
Google's has 30 seconds."""
_MARGIN = 2
_MAX_MARGIN = 1024


@dataclass
class _Plan:
    number: int
    boundary: int
    members: set[int]
    leavers: list[int]
    why: str
    promised: set[int] = field(default_factory=set)
    confirmed: bool = False


class Planner:
    """Plans one change at a time.

    Args:
        send: Sends a worker a message.
        decided: Called with (why, leavers) once all members have promised.
    """

    def __init__(self, send: Callable[[int, dict[str, Any]], None], decided: Callable[[str, list[int]], None]) -> None:
        self._send, self._decided = send, decided
        self._plan: _Plan | None = None
        self._plans = 0
        self._margin = _MARGIN

    def begin(self) -> None:
        """A generation begins."""
        self._plan, self._margin = None, _MARGIN

    def consider(self, members: Sequence[Worker], comers: Sequence[Worker], now: float) -> None:
        """Plan that all members stop together, if some are to leave or others are ready to come."""
        if self._plan is not None:
            return
        leavers = [worker for worker in members if worker.leaving is not None]
        if len(leavers) == len(members):
            # The state would be lost with the last of them: those who come take it over first.
            late = [worker for worker in leavers if now - worker.since > _SECONDS_TO_HAND_OVER]
            leavers = [] if comers else late
        if not leavers and not comers:
            return
        why = [f"worker {worker.number} leaves ({worker.leaving})" for worker in leavers]
        why += [f"worker {worker.number} comes" for worker in comers]
        self._plans += 1
        boundary = max(worker.boundaries for worker in members) + self._margin
        numbers = {worker.number for worker in members}
        plan = _Plan(self._plans, boundary, numbers, [worker.number for worker in leavers], " and ".join(why))
        self._plan = plan
        self._tell({"kind": "plan", "boundary": boundary, "leavers": plan.leavers, "why": plan.why})

    def promise(self, worker: Worker, number: int, ok: bool) -> None:
        """A member has promised to stop, or was past the boundary already."""
        plan = self._plan
        if plan is None or number != plan.number:
            return
        if not ok:
            self._margin = min(2 * self._margin, _MAX_MARGIN)
            self.cancel()
            return
        plan.promised.add(worker.number)
        if plan.promised == plan.members and not plan.confirmed:
            plan.confirmed = True
            self._decided(plan.why, plan.leavers)
            self._tell({"kind": "confirm"})

    def cancel(self) -> None:
        """Nobody stops; what has been decided stays."""
        if self._plan is not None and not self._plan.confirmed:
            self._tell({"kind": "cancel"})
            self._plan = None

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._plan is not None
        for member in self._plan.members:
            self._send(member, {**message, "plan": self._plan.number})
