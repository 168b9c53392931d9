"""Shares of unequal workers: from how long each one computes to what each one gets.

All workers of a step finish together if shares are in proportion to measured speed, the self-scheduling of loops on
unequal processors (Hummel, Schmidt, Uma & Wein, "Load-sharing in heterogeneous systems via weighted factoring", SPAA
1996), applied to batches of data-parallel training by Chen, Weng, Wang et al., "Semi-dynamic load balancing" (SoCC
2020). Measurements are smoothed exponentially (Brown 1959), and shares change only where that saves a step enough time:
without such hysteresis the noise of the clock would move samples for nothing. Arithmetic is additions, multiplications
and divisions only, and the results are whole multiples of 2**-10, so that every machine finds the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hvdlm.algorithms.partition import check_weights

__all__ = ["Balancer", "bounded", "clipped_mean"]

_GRAIN = 1 << 10
_OUTLIER = 10.0
_SURE = 3.0
"""Standard errors by which a gain has to stand out."""
_ENOUGH = 5
"""Measurements of every worker from which a mean is trusted."""
_MEAN_OF = 16
"""Measurements that a mean is taken over at most: speed may drift."""


@dataclass
class Balancer:
    """Follows the speed of workers. Equal on all ranks as long as all are told the same.

    Args:
        weights: What to start from, one per worker, relative; their sum does not matter.
        smoothing: How much of a new measurement counts, above 0 (nothing) to 1 (it replaces the earlier ones).
        hysteresis: Shares change where a step would take less than ``1 - hysteresis`` of its time by the smoothed
            measurements, which follow a change of speed soon.
        fine: The same by the mean of the measurements since shares changed last, if it also stands out of their noise:
            what a coarse step left is made up for.
        largest: Most that a worker gets, as a multiple of an equal share: its memory is finite.
        smallest: Least that a worker gets, likewise: one that computes nothing could never show that it is fast again.
    """

    weights: tuple[float, ...]
    smoothing: float = 0.5
    hysteresis: float = 0.05
    fine: float = 0.01
    largest: float = 4.0
    smallest: float = 0.05
    _seconds: list[float] = field(default_factory=list, repr=False)
    _since: list[list[float]] = field(default_factory=list, repr=False)
    """Each worker's measurements since shares changed last, the newest ones."""

    def __post_init__(self) -> None:
        self.weights = check_weights(self.weights)
        ratios = 0 < self.smoothing <= 1 and 0 <= self.hysteresis < 1 and 0 <= self.fine < 1
        if not (ratios and 0 < self.smallest <= 1 <= self.largest):
            raise ValueError(
                f"smoothing is {self.smoothing}, hysteresis {self.hysteresis}, fine {self.fine}, smallest "
                f"{self.smallest}, largest {self.largest}; allowed: 0 < smoothing <= 1, 0 <= hysteresis < 1, "
                "0 <= fine < 1, 0 < smallest <= 1 <= largest"
            )

    def update(self, seconds_per_sample: Sequence[float]) -> bool:
        """Take in a measurement of every worker; whether the weights have changed.

        Args:
            seconds_per_sample: Compute time alone, one per worker. A value that is not finite or not above 0 is no
                measurement: the worker's earlier ones stay.

        Raises:
            ValueError: It is not one value per worker.
        """
        if len(seconds_per_sample) != len(self.weights):
            raise ValueError(f"there are {len(seconds_per_sample)} times for {len(self.weights)} workers")
        measured = [float(value) for value in seconds_per_sample]
        if not self._seconds:
            self._seconds = [math.nan] * len(measured)
            self._since = [[] for _ in measured]
        for worker, value in enumerate(measured):
            if math.isfinite(value) and value > 0:
                before = self._seconds[worker]
                known = before == before
                self._seconds[worker] = before + self.smoothing * (value - before) if known else value
                self._since[worker] = [*self._since[worker][1 - _MEAN_OF :], value]
        if any(value != value for value in self._seconds):
            return False
        if self._changed(self._seconds, self.hysteresis, 0.0):
            return True
        if min(map(len, self._since)) < _ENOUGH:
            return False
        means = [math.fsum(own) / len(own) for own in self._since]
        noise = max(_noise(own, mean) for own, mean in zip(self._since, means, strict=True))
        return self._changed(means, self.fine, _SURE * _SURE * noise)

    def _changed(self, seconds: Sequence[float], hysteresis: float, noise: float) -> bool:
        """Take other shares if by these times they gain more than ``hysteresis`` and the root of ``noise``."""
        wanted = bounded([1.0 / value for value in seconds], self.smallest, self.largest)
        gain = 1.0 - _time(wanted, seconds) / _time(self.weights, seconds)
        if gain <= hysteresis or gain * gain <= noise:
            return False
        self.weights = wanted
        self._since = [[] for _ in seconds]
        return True


