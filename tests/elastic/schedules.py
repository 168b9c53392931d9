"""Random, seeded schedules of what happens to the workers of a job."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.elastic.faults import may_be_lost
from tests.elastic.jobs import Ended, Job

HOSTS = ("localhost", "127.0.0.1")
STEPS = 72
KINDS = ("scattered", "scattered", "two at once", "all but one", "in a recovery", "in a checkpoint", "all")


def schedule(seed: int) -> dict[str, Any]:
    """What is to happen: faults inside workers at named places, and changes of the hosts from outside.

    ``scattered`` faults have nothing to do with each other; those of ``two at once`` and ``all but one`` happen in one
    step; ``in a recovery`` a worker fails while the others go on without one that was lost; ``in a checkpoint`` the
    worker that writes one fails while it does, or its disk is full; ``all`` are lost, and the job is started again.
    """
    draw = random.Random(seed)
    slots = draw.randint(1, 4)
    first = min(slots, draw.randint(1, 2))
    kind = draw.choice(KINDS if slots > 2 else [kind for kind in KINDS if kind not in _MANY] if slots > 1 else _ONE)
    faults = _faults(draw, kind, slots)
    changes = []
    for _ in range(draw.randint(0, 2)):
        name = draw.choice(HOSTS)
        changes.append({"after": draw.randint(5, 50), "host": name, "slots": draw.randint(0, 2)})
    outside = []
    if draw.random() < 0.3 and slots > 1:
        how = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
        outside.append({"after": draw.randint(5, 60), "signal": int(how)})
    changes.sort(key=lambda change: change["after"])
    hosts = {HOSTS[0]: first, HOSTS[1]: slots - first}
    return {"seed": seed, "kind": kind, "hosts": hosts, "faults": faults, "changes": changes, "signals": outside}


_MANY = ("two at once", "in a recovery")
_ONE = ("scattered", "in a checkpoint", "all")


def _faults(draw: random.Random, kind: str, slots: int) -> list[dict[str, Any]]:
    workers = list(range(slots))
    step = draw.randint(1, STEPS - 4)
    at = draw.choice(["step", "step", "commit"])
    number = step if at == "step" else 7 * draw.randint(1, 9)
    if kind == "scattered":
        return [_anywhere(draw, worker) for worker in draw.sample(workers, draw.randint(0, max(1, slots - 1)))]
    if kind == "two at once":
        return [_fault(worker, at, _loss(draw), number) for worker in draw.sample(workers, 2)]
    if kind == "all but one":
        return [_fault(worker, at, _loss(draw), number) for worker in draw.sample(workers, slots - 1)]
    if kind == "in a recovery":
        one, other = draw.sample(workers, 2)
        return [
            _fault(one, "step", _loss(draw), step),
            _fault(other, draw.choice(["join", "recovery"]), _loss(draw), 2),
        ]
    if kind == "in a checkpoint":
        how = draw.choice(["kill", "raise", "full", "full"]) if slots > 1 else "full"
        other = draw.choice(workers)
        return [
            _fault(None, "checkpoint", how, draw.randint(1, 12)),
            *([_anywhere(draw, other)] if draw.random() < 0.5 else []),
        ]
    return [_fault(worker, at, draw.choice(["kill", "raise"]), number) for worker in workers]


def _anywhere(draw: random.Random, worker: int) -> dict[str, Any]:
    at = draw.choice(["start", "step", "step", "step", "commit", "join", "recovery", "finish"])
    how = draw.choice(["kill", "kill", "raise", "exit", "term", "usr1", "stop"])
    if at == "start":
        how = draw.choice(["kill", "exit"])
    number = {"start": 0, "finish": 0, "step": draw.randint(1, STEPS - 4), "commit": 7 * draw.randint(1, 9)}.get(at, 2)
    return _fault(worker, at, how, number)


def _loss(draw: random.Random) -> str:
    return draw.choice(["kill", "kill", "kill", "raise", "exit", "stop"])


def _fault(worker: int | None, at: str, how: str, number: int = 0) -> dict[str, Any]:
    return {"worker": worker, "at": at, "how": how, "number": number}


def play(plan: dict[str, Any], directory: Path, script: str, limit: float = 240, more: Sequence[str] = ()) -> Ended:
    """Run a job to whose workers this happens.

    A job that loses all workers that hold the state ends, and is started again from its checkpoint, as a person would.
    """
    hosts = dict(plan["hosts"])
    path = directory / "hosts"
    _write(path, hosts)
    flags = ["--min-np", "1", "--max-np", "4", "--hostfile", "hosts", "--hang-timeout", "8", "--elastic-timeout", "90"]
    flags += ["--checkpoint-dir", "checkpoints", "--checkpoint-every", "14", *more]
    acts = [(change["after"], change) for change in plan["changes"] + plan["signals"]]
    environment = {"PAUSE": "0.05", **({"ALL_MAY_FAIL": "1"} if plan["kind"] == "all" else {})}
    with Job(directory, script, flags, plan["faults"], environment) as job:
        for after, act in sorted(acts, key=lambda item: item[0]):
            if not _reached(job, after, limit):
                break
            if "signal" in act:
                _signal_one(job, act["signal"])
                continue
            hosts[act["host"]] = act["slots"]
            if not any(hosts.values()):
                hosts[HOSTS[0]] = 1
            _write(path, hosts)
        ended = job.end(limit)
    if ended.events and ended.events[-1].get("how") in ("lost", "failed") and may_be_started_again(ended):
        with Job(directory, script, [*flags, "--auto-resume"], plan["faults"], environment) as job:
            ended = job.end(limit)
    return ended


def may_be_started_again(ended: Ended) -> bool:
    """Whether the job is over because everybody who held the state was lost, and by faults of the schedule alone."""
    held = ended.of("generation")[-1:]
    lost = {event["worker"] for event in ended.of("lost")}
    return all(int(worker) in lost for event in held for worker in event["members"])


def _write(path: Path, hosts: dict[str, int]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items() if slots))
    partial.replace(path)


def _reached(job: Job, step: int, limit: float) -> bool:
    end = time.monotonic() + limit
    while job.process.poll() is None and time.monotonic() < end:
        if any(event["event"] == "commit" and event["step"] >= step for event in job.events()):
            return True
        time.sleep(0.02)
    return False


def _signal_one(job: Job, signum: int) -> None:
    """Of several workers, one; the state must not go with the last of them."""
    members = [event for event in job.events() if event["event"] == "generation"][-1]
    size = len(members["pids"])
    if size > 1 and (signum != signal.SIGKILL or may_be_lost(job.directory, members["generation"], size)):
        try:
            job.signal(int(list(members["pids"])[-1]), signum)
        except ProcessLookupError:
            return
