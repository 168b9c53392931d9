"""Which replicas differ and who is missing, without processes; the watchdog among threads."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdlm.adapters.fake import FakeAdapter, FakeJob, FakeModel, ThreadCollectives
from hvdlm.algorithms.fingerprint import differences, majority
from hvdlm.environment import Environment
from hvdlm.errors import MismatchError
from hvdlm.observe.events import Events
from hvdlm.observe.stall import Standing, stack_of_main_thread, verdict
from hvdlm.observe.watchdog import Watchdog
from hvdlm.session import Session
from hvdlm.world import World


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_majority(digests: list[int]) -> None:
    root, odd = majority(digests)
    right = [rank for rank in range(len(digests)) if rank not in odd]
    assert root == right[0] and len({digests[rank] for rank in right}) == 1
    assert all(digests[rank] != digests[root] for rank in odd)
    assert all(digests.count(digests[root]) >= digests.count(d) for d in digests)


def test_differences_keep_the_order_of_the_model() -> None:
    found = differences([[1, 2, 3], [1, 9, 3], [1, 9, 4]])
    assert [(d.index, d.odd, d.root) for d in found] == [(1, (0,), 1), (2, (2,), 0)]


@pytest.mark.parametrize("action", ["stop", "resync", "warn"])
def test_inspection_among_threads(tmp_path: Path, action: str) -> None:
    def work(collectives: ThreadCollectives) -> tuple[str, list[float]]:
        environment = Environment(run_dir=str(tmp_path), progress="none", size=3, launcher="x")
        run = Session(
            FakeAdapter(collectives),
            environment,
            {"fingerprint_every": 5, "on_divergence": action, "watchdog_seconds": 0},
        )
        (model,) = run.attach([("m", "model", FakeModel(a=np.zeros(2), b=np.zeros(2)))])
        told = ""
        try:
            for step in range(1, 21):
                run.account.reduced()
                if step == 7 and collectives.rank == 0:
                    model.parameters["b"][1] += 1e-300
        except MismatchError as error:
            told = str(error)
        return told, model.parameters["b"].tolist()

    results = FakeJob(3).run(work)
    lines = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    events = [event for event in lines if event["event"] == "divergence"]
    assert (events[0]["tensor"], events[0]["ranks"], events[0]["step"]) == ("b", [0], 10)
    assert events[0]["last_equal_step"] == 5 and events[0]["action"] == action
    if action == "stop":
        assert (
            len({told for told, _ in results}) == 1 and "b is not the same on rank 0 as on ranks 1, 2" in results[0][0]
        )
    elif action == "resync":
        # Two of three are right, although rank 0 is the third.
        assert [value for _, value in results] == [[0.0, 0.0]] * 3 and len(events) == 1
    else:
        assert results[0][1] == [0.0, 1e-300] and len(events) > 1


def standing(rank: int, operation: str | None, seconds: float = 9.0, steps: int = 4) -> Standing:
    return Standing(rank=rank, operation=operation, seconds=seconds, steps=steps, stack=["File t.py, line 1, in f"])


@pytest.mark.parametrize(
    ("now", "kind", "ranks"),
    [
        ([standing(0, "x"), standing(1, None), standing(2, "x")], "missing", (1,)),
        ([standing(0, "x"), standing(2, "x")], "missing", (1,)),
        ([standing(0, "x"), standing(1, "y"), standing(2, "x")], "mismatch", (0, 1, 2)),
        ([standing(0, "x"), standing(1, "x"), standing(2, "x")], "network", (0, 1, 2)),
        ([standing(0, "x"), standing(1, "x", steps=3), standing(2, "x")], "missing", (1,)),
        ([standing(0, None), standing(1, None), standing(2, None)], None, ()),
    ],
)
def test_verdict(now: list[Standing], kind: str | None, ranks: tuple[int, ...]) -> None:
    table = {s.rank: s for s in now}
    found = verdict(table, table, 3)
    assert (found and found.kind, found.ranks if found else ()) == (kind, ranks)
    if kind == "missing" and 1 not in table:
        assert found is not None and "rank 1 does not answer" in found.message


def test_a_job_that_goes_on_is_left_alone() -> None:
    before = {r: standing(r, "x", 9.0) for r in range(2)}
    assert verdict(before, {r: standing(r, "x", 0.1) for r in range(2)}, 2) is None
    assert verdict(before, {r: standing(r, "x", steps=5) for r in range(2)}, 2) is None


def test_the_stack_shows_the_script() -> None:
    assert any("test_the_stack_shows_the_script" in line for line in stack_of_main_thread())


def test_watchdog_ends_workers_that_can_never_go_on(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[tuple[int, int]] = []
    both = threading.Barrier(2)

    def work(collectives: ThreadCollectives) -> None:
        rank = collectives.rank
        began = time.monotonic()
        dog = Watchdog(
            World(rank=rank, size=2, local_rank=rank, local_size=2),
            collectives,
            waiting=lambda: (f"op{rank}", began),
            steps=lambda: 3,
            seconds=0.2,
            events=Events(None),
            end=lambda code: ended.append((rank, code)),
        )
        until = time.monotonic() + 30
        while {r for r, _ in ended} != {0, 1} and time.monotonic() < until:
            time.sleep(0.05)
        both.wait(30)
        dog.close()

    with caplog.at_level(logging.ERROR, "hvdlm"):
        FakeJob(2).run(work)
    assert {(0, 1), (1, 1)} == set(ended)
    assert "do not match" in caplog.text and "op1" in caplog.text


def test_watchdog_refuses_strangers(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """It listens where it is told to; what others send there is refused and told, and the workers go on."""
    evil = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 4000,
        b'{"token": "\xc3\xa9", "rank": 1}\n',
        b'{"token": 1}\n',
        b"",
        b"\0" * 4096,
    ]
    evil.append(pickle.dumps(_Creates(tmp_path / "CREATED")))
    answers: list[int] = []

    def work(collectives: ThreadCollectives) -> None:
        rank = collectives.rank
        dog = Watchdog(
            World(rank=rank, size=2, local_rank=0, local_size=1, cross_rank=rank, cross_size=2),
            collectives,
            waiting=lambda: None,
            steps=lambda: 3,
            seconds=60,
            events=Events(None),
            address="127.0.0.1",
        )
        if rank == 0:
            assert dog._listener is not None and dog._listener.getsockname()[0] == "127.0.0.1"
            for message in evil:
                with socket.create_connection(dog._listener.getsockname(), timeout=5) as connection:
                    connection.sendall(message)
                    connection.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionResetError):
                        answers.append(len(connection.recv(100)))
            assert dog._thread.is_alive()
        collectives.allgather(b"")
        dog.close()

    with caplog.at_level(logging.WARNING, "hvdlm"):
        FakeJob(2).run(work)
    assert not any(answers) and not (tmp_path / "CREATED").exists()
    assert caplog.text.count("watchdog: refused from 127.0.0.1: no worker of this job") == len(evil)


class _Creates:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_watchdog_says_nothing_of_short_waits(caplog: pytest.LogCaptureFixture) -> None:
    def work(collectives: ThreadCollectives) -> None:
        rank = collectives.rank
        dog = Watchdog(
            World(rank=rank, size=2, local_rank=rank, local_size=2),
            collectives,
            waiting=lambda: ("op", time.monotonic() - 0.1),
            steps=lambda: 3,
            seconds=0.3,
            events=Events(None),
        )
        time.sleep(1.5)
        dog.close()

    with caplog.at_level(logging.ERROR, "hvdlm"):
        FakeJob(2).run(work)
    assert caplog.text == ""
