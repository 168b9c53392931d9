"""Where the workers of an elastic job call their driver."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

from hvdlm.line import Lines, greet, new_key

__all__ = ["Switchboard"]

_log = logging.getLogger("hvdlm")

_MAX_GREETINGS = 1024
"""Callers that have not said yet who they are; more are hung up on."""
_MAX_COMPLAINTS = 50


class Switchboard:
    """Listens for workers, and keeps a line to each that knows the job's key.

    Args:
        selector: Where lines are watched; the data of a key is what to call when it is ready.
        heard: Called with (worker, message).
    """

    def __init__(self, selector: selectors.BaseSelector, heard: Callable[[int, dict[str, Any]], None]) -> None:
        self._selector, self._heard = selector, heard
        self._key = new_key()
        self._listeners: dict[str, socket.socket] = {}
        self._lines: dict[int, Lines] = {}
        self._greeted: queue.SimpleQueue[tuple[int, Lines]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        selector.register(self._wake_read, selectors.EVENT_READ, self._take)
        self._threads: list[threading.Thread] = []
        self._free = threading.BoundedSemaphore(_MAX_GREETINGS)
        self._refused = 0

    def control(self, worker: int, address: str) -> str:
        """What a worker needs to call, at an address of this machine that it can reach."""
        if address not in self._listeners:
            listener = self._listeners[address] = socket.create_server((address, 0), backlog=128)
            thread = threading.Thread(target=self._answer, args=(listener,), name="hvdlm-switchboard", daemon=True)
            thread.start()
            self._threads.append(thread)
        return f"{address}:{self._listeners[address].getsockname()[1]}:{worker}:{self._key}"

    def send(self, worker: int, message: dict[str, Any]) -> None:
        """Send a worker a message; nothing happens if it has no line."""
        if worker in self._lines:
            self._lines[worker].send(message)

    def close(self) -> None:
        """Hang up everywhere."""
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join()
        for line in self._lines.values():
            self._selector.unregister(line)
            line.close()
        while not self._greeted.empty():
            self._greeted.get()[1].close()
        self._selector.unregister(self._wake_read)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _answer(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, source = listener.accept()
            except OSError:
                return
            if not self._free.acquire(blocking=False):
                connection.close()
                continue
            # In a thread of its own: a caller that says nothing must not keep the others waiting.
            threading.Thread(target=self._greet, args=(connection, source[0]), daemon=True).start()

    def _greet(self, connection: socket.socket, source: str) -> None:
        try:
            self._greeted.put(greet(connection, self._key))
            os.write(self._wake_write, b"\0")
        except OSError as error:
            connection.close()
            self._refused += 1
            if self._refused <= _MAX_COMPLAINTS:
                _log.warning("line of the job: refused from %s: %s", source, error)
        finally:
            self._free.release()

    def _take(self) -> None:
        os.read(self._wake_read, 64)
        while not self._greeted.empty():
            worker, line = self._greeted.get()
            if worker in self._lines:  # the process was replaced by another one (exec)
                self._hang_up(worker)
            self._lines[worker] = line
            self._selector.register(line, selectors.EVENT_READ, lambda w=worker, own=line: self._read(w, own))

    def _read(self, worker: int, line: Lines) -> None:
        try:
            messages = line.receive()
        except ValueError:
            messages = None
        if messages is None:
            if self._lines.get(worker) is line:
                self._hang_up(worker)
            return
        for message in messages:
            self._heard(worker, message)

    def _hang_up(self, worker: int) -> None:
        line = self._lines.pop(worker)
        self._selector.unregister(line)
        line.close()
