"""When something is due that all workers have to do at the same step, with no collective in between."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Interval", "Schedule"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_GROWTH = 4
"""The first steps are slow (they compile and allocate): each measured interval is at most this much longer."""


@dataclass(frozen=True)
class Interval:
    """A number of steps, or a time.

    >>> Interval.parse("50"), Interval.parse("1.5m")
    (Interval(steps=50, seconds=0.0), Interval(steps=0, seconds=90.0))
    """

    steps: int = 0
    """0 for a time."""
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Interval:
        """Read ``50`` (steps), ``10s``, ``5m`` or ``2h``.

        Raises:
            ValueError: It is none of these, or not above 0.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)\s*", text)
        if match is None or (not match[2] and not match[1].isdigit()) or not 0 < float(match[1]) < 1e9:
            raise ValueError(f"{text!r} is no interval")
        return cls(seconds=float(match[1]) * _UNITS[match[2]]) if match[2] else cls(steps=int(match[1]))


class Schedule:
    """Says at which steps something is due.

    A time is turned into a number of steps, from what the steps since the last time took on the slowest worker: the
    workers agree on it whenever it was due, and count on their own in between.

    Args:
        interval: How often.
        clock: Seconds; monotonic.

    Example:
        >>> schedule = Schedule(Interval(steps=10))
        >>> schedule.start(3)
        >>> schedule.due(9), schedule.due(10)
        (False, True)
    """

    def __init__(self, interval: Interval, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = interval, clock
        self._last, self._since = 0, 0.0
        self._next = 0
        self._steps = 1

    def start(self, step: int) -> None:
        """Training begins or goes on at this step."""
        self._last, self._since, self._steps = step, self._clock(), 1
        self._next = self._after(step)

    def due(self, step: int) -> bool:
        """Whether it is due after this many steps; the same on all ranks."""
        return step >= self._next

    def done(self, step: int, slowest: Callable[[float], float]) -> None:
        """It was done after this many steps; every rank says so at the same one.

        Args:
            step: Optimizer steps so far.
            slowest: The maximum of a number over ranks; called for times only.
        """
        if self._interval.seconds and step > self._last:
            seconds = slowest((self._clock() - self._since) / (step - self._last))
            wanted = self._interval.seconds / max(seconds, 1e-9)
            self._steps = max(1, min(math.floor(wanted), _GROWTH * max(self._steps, step - self._last)))
        self._last, self._since = step, self._clock()
        self._next = self._after(step)

    def _after(self, step: int) -> int:
        every = self._interval.steps
        return (step // every + 1) * every if every else step + self._steps
