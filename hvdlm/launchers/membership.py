"""Who is in an elastic job: decides from what happens who is started, who trains together, and when it is over.

No clock, socket or process is touched here: events come in through methods, and what is to be done goes out through
:class:`hvdlm.launchers.roster.Acts`, so that every sequence of events can be tried in a test.
"""

from __future__ import annotations

import signal
from typing import Any

from hvdlm import wire
from hvdlm.launchers.failure import Record, root_cause
from hvdlm.launchers.places import Limits, Places, slots_of
from hvdlm.launchers.planner import Planner
from hvdlm.launchers.roster import Acts, Worker
from hvdlm.launchers.shortage import Shortage

__all__ = ["Membership"]

_NEEDLESS = "it is not needed"
_SECONDS_OF_A_STUMBLE = 2.0
_SECONDS_TO_REST = 1.0
"""A generation that breaks at once, with all its workers alive, is not tried again at once."""


class Membership:
    """See the module.

    Args:
        limits: How many and how long.
        places: Where.
        acts: What to do it with.
    """

    def __init__(self, limits: Limits, places: Places, acts: Acts) -> None:
        self.limits, self.places, self._acts = limits, places, acts
        self.workers: dict[int, Worker] = {}
        self.generation = 0
        self.failure: Record | None = None
        self.over: str | None = None
        """Why the job is over: ``done``, ``failed``, ``lost`` (the state went with its last holder), ``below`` or
        ``resets``; None while it runs."""
        self._records: list[Record] = []
        self._next = 0
        self._planner = Planner(acts.send, lambda why, leavers: acts.event("change", why=why, leavers=leavers))
        self._broken = False
        self._stopped_at: float | None = None  # when the first member of this generation stopped, or was lost
        self._progress = False  # whether a commit was made that it would hurt to lose
        self._lost_at: float | None = None
        self._shortage = Shortage(limits, acts)
        self._began: float | None = None
        self._formed_at = self._rest_until = 0.0
        self._costs: dict[str, Any] = {"lost_steps": 0, "samples_retrained": 0, "recovery_seconds": 0.0}

    # What happens.

    def heard(self, number: int, message: dict[str, Any], now: float) -> None:
        """A worker said something."""
        worker = self.workers.get(number)
        if worker is None or worker.state == "ended":
            return
        worker.heard = now
        kind = message["kind"]
        if kind == "beat":
            worker.boundaries = int(message["boundaries"])
        elif kind == "ready":
            self._ready(worker, message, now)
        elif kind == "promise":
            worker.boundaries = max(worker.boundaries, int(message["boundaries"]))
            self._planner.promise(worker, int(message["plan"]), bool(message["ok"]))
        elif kind == "notice":
            self._leave(worker, str(message["why"]), now)
        elif kind == "left":
            worker.state = "left"
            self._left(worker, now)
        elif kind == "finished":
            worker.state, worker.finished = "finished", True
        elif kind == "commit":
            self._progress |= int(message["number"]) > 0
        elif kind == "written":
            self._acts.event("checkpoint", worker=number, step=message["step"], ok=message["ok"])
        elif kind == "going":
            before, self._costs = self._costs, dict(message["costs"])
            self._acts.event(
                "recovered",
                generation=self.generation,
                lost_steps=self._costs["lost_steps"] - before["lost_steps"],
                seconds=round(self._costs["recovery_seconds"] - before["recovery_seconds"], 3),
            )

    def _ready(self, worker: Worker, message: dict[str, Any], now: float) -> None:
        if worker.state == "member":
            self._stopped_at = self._stopped_at or now
            if message["cause"] == "lost":
                stumbled = not self._broken and now - self._formed_at < _SECONDS_OF_A_STUMBLE
                self._break(now, f"worker {worker.number} lost a peer")
                if stumbled:
                    self._rest_until = now + _SECONDS_TO_REST
        worker.state, worker.finished = "ready", False
        worker.pid = message.get("pid")
        worker.held = max((int(number) for number in message["held"]), default=-1)
        self._progress |= worker.held > 0
        if worker.leaving is not None and worker.held < 0:
            self._stop(worker)

    def ended(self, number: int, record: Record, now: float, wall: float) -> None:
        """A worker's process has ended."""
        worker = self.workers[number]
        if worker.state == "ended":
            return
        state, worker.state = worker.state, "ended"
        asked = worker.leaving is not None and record.code in (128 + signal.SIGTERM, 128 + signal.SIGKILL)
        if record.code == 0:
            worker.finished = True  # what it said of it may come later; also a script that says itself that it is done
        elif record.code == wire.LEFT_CODE:
            self._left(worker, now)
        elif not worker.left and not asked:
            rest = self.places.failed(worker.place, now, now - worker.since)
            self._records.append(record)
            why = record.why
            where = str(worker.place)
            self._acts.event("lost", worker=number, place=where, why=why, host=record.host, seconds_to_rest=rest)
            self._acts.say(f"worker {number} on {where} was lost ({why}); that place rests for {rest:g} s")
        self._rest_until = 0.0  # the losses have a cause, which is gone
        if state == "member":
            self._lost_at = self._lost_at or wall
            self._break(now, f"worker {number} ended")

    def _left(self, worker: Worker, now: float) -> None:
        """A worker has gone as it was told to. It says so, and its code does: either may come first."""
        if worker.left or worker.leaving in (None, _NEEDLESS):
            return
        worker.left = True
        if worker.place in self.places.wanted:
            self.places.failed(worker.place, now, now - worker.since)  # where it was, none may be for now
        self._acts.event("left", worker=worker.number, why=worker.leaving)

    def _break(self, now: float, why: str) -> None:
        """The running generation cannot go on: its collectives fail."""
        self._stopped_at = self._stopped_at or now
        if self._broken:
            return
        self._broken = True
        self._acts.break_off()
        self._planner.cancel()
        for worker in self._members():
            self._acts.send(worker.number, {"kind": "broken", "generation": self.generation, "why": why})

    def _stop(self, worker: Worker) -> None:
        """A worker is not needed, and holds nothing."""
        worker.leaving = worker.leaving or _NEEDLESS
        if worker.state == "ready":
            if not worker.told:
                self._acts.send(worker.number, {"kind": "stop"})
            worker.told = True
        else:
            worker.doomed = True
            self._acts.kill(worker.number)

    def _leave(self, worker: Worker, why: str, now: float) -> None:
        if worker.leaving is None:
            worker.leaving, worker.since = why, now
            self._acts.event("notice", worker=worker.number, place=str(worker.place), why=why)
            self._acts.say(f"worker {worker.number} on {worker.place} is to leave ({why})")
            if worker.held < 0 and worker.state in ("starting", "ready"):
                self._stop(worker)

    # What follows.

    def check(self, now: float) -> None:
        """Do what is due; call it after each event, and now and then."""
        if self.over is not None:
            return
        self._remove(now)
        self._find_hung(now)
        self._start(now)
        if self._finished():
            return
        if not self._members():
            if now >= self._rest_until:
                self._form(now)
        elif not self._broken:
            comers = [worker for worker in self._alive() if worker.state == "ready" and worker.leaving is None]
            self._planner.consider(self._members(), comers, now)

    def keeper(self) -> int | None:
        """The worker that holds the newest state and waits; None if none does."""
        waiting = [worker for worker in self._alive() if worker.state == "ready" and worker.held >= 0]
        return max(waiting, key=lambda worker: worker.held).number if waiting else None

    def _alive(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.state not in ("ended", "left")]

    def _members(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.state == "member"]

    def _remove(self, now: float) -> None:
        for worker in self._alive():
            if worker.place not in self.places.wanted and worker.leaving is None:
                self._leave(worker, "its place is gone", now)

    def _find_hung(self, now: float) -> None:
        limits = self.limits
        for worker in self._alive():
            silent = worker.heard is not None and now - worker.heard > limits.silence
            deaf = self._stopped_at is not None and now - self._stopped_at > limits.check_in
            never = worker.state == "starting" and now - worker.since > 10 * limits.start
            if (silent or never or (deaf and worker.state == "member")) and not worker.doomed:
                worker.doomed = True
                self._acts.event("hung", worker=worker.number, place=str(worker.place))
                self._acts.say(f"worker {worker.number} on {worker.place} does not answer: it is killed")
                self._acts.kill(worker.number)

    def _start(self, now: float) -> None:
        alive = self._alive()
        if any(worker.finished for worker in self.workers.values()):
            return
        staying = [worker for worker in alive if worker.leaving is None]
        taken = [worker.place for worker in alive]
        for place in self.places.free(taken, now)[: max(0, self.limits.most - len(staying))]:
            worker = Worker(self._next, place, now)
            self.workers[self._next] = worker
            self._next += 1
            self._acts.event("started", worker=worker.number, place=str(place))
            self._acts.start(worker.number, place)
            self._began = now if self._began is None else self._began

    def _finished(self) -> bool:
        workers, alive = self.workers.values(), self._alive()
        if any(worker.finished for worker in workers):
            for worker in alive:
                if worker.rank < 0 and worker.leaving is None and not worker.finished:
                    self._stop(worker)  # it came too late to be of use
            self.over = None if alive else "done"
        elif self._progress and not any(worker.rank >= 0 for worker in alive):
            self.over = "lost"
        elif not alive and self.places.wanted and all(self.places.failures(place) for place in self.places.wanted):
            self.over = "failed"
        elif self.limits.resets is not None and self.generation > self.limits.resets + 1:
            self.over = "resets"
        if self.over not in (None, "done"):
            self.failure = root_cause(self._records)
        return self.over is not None

    def _form(self, now: float) -> None:
        """Begin a generation, once there are enough workers for it."""
        candidates = [worker for worker in self._alive() if worker.state == "ready" and not worker.told]
        starting = [worker for worker in self._alive() if worker.state == "starting"]
        if not self.generation and starting and self._began is not None and now - self._began < self.limits.start:
            return
        chosen = [worker for worker in candidates if worker.leaving is None]
        newest = max((worker.held for worker in candidates), default=-1)
        if newest > max((worker.held for worker in chosen), default=-1):
            chosen = candidates  # a worker that is to leave has the state: it hands it over first
        for worker in candidates:
            if worker not in chosen:
                self._stop(worker)  # those that go on have the state, and need it no more
        if any(worker.finished for worker in self.workers.values()):
            chosen = [worker for worker in candidates if worker.rank >= 0]  # only the end is left to do
            if not chosen:
                return
        elif len(chosen) < self.limits.least:
            coming = sum(worker.state == "starting" for worker in self._alive())
            if self._shortage.lasts(len(chosen), coming, now):
                self.over = "below"
            return
        self._shortage.over()
        # Those that hold the newest state first: rank 0 passes its own on.
        chosen.sort(key=lambda worker: (-worker.held, worker.rank if worker.rank >= 0 else self._next, worker.number))
        self._formed_at = now
        self._begin(chosen)

    def _begin(self, chosen: list[Worker]) -> None:
        slots = slots_of([worker.place for worker in chosen])
        variables = self._acts.variables(slots)
        self.generation += 1
        common = {"kind": "assign", "generation": self.generation, "lost_at": self._lost_at}
        common |= {"costs": {**self._costs, "resets": self.generation - 1}}
        self._broken, self._stopped_at, self._lost_at = False, None, None
        self._planner.begin()
        for worker, slot, own in zip(chosen, slots, variables, strict=True):
            worker.state, worker.rank, worker.boundaries = "member", slot.rank, 0
            place = {"rank": slot.rank, "size": slot.size, "variables": own}
            self._acts.send(worker.number, common | place)
        members = {str(worker.number): str(worker.place) for worker in chosen}
        pids = {str(worker.number): worker.pid for worker in chosen}
        self._acts.event("generation", generation=self.generation, size=len(chosen), members=members, pids=pids)
        if self.generation > 1:
            workers = f"{len(chosen)} worker" + ("s" if len(chosen) > 1 else "")
            self._acts.say(f"goes on with {workers}: {', '.join(members)}")
