"""What the membership of an elastic job is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from hvdlm.launchers.hosts import Slot
from hvdlm.launchers.places import Place

__all__ = ["Acts", "Worker"]


class Acts(Protocol):
    """What a membership has done for it."""

    def start(self, worker: int, place: Place) -> None:
        """Start a worker there."""
        ...

    def send(self, worker: int, message: dict[str, Any]) -> None:
        """Send a worker a message."""
        ...

    def kill(self, worker: int) -> None:
        """Kill a worker that hangs."""
        ...

    def variables(self, slots: tuple[Slot, ...]) -> list[dict[str, str]]:
        """What Horovod needs to know in each worker of a new generation; serves its rendezvous from now on."""
        ...

    def break_off(self) -> None:
        """End the rendezvous of the running generation."""
        ...

    def event(self, kind: str, **fields: Any) -> None:
        """Write something into ``events.jsonl``."""
        ...

    def say(self, text: str) -> None:
        """Tell the person something."""
        ...


@dataclass
class Worker:
    """One process of the job."""

    number: int
    place: Place
    since: float
    state: str = "starting"
    """starting, ready, member (of the running generation), left, finished, ended."""
    heard: float | None = None
    """Last beat; None before the first."""
    held: int = -1
    """Newest commit it has told of; -1 for none."""
    pid: int | None = None
    rank: int = -1
    leaving: str | None = None
    left: bool = False
    """Whether it told that it goes."""
    finished: bool = False
    boundaries: int = 0
    doomed: bool = False
    """Whether it is being killed."""
    told: bool = False
    """Whether it was told to end."""
