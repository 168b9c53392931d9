"""Where workers of an elastic job may run, and which of these places are resting after a failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdlm.launchers.hosts import Host, Slot

__all__ = ["Limits", "Place", "Places", "limits_of", "slot_before_the_first", "slots_of"]

_MANY = 1 << 20
_SOUND_SECONDS = 300.0
"""A worker that ran this long has shown that its place is sound: earlier failures are forgotten."""


@dataclass(frozen=True, order=True)
class Place:
    """One slot of a host."""

    host: str
    index: int

    def __str__(self) -> str:
        return f"{self.host}[{self.index}]"


@dataclass
class _Failures:
    count: int = 0
    until: float = 0.0


@dataclass
class Places:
    """The places there are. A failure lets one place rest, for twice as long each time; its host's others go on.

    Args:
        least: Seconds that a place rests after its first failure.
        most: Seconds that it rests at most.
    """

    least: float
    most: float
    wanted: tuple[Place, ...] = ()
    """In the order of discovery."""
    _failures: dict[Place, _Failures] = field(default_factory=dict)

    def update(self, hosts: Sequence[Host]) -> bool:
        """Take over what discovery found; returns whether it is another list than before."""
        found = tuple(Place(host.name, index) for host in hosts for index in range(host.slots))
        changed, self.wanted = found != self.wanted, found
        return changed

    def failed(self, place: Place, now: float, ran_seconds: float) -> float:
        """A worker failed there; returns how many seconds the place will rest."""
        known = self._failures.setdefault(place, _Failures())
        known.count = 1 if ran_seconds > _SOUND_SECONDS else known.count + 1
        rest = min(self.most, self.least * 2.0 ** min(known.count - 1, 30))
        known.until = now + rest
        return rest

    def failures(self, place: Place) -> int:
        """How often workers have failed there in a row."""
        return self._failures.get(place, _Failures()).count

    def free(self, taken: Sequence[Place], now: float) -> list[Place]:
        """Places where a worker can be started now."""
        return [
            place for place in self.wanted if place not in taken and self._failures.get(place, _Failures()).until <= now
        ]

    def next_free(self, taken: Sequence[Place], now: float) -> float | None:
        """Seconds until the next place has rested; None if none is resting."""
        waits = [
            self._failures[place].until - now
            for place in self.wanted
            if place not in taken and place in self._failures and self._failures[place].until > now
        ]
        return min(waits, default=None)


def slots_of(places: Sequence[Place]) -> tuple[Slot, ...]:
    """The slots of workers at these places, in rank order; places of one host need not stand together."""
    local = [sum(other.host == place.host for other in places[:rank]) for rank, place in enumerate(places)]
    return tuple(
        Slot(
            hostname=place.host,
            rank=rank,
            size=len(places),
            local_rank=local[rank],
            local_size=sum(other.host == place.host for other in places),
            cross_rank=sum(index == local[rank] for index in local[:rank]),
            cross_size=sum(index == local[rank] for index in local),
        )
        for rank, place in enumerate(places)
    )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many workers, and how long things may take (seconds)."""

    least: int
    most: int
    start: float
    """For the first workers to be ready; then those that are begin."""
    below: float
    """Below the minimum, until the job ends."""
    silence: float
    """Without a beat, until a worker counts as hung."""
    check_in: float
    """After a loss, until a member that has not noticed counts as hung."""
    resets: int | None = None
    """Resets until the job is given up; None for no limit."""


def limits_of(flags: Mapping[str, Any], most: int) -> Limits:
    """The limits that the flags of ``hvdlm run`` set.

    Args:
        flags: By destination.
        most: Workers where no flag says how many.
    """
    return Limits(
        least=flags.get("min_num_proc") or 1,
        most=flags.get("max_num_proc") or flags.get("num_proc") or max(most, _MANY),
        start=float(flags.get("start_timeout") or 30),
        below=float(flags.get("elastic_timeout") or 600),
        silence=float(flags.get("hang_timeout") or 20),
        check_in=float(flags.get("gloo_timeout_seconds") or 30) + 10,
        resets=flags.get("reset_limit"),
    )


def slot_before_the_first(worker: int, place: Place) -> Slot:
    """What a worker's program sees until it is in a generation: its number is its rank, and it is not alone."""
    index = place.index
    return Slot(
        hostname=place.host,
        rank=worker,
        size=max(2, worker + 1),
        local_rank=index,
        local_size=index + 1,
        cross_rank=0,
        cross_size=1,
    )
