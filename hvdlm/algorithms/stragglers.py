"""Who holds a synchronous job up, why, and what it would gain without: from the time that each rank spends on what.

In a step each rank reads its data, computes, and then blocks until the sum of gradients is there. The rank that is
ready last blocks for the transfer alone, so the least time any rank blocks is what communication costs, and what the
others block beyond it is waiting for the last one (the decomposition used for bulk-synchronous programs; Valiant 1990).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Explanation", "Times", "explain", "link_seconds"]

_WORTH_TELLING = 0.07
"""Part of a step that a straggler must cost before it is named: less is noise."""
_WORTH_SECONDS = 1e-3
"""In steps as short as this, figures of single milliseconds are noise."""
_MUCH_COMMUNICATION = 0.3
_SLOW_LINK = 3.0
"""How many times as long as from others a message from a rank takes before its link is blamed."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step, each a list over ranks."""

    data: Sequence[float]
    """Waiting for the next batch."""
    compute: Sequence[float]
    blocked: Sequence[float]
    """In collectives."""
    samples: Sequence[float]
    """Of the global batch, on each rank."""
    jitter: Sequence[float] = ()
    """By how much the time for data and computing differs from step to step, a standard deviation; none if empty."""

    @property
    def communication(self) -> float:
        """What the transfer costs: the least that any rank is blocked."""
        return min(self.blocked)

    @property
    def waiting(self) -> list[float]:
        """What each rank waits for the last one."""
        return [b - self.communication for b in self.blocked]

    @property
    def step(self) -> float:
        """The length of a step."""
        return max(d + c for d, c in zip(self.data, self.compute, strict=True)) + self.communication


@dataclass(frozen=True)
class Explanation:
    """What holds the job up most."""

    rank: int | None
    """The straggler; None where all ranks pay alike."""
    cause: Literal["data", "compute", "communication"]
    cost: float
    """Part of a step, 0 to 1."""
    gain_balanced: float | None
    """Relative gain in throughput if shares followed the ranks' speeds; None where that changes nothing."""
    gain_without: float | None
    """Relative gain in throughput if the rank were left out and the others did its work."""

    def short(self) -> str:
        """For a line of progress.

        >>> Explanation(3, "data", 0.22, 0.19, 0.14).short()
        'rank 3 data-bound, 22 %'
        """
        if self.rank is None:
            return ""
        word = {"data": "data-bound", "compute": "slow", "communication": "slow link"}[self.cause]
        return f"rank {self.rank} {word}, {self.cost:.0%}".replace("%", " %")

    def sentence(self) -> str:
        """For a person.

        >>> Explanation(3, "data", 0.22, 0.19, 0.14).sentence()
        'rank 3 is input-bound and costs 22 %: rebalancing would give +19 %, leaving it out +14 %'
        """
        if self.rank is None:
            return f"communication takes {self.cost:.0%} of a step".replace("%", " %")
        what = {"data": "is input-bound", "compute": "computes slowly", "communication": "has a slow link"}[self.cause]
        gains = []
        if self.gain_balanced is not None:
            gains.append(f"rebalancing would give {self.gain_balanced:+.0%}".replace("%", " %"))
        if self.gain_without is not None:
            gains.append(f"leaving it out {self.gain_without:+.0%}".replace("%", " %"))
        told = f": {', '.join(gains)}" if gains else ""
        return f"rank {self.rank} {what} and costs {self.cost:.0%}".replace("%", " %") + told


def link_seconds(received: Sequence[Sequence[float]]) -> list[float]:
    """What each rank's link takes for a message, from the times that broadcasts took to come to each rank.

    A slow link makes slow all that its rank sends, or all that it gets; what others send among themselves is slow only
    where it is handed on by that rank, which is never so for all of it. Between two ranks there is one link: the rank
    that sends slowly is named.

    Args:
        received: ``received[r][q]`` is what a message of rank ``q`` took until rank ``r`` had it.

    >>> link_seconds([[0, 1, 9], [1, 0, 9], [9, 9, 0]])
    [1, 1, 9]
    """
    ranks = range(len(received))
    if len(ranks) == 2:
        return [received[1][0], received[0][1]]
    sends = [min(received[r][q] for r in ranks if r != q) for q in ranks]
    gets = [min(received[r][q] for q in ranks if r != q) for r in ranks]
    return [max(pair) for pair in zip(sends, gets, strict=True)]


def explain(times: Times, links: Sequence[float] | None = None) -> Explanation | None:
    """What holds the job up most; None if nothing is worth telling.

    Args:
        times: Means over some steps.
        links: Seconds that a probe sent by each rank took, if links were probed.

    Raises:
        ValueError: The lists are not equally long, or empty.
    """
    size = len(times.data)
    lists = (times.compute, times.blocked, times.samples, times.jitter or times.data)
    if not size or any(len(values) != size for values in lists):
        raise ValueError("every list needs one value per rank")
    own = [d + c for d, c in zip(times.data, times.compute, strict=True)]
    step = times.step
    if size < 2 or step <= _WORTH_SECONDS:
        return None
    last = max(range(size), key=own.__getitem__)
    others = [r for r in range(size) if r != last]
    excess = own[last] - statistics.median(own[r] for r in others)
    share = times.communication / step
    if excess / step >= _WORTH_TELLING and excess >= _WORTH_SECONDS and excess >= times.communication * 0.5:
        more_data = times.data[last] - statistics.median(times.data[r] for r in others)
        cause: Literal["data", "compute"] = "data" if more_data > excess / 2 else "compute"
        return Explanation(last, cause, excess / step, *_gains(times, own, last))
    if share >= _MUCH_COMMUNICATION:
        rank = None
        if links is not None:
            slow = max(range(size), key=links.__getitem__)
            if links[slow] > _SLOW_LINK * statistics.median(links[r] for r in range(size) if r != slow):
                rank = slow
        return Explanation(rank, "communication", share, None, None)
    if excess / step >= _WORTH_TELLING and excess >= _WORTH_SECONDS:
        more_data = times.data[last] - statistics.median(times.data[r] for r in others)
        return Explanation(
            last, "data" if more_data > excess / 2 else "compute", excess / step, *_gains(times, own, last)
        )
    return None


def _gains(times: Times, own: Sequence[float], last: int) -> tuple[float | None, float | None]:
    """(relative gain with shares by speed, relative gain without the last rank)."""
    total = sum(times.samples)
    if total <= 0 or any(n <= 0 or t <= 0 for n, t in zip(times.samples, own, strict=True)):
        return None, None
    speeds = [n / t for n, t in zip(times.samples, own, strict=True)]

    def gain(ranks: Sequence[int]) -> float:
        mean = total / sum(speeds[r] for r in ranks)
        spread = [times.jitter[r] * math.sqrt(mean / own[r]) for r in ranks] if times.jitter else [0.0]
        return times.step / (mean + _last_of(spread) + times.communication) - 1

    return max(0.0, gain(range(len(own)))), gain([r for r in range(len(own)) if r != last])


def _last_of(spread: Sequence[float]) -> float:
    """By how much the last of ranks that take equally long on average is behind that average, at each step anew.

    The expected maximum of normal variables with the mean of these variances (Blom 1958): who waits for a straggler
    waits for nobody else, and balanced ranks wait for whichever happens to be last.
    """
    size = len(spread)
    if size < 2:
        return 0.0
    score = statistics.NormalDist().inv_cdf((size - 0.375) / (size + 0.25))
    return score * math.sqrt(sum(s * s for s in spread) / size)