def _noise(values: Sequence[float], mean: float) -> float:
    """Square of the relative standard error of a mean."""
    squares = math.fsum((value - mean) * (value - mean) for value in values)
    return squares / (len(values) * (len(values) - 1) * mean * mean)


def _time(weights: Sequence[float], seconds: Sequence[float]) -> float:
    """Compute time of a step per sample of the global batch: that of the slowest worker."""
    whole = math.fsum(weights)
    return max(w / whole * s for w, s in zip(weights, seconds, strict=True))


def bounded(speeds: Sequence[float], smallest: float, largest: float) -> tuple[float, ...]:
    """Weights in proportion to speeds, each within bounds; their mean is 1 but for rounding.

    >>> bounded([1.0, 3.0], 0.05, 4.0), bounded([1.0, 99.0, 0.0, 0.0], 0.25, 2.0)
    ((0.5, 1.5), (1.5, 2.0, 0.25, 0.25))

    Args:
        speeds: One per worker, 0 or more, not all 0.
        smallest: Least weight as a multiple of the mean weight, at most 1.
        largest: Most, at least 1.
    """
    count = len(speeds)
    low, high = smallest / count, largest / count
    fixed: dict[int, float] = {}
    # What a bound takes or leaves goes to the free workers. The bound with the larger sum of excess is fixed in each
    # round, as when projecting on a box-constrained simplex, so that at most ``count`` rounds are needed.
    while True:
        free = [worker for worker in range(count) if worker not in fixed]
        rest = 1.0 - math.fsum(fixed.values())
        whole = math.fsum(speeds[worker] for worker in free)
        shares = {w: rest * (speeds[w] / whole if whole > 0 else 1.0 / len(free)) for w in free}
        over = math.fsum(max(0.0, s - high) for s in shares.values())
        under = math.fsum(max(0.0, low - s) for s in shares.values())
        if over == under == 0.0:
            break
        if over >= under:
            fixed |= {w: high for w, s in shares.items() if s > high}
        else:
            fixed |= {w: low for w, s in shares.items() if s < low}
        if len(fixed) == count:
            shares = {}
            break
    weights = {**fixed, **shares}
    return tuple(max(1, int(weights[w] * count * _GRAIN + 0.5)) / _GRAIN for w in range(count))


def clipped_mean(seconds: Sequence[float], samples: Sequence[int]) -> float:
    """Seconds per sample over some steps; NaN if there are none.

    The total over the total, and not a median: a worker held back by a CPU quota computes at full speed until its quota
    is used up, and stands still in few of its steps. A step beyond 10 times the median (the script saved or evaluated)
    counts as 10 times the median.

    >>> clipped_mean([1.0, 1.0, 3.0], [10, 10, 10]), clipped_mean([1.0, 1.0, 900.0], [1, 1, 1])
    (0.16666666666666666, 4.0)

    Args:
        seconds: Of each step.
        samples: Computed in each step, 1 or more.
    """
    if not len(seconds):
        return math.nan
    each = sorted(s / n for s, n in zip(seconds, samples, strict=True))
    limit = _OUTLIER * each[(len(each) - 1) // 2]
    return math.fsum(min(s, limit * n) for s, n in zip(seconds, samples, strict=True)) / sum(samples)
