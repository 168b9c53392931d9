"""Waiting in one place: for descriptors, timers, signals and the ends of child processes."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Loop"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


class Loop:
    """Use as a context manager, in the main thread: inside, SIGINT, SIGTERM and SIGHUP are collected."""

    def __enter__(self) -> Loop:
        self.signals: list[int] = []
        """Numbers of the signals that came and were not handled yet; SIGCHLD only ends a wait."""
        self.selector = selectors.DefaultSelector()
        """What is waited for; the data of a key is what to call when it is ready."""
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._old_handlers: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        self.selector.register(self._wake_read, selectors.EVENT_READ, lambda: os.read(self._wake_read, 4096))
        return self

    def __exit__(self, *_: object) -> None:
        self.selector.close()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` once, when that much time has passed."""
        self._timers.append((time.monotonic() + seconds, action))

    def step(self, limit: float | None = None) -> bool:
        """Wait until something happens, and call what is to be called.

        Args:
            limit: Wait at most this long, in seconds; None for no limit.

        Returns:
            Whether a descriptor was ready.
        """
        waits = [max(0.0, due - time.monotonic()) for due, _ in self._timers]
        if limit is not None:
            waits.append(limit)
        events = self.selector.select(min(waits) if waits else None)
        for key, _ in events:
            # What one has called may have closed another.
            if self.selector.get_map().get(key.fd) is not None:
                key.data()
        now = time.monotonic()
        for entry in [entry for entry in self._timers if entry[0] <= now]:
            self._timers.remove(entry)
            entry[1]()
        return bool(events)

    def _on_signal(self, signum: int, _: object) -> None:
        if signum != signal.SIGCHLD:
            self.signals.append(signum)
