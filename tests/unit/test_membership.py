"""Who is in an elastic job, tried with events and a clock of the test's own."""

from __future__ import annotations

from typing import Any

from hvdlm import wire
from hvdlm.launchers.failure import Record
from hvdlm.launchers.hosts import Host
from hvdlm.launchers.membership import Membership
from hvdlm.launchers.places import Limits, Place, Places, slots_of


class World:
    """Records what a membership has done, and plays workers that do as they are told."""

    def __init__(self, hosts: str = "a:2", least: int = 1, most: int = 9, **limits: Any) -> None:
        self.started: list[tuple[int, Place]] = []
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.killed: list[int] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.said: list[str] = []
        self.now = 0.0
        more = {"start": 30.0, "below": 60.0, "silence": 10.0, "check_in": 20.0} | limits
        self.membership = Membership(Limits(least=least, most=most, **more), Places(5.0, 40.0), self)
        self.hosts(hosts)

    def start(self, worker: int, place: Place) -> None:
        self.started.append((worker, place))

    def send(self, worker: int, message: dict[str, Any]) -> None:
        self.sent.append((worker, message))

    def kill(self, worker: int) -> None:
        self.killed.append(worker)

    def variables(self, slots: Any) -> list[dict[str, str]]:
        return [{"HOROVOD_RANK": str(slot.rank)} for slot in slots]

    def break_off(self) -> None:
        self.sent.append((-1, {"kind": "break_off"}))

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def say(self, text: str) -> None:
        self.said.append(text)

    def hosts(self, text: str) -> None:
        hosts = [Host(name, int(slots)) for name, slots in (part.split(":") for part in text.split(",") if part)]
        self.membership.places.update(hosts)
        self.check()

    def check(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.membership.check(self.now)

    def hear(self, worker: int, kind: str, **fields: Any) -> None:
        self.membership.heard(worker, {"kind": kind, **fields}, self.now)
        self.check()

    def ready(self, *workers: int, held: tuple[int, ...] = (), cause: str = "start") -> None:
        for worker in workers:
            self.hear(worker, "ready", held=list(held), cause=cause, pid=100 + worker)

    def end(self, worker: int, code: int = 137, signal: int | None = 9) -> None:
        record = Record(
            rank=worker, host="a", code=code, signal=signal, seconds=1.0, time=self.now, traceback=None, tail="",
            secondary=False, asked=None, traceback_before_asked=False,
        )  # fmt: skip
        self.membership.ended(worker, record, self.now, 1000.0 + self.now)
        self.check()

    def wait(self, seconds: float, *workers: int) -> None:
        """Let time pass in which these workers give signs of life."""
        until = self.now + seconds
        while self.now < until:
            self.beat(*workers)
            self.check(1.0)

    def told(self, kind: str) -> dict[int, dict[str, Any]]:
        """The last message of a kind that each worker got."""
        return {worker: message for worker, message in self.sent if message["kind"] == kind}

    def beat(self, *workers: int) -> None:
        for worker in workers:
            self.hear(worker, "beat", boundaries=0)


def test_all_workers_of_the_start_are_waited_for_but_not_for_ever() -> None:
    world = World()
    world.ready(0)
    assert not world.told("assign")
    world.wait(31, 0)
    assert world.told("assign")[0]["size"] == 1


def test_survivors_go_on_and_those_with_the_newest_state_come_first() -> None:
    world = World("a:3")
    world.ready(0, 1, 2)
    world.end(0)
    assert world.told("broken").keys() == {1, 2} and world.told("broken")[1]["generation"] == 1
    assert world.told("assign")[1]["generation"] == 1
    world.ready(1, held=(10,), cause="lost")
    assert world.told("assign")[1]["generation"] == 1, "worker 2 is still to come"
    world.ready(2, held=(10, 20), cause="lost")
    assigned = world.told("assign")
    assert (assigned[2]["rank"], assigned[1]["rank"], assigned[1]["size"]) == (0, 1, 2)
    assert assigned[1]["lost_at"] == 1000.0


def test_a_failure_lets_its_slot_rest_and_no_other_and_longer_each_time() -> None:
    world = World()
    world.ready(0, 1)
    world.end(1)
    world.ready(0, held=(1,), cause="lost")
    assert len(world.started) == 2
    world.beat(0)
    world.check(4.9)
    assert len(world.started) == 2
    world.check(0.2)
    assert world.started[2] == (2, Place("a", 1))
    world.end(2)
    world.beat(0)
    world.check(9.9)
    assert len(world.started) == 3
    world.beat(0)
    world.check(0.2)
    assert world.started[3] == (3, Place("a", 1))


def test_a_change_is_confirmed_once_all_have_promised() -> None:
    world = World("a:1")
    world.ready(0)
    world.hosts("a:1,b:1")
    world.hear(0, "beat", boundaries=7)
    world.ready(1)
    plan = world.told("plan")[0]
    assert plan["boundary"] > 7 and plan["leavers"] == []
    assert not world.told("confirm")
    world.hear(0, "promise", plan=plan["plan"], ok=True, boundaries=8)
    assert world.told("confirm")[0]["plan"] == plan["plan"]
    world.ready(0, held=(9,), cause="planned")
    assert world.told("assign")[1] | {"variables": {}} == world.told("assign")[0] | {"rank": 1, "variables": {}}


def test_a_member_that_is_past_the_boundary_gets_a_later_one() -> None:
    world = World("a:1")
    world.ready(0)
    world.hosts("a:2")
    world.ready(1)
    first = world.told("plan")[0]
    world.hear(0, "promise", plan=first["plan"], ok=False, boundaries=50)
    second = world.told("plan")[0]
    assert world.told("cancel")[0]["plan"] == first["plan"]
    assert second["boundary"] > 50 and second["plan"] != first["plan"]
    world.hear(0, "promise", plan=first["plan"], ok=True, boundaries=50)
    assert not world.told("confirm"), "that plan was cancelled"


def test_a_loss_cancels_a_plan() -> None:
    world = World("a:2,b:1")
    world.ready(0, 1)
    world.wait(31, 0, 1)
    world.ready(2)
    plan = world.told("plan")[0]["plan"]
    world.hear(0, "promise", plan=plan, ok=True, boundaries=1)
    world.end(1)
    assert world.told("cancel")[0]["plan"] == plan
    world.ready(0, held=(0,), cause="lost")
    assert world.told("assign")[2]["size"] == 2


def test_the_last_holder_of_the_state_hands_it_over_before_it_leaves() -> None:
    world = World("a:1")
    world.ready(0)
    world.hear(0, "commit", number=5)
    world.hosts("b:1")
    assert world.started[-1] == (1, Place("b", 0))
    world.beat(0)
    world.check(3)
    assert not world.told("plan"), "nobody is there to take the state over"
    world.ready(1)
    plan = world.told("plan")[0]
    assert plan["leavers"] == []
    world.hear(0, "promise", plan=plan["plan"], ok=True, boundaries=1)
    world.ready(0, held=(6,), cause="planned")
    assert {worker: message["rank"] for worker, message in world.told("assign").items()} == {0: 0, 1: 1}
    world.check()
    plan = world.told("plan")[0]
    assert plan["leavers"] == [0]


def test_nobody_waits_for_ever_to_hand_over() -> None:
    world = World("a:1")
    world.ready(0)
    world.hear(0, "notice", why="SIGTERM")
    world.wait(26, 0)
    assert world.told("plan")[0]["leavers"] == [0]


def test_below_the_minimum_it_waits_says_so_and_ends() -> None:
    world = World(least=2)
    world.ready(0, 1)
    world.hear(0, "commit", number=3)
    world.end(1)
    world.ready(0, held=(3,), cause="lost")
    assert "1 of at least 2" in world.said[-1]
    world.wait(61, 0)
    assert world.membership.over == "below"


def test_a_worker_that_comes_back_in_time_ends_the_wait() -> None:
    world = World(least=2)
    world.ready(0, 1)
    world.end(1)
    world.ready(0, held=(3,), cause="lost")
    world.beat(0)
    world.check(6)
    world.ready(2)
    assert world.told("assign")[2]["size"] == 2
    assert world.membership.over is None


def test_silence_and_not_noticing_a_loss_count_as_hanging() -> None:
    world = World("a:3")
    world.ready(0, 1, 2)
    world.beat(0, 1, 2)
    world.now += 6
    world.beat(0, 1)
    world.check(5)
    assert world.killed == [2]
    world.end(2)
    world.ready(0, held=(1,), cause="lost")
    world.wait(21, 0, 1)
    assert world.killed == [2, 1], "worker 1 beats, but never noticed"


def test_a_job_is_done_when_one_has_finished_and_all_have_ended() -> None:
    world = World()
    world.ready(0, 1)
    world.hear(0, "finished")
    world.end(0, code=0, signal=None)
    assert world.membership.over is None
    world.hear(1, "finished")
    world.end(1, code=0, signal=None)
    assert world.membership.over == "done"


def test_who_comes_too_late_is_not_started_from_scratch() -> None:
    world = World("a:1")
    world.ready(0)
    world.hosts("a:2")
    world.hear(0, "finished")
    world.ready(1)
    assert world.told("stop").keys() == {1} or world.killed == [1]
    world.end(0, code=0, signal=None)
    world.end(1, code=0, signal=None)
    assert world.membership.over == "done"


def test_the_state_is_lost_with_its_last_holder() -> None:
    world = World("a:2")
    world.ready(0, 1)
    world.hear(0, "commit", number=3)
    world.end(0)
    world.end(1)
    assert world.membership.over == "lost"
    assert world.membership.failure is not None and world.membership.failure.rank == 0


def test_a_script_that_fails_in_every_slot_ends_the_job() -> None:
    world = World("a:2")
    world.end(0, code=1, signal=None)
    assert world.membership.over is None
    world.end(1, code=1, signal=None)
    assert world.membership.over == "failed"


def test_resets_can_be_limited() -> None:
    world = World("a:2", resets=0)
    world.ready(0, 1)
    world.hear(0, "commit", number=1)
    world.end(1)
    world.ready(0, held=(1,), cause="lost")
    world.check()
    assert world.membership.over == "resets"


def test_no_more_than_the_most_are_started() -> None:
    world = World("a:2,b:2", most=3)
    assert [place for _, place in world.started] == [Place("a", 0), Place("a", 1), Place("b", 0)]


def test_slots_of_places_in_any_order() -> None:
    slots = slots_of([Place("b", 0), Place("a", 0), Place("b", 3)])
    found = [(s.hostname, s.rank, s.local_rank, s.local_size, s.cross_rank, s.cross_size) for s in slots]
    assert found == [("b", 0, 0, 2, 0, 2), ("a", 1, 0, 1, 1, 2), ("b", 2, 1, 2, 0, 1)]


def leaving() -> World:
    """Worker 1 was told to leave, all have agreed, and it is ready for what comes next."""
    world = World()
    world.ready(0, 1)
    world.hear(0, "commit", number=5)
    world.hear(1, "notice", why="SIGTERM")
    plan = world.told("plan")[0]["plan"]
    for worker in (0, 1):
        world.hear(worker, "promise", plan=plan, ok=True, boundaries=1)
    world.ready(1, held=(6,), cause="planned")
    return world


def test_a_worker_that_leaves_is_let_go_when_the_others_are_ready() -> None:
    world = leaving()
    assert not world.told("stop")
    world.ready(0, held=(6,), cause="planned")
    assert list(world.told("stop")) == [1]
    assert world.told("assign")[0]["size"] == 1
    world.end(1, code=wire.LEFT_CODE, signal=None)
    assert [fields["worker"] for kind, fields in world.events if kind == "left"] == [1]
    assert not [kind for kind, _ in world.events if kind == "lost"]
    # What it said may come after its end.
    world.hear(1, "left", why="SIGTERM")
    assert len([kind for kind, _ in world.events if kind == "left"]) == 1


def test_a_worker_that_leaves_goes_on_if_the_only_other_one_is_lost_first() -> None:
    world = leaving()
    world.end(0)
    assert world.membership.over is None and not world.told("stop")
    assert world.told("assign")[1] == world.told("assign")[1] | {"generation": 2, "rank": 0, "size": 1}


def test_an_end_with_0_is_the_end_of_the_training_also_of_a_worker_that_was_to_leave() -> None:
    world = World("a:1")
    world.ready(0)
    world.hear(0, "commit", number=5)
    world.hear(0, "notice", why="SIGTERM")
    world.end(0, code=0, signal=None)
    assert world.membership.over == "done"
