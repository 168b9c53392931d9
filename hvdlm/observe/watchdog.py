"""Tells who is missing when workers wait for each other: which rank, at which operation, and where in the script.

Every rank has a thread that sleeps. The one of rank 0 listens on a socket (loopback, if all workers are on one host),
and the others hold a connection to it, opened with a token that travelled over Horovod. When a rank has waited in a
collective for long, it says so; rank 0 then asks every rank where it is, and tells. What travels is JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from hvdlm.contracts import Collectives
from hvdlm.observe.events import Events
from hvdlm.observe.stall import Standing, stack_of_main_thread, verdict
from hvdlm.processes import end_at_once
from hvdlm.world import World

__all__ = ["Watchdog"]

_log = logging.getLogger("hvdlm")

_TICK_SECONDS = 0.5
_ANSWER_SECONDS = 3.0
_MAX_LINE_BYTES = 1 << 20
_SECONDS_TO_GREET = 1.0
_MAX_COMPLAINTS = 20


class Watchdog:
    """Watches one rank, and on rank 0 the job.

    Args:
        world: Where this process stands.
        collectives: To tell the address once.
        waiting: The collective that this worker waits in, and since when.
        steps: How often gradients were made global so far.
        seconds: How long a wait may last before it is told.
        events: Where findings are written down.
        address: Where rank 0 listens if there are several hosts; every interface if None.
        end: Ends this process when the workers can never go on.
    """

    def __init__(
        self,
        world: World,
        collectives: Collectives,
        *,
        waiting: Callable[[], tuple[str, float] | None],
        steps: Callable[[], int],
        seconds: float,
        events: Events,
        address: str | None = None,
        end: Callable[[int], object] = end_at_once,
    ) -> None:
        self._world, self._waiting, self._steps = world, waiting, steps
        self._seconds, self._events, self._end = seconds, events, end
        self._closing = threading.Event()
        self._told: tuple[Any, ...] | None = None
        self._tell_again = seconds
        self._listener: socket.socket | None = None
        self._refused = 0
        where: dict[str, Any] = {}
        if world.is_main:
            own = "127.0.0.1" if world.within_host else address
            self._listener = socket.create_server((own or "", 0), backlog=world.size)
            port = self._listener.getsockname()[1]
            where = {"host": own or socket.gethostname(), "port": port, "token": secrets.token_hex(16)}
        where = json.loads(collectives.broadcast(json.dumps(where).encode()))
        self._thread = threading.Thread(
            target=self._lead if world.is_main else self._follow, args=(where,), name="hvdlm-watchdog", daemon=True
        )
        self._thread.start()

    def close(self, wait: bool = True) -> None:
        """Stop watching; makes no collective. Waits for the thread that watches, if asked to."""
        self._closing.set()
        if wait:
            self._thread.join(2 * _ANSWER_SECONDS)

    def _standing(self) -> Standing:
        waiting = self._waiting()
        return Standing(
            rank=self._world.rank,
            operation=None if waiting is None else waiting[0],
            seconds=0.0 if waiting is None else time.monotonic() - waiting[1],
            steps=self._steps(),
            stack=stack_of_main_thread(),
        )

    def _stuck(self) -> bool:
        waiting = self._waiting()
        return waiting is not None and time.monotonic() - waiting[1] > self._seconds

    # The ranks other than 0.

    def _follow(self, address: dict[str, Any]) -> None:
        try:
            connection = socket.create_connection((address["host"], address["port"]), timeout=10)
        except OSError:
            return  # rank 0 tells that this rank does not answer
        with connection:
            _send(connection, {"token": address["token"], "rank": self._world.rank})
            connection.settimeout(_TICK_SECONDS)
            lines, told = _Lines(), 0.0
            while not self._closing.is_set():
                try:
                    data = connection.recv(4096)
                except TimeoutError:
                    if self._stuck() and time.monotonic() - told > self._seconds:
                        told = time.monotonic()
                        _send(connection, {"stuck": True})
                    continue
                except OSError:
                    return
                if not data:
                    return
                for message in lines.feed(data):
                    if "end" in message:
                        self._end(1)
                    _send(connection, self._standing().to_dict())

    # Rank 0.

    def _lead(self, address: dict[str, Any]) -> None:
        assert self._listener is not None
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        peers: dict[int, tuple[socket.socket, _Lines]] = {}
        with self._listener, selector:
            while not self._closing.is_set():
                stuck = self._stuck()
                for key, _ in selector.select(_TICK_SECONDS):
                    if key.fileobj is self._listener:
                        self._welcome(address["token"], selector, peers)
                    else:
                        stuck |= bool(_receive(key.data, peers, selector))
                if stuck and not self._closing.is_set():
                    self._tell(peers, selector)
            for connection, _ in peers.values():
                connection.close()

    def _welcome(self, token: str, selector: selectors.BaseSelector, peers: dict[int, Any]) -> None:
        assert self._listener is not None
        connection, source = self._listener.accept()
        connection.settimeout(_SECONDS_TO_GREET)
        lines = _Lines()
        try:
            (hello,) = lines.feed(connection.recv(4096))
            known = secrets.compare_digest(str(hello["token"]), token)
            rank = int(hello["rank"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            connection.close()
            self._refused += 1
            if self._refused <= _MAX_COMPLAINTS:
                _log.warning("watchdog: refused from %s: no worker of this job", source[0])
            return
        peers[rank] = (connection, lines)
        selector.register(connection, selectors.EVENT_READ, rank)

    def _tell(self, peers: dict[int, tuple[socket.socket, _Lines]], selector: selectors.BaseSelector) -> None:
        first = self._ask(peers, selector)
        if self._closing.wait(2 * _TICK_SECONDS):
            return
        standings = self._ask(peers, selector)
        found = verdict(first, standings, self._world.size)
        if found is None or self._closing.is_set():
            return
        longest = max((s.seconds for s in standings.values()), default=0.0)
        key = (found.kind, found.ranks, found.operations)
        if key == self._told and longest < self._tell_again:
            return
        self._told, self._tell_again = key, 2 * longest
        _log.error("%s", found.message)
        self._events.add("stall", kind=found.kind, ranks=list(found.ranks), operations=list(found.operations))
        if found.kind == "mismatch":
            for connection, _ in peers.values():
                with contextlib.suppress(OSError):
                    _send(connection, {"end": True})
            self._end(1)

    def _ask(
        self, peers: dict[int, tuple[socket.socket, _Lines]], selector: selectors.BaseSelector
    ) -> dict[int, Standing]:
        standings = {0: self._standing()}
        for connection, _ in peers.values():
            with contextlib.suppress(OSError):
                _send(connection, {"where": True})
        until = time.monotonic() + _ANSWER_SECONDS
        while len(standings) <= len(peers) and time.monotonic() < until and not self._closing.is_set():
            for key, _ in selector.select(_TICK_SECONDS):
                if key.data is not None:
                    for message in _receive(key.data, peers, selector):
                        if "rank" in message:
                            standings[key.data] = Standing(**message)
        return standings


class _Lines:
    """Cuts a stream into JSON objects, one a line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            raise ValueError("a line without an end")
        return [json.loads(line) for line in lines]


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(
    rank: int, peers: dict[int, tuple[socket.socket, _Lines]], selector: selectors.BaseSelector
) -> list[dict[str, Any]]:
    """What a rank has sent; a rank that is gone is forgotten."""
    if rank not in peers:
        return []
    connection, lines = peers[rank]
    try:
        data = connection.recv(65536)
        if data:
            return lines.feed(data)
    except (OSError, ValueError):
        pass
    selector.unregister(connection)
    connection.close()
    del peers[rank]
    return []
