"""What the launcher makes of supervisors that end, whichever of them it hears first."""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from hvdlm import wire
from hvdlm.launchers.failure import Record, root_cause
from hvdlm.launchers.peers import LocalChannel, Peers

TERMINATED = Record(
    rank=1,
    host="here",
    code=128 + signal.SIGTERM,
    signal=signal.SIGTERM,
    seconds=1.0,
    time=time.time(),
    traceback=None,
    tail="",
    secondary=False,
    asked=signal.SIGTERM,
    traceback_before_asked=False,
)


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    found = [socket.socketpair() for _ in range(2)]
    yield found
    for pair in found:
        for end in pair:
            end.close()


@pytest.mark.parametrize("killed_first", [True, False])
def test_a_killed_supervisor_is_the_cause(pairs: list[tuple[socket.socket, socket.socket]], killed_first: bool) -> None:
    """mpirun ends the others when one is killed, and their word may be heard before its silence."""
    records: list[Record] = []

    def ended(_: int, record: Record) -> None:
        records.append(record)
        peers.order(wire.TERMINATE)  # as a launcher does

    with selectors.DefaultSelector() as selector:
        peers = Peers(2, selector, lambda *_: None, ended, lambda _: None)
        hear = [peers.adopt(LocalChannel(ours)) for ours, _ in pairs]
        for worker in range(2):
            hear[worker](wire.encode_json(wire.HELLO, {"worker": worker}))
        if killed_first:
            pairs[0][1].close()
        hear[1](wire.encode_json(wire.ENDED, vars(TERMINATED)))
        pairs[0][1].close()
        hear[0](b"")
        peers.close()
    cause = root_cause(records)
    assert cause is not None
    # One that is killed after it was told to end its program is not what went wrong.
    assert cause.rank == (0 if killed_first else 1)
    assert cause.code == (137 if killed_first else 143)
