"""An elastic job that has fewer workers than its minimum: it waits, says what for, and in the end gives up."""

from __future__ import annotations

from hvdlm.launchers.places import Limits
from hvdlm.launchers.roster import Acts

__all__ = ["Shortage"]

_SECONDS_BETWEEN_REMINDERS = 10.0


class Shortage:
    """How long there have been too few workers.

    Args:
        limits: How many there have to be, and how long it waits.
        acts: Tells of it.
    """

    def __init__(self, limits: Limits, acts: Acts) -> None:
        self._limits, self._acts = limits, acts
        self._since: float | None = None
        self._reminded = 0.0

    def over(self) -> None:
        """There are enough."""
        self._since = None

    def lasts(self, ready: int, starting: int, now: float) -> bool:
        """There are too few; whether it has lasted too long."""
        if self._since is None:
            self._since, self._reminded = now, -_SECONDS_BETWEEN_REMINDERS
        waited, limits = now - self._since, self._limits
        if waited >= limits.below:
            self._acts.event("below_minimum", ready=ready, least=limits.least, waited=waited)
            return True
        if waited - self._reminded >= _SECONDS_BETWEEN_REMINDERS:
            self._reminded = waited
            self._acts.say(
                f"{ready} of at least {limits.least} workers are ready, {starting} are starting; "
                f"waiting for {limits.below - waited:.0f} s more (--elastic-timeout)"
            )
        return False
