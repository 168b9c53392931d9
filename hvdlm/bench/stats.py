"""Medians with an interval: how figures of a noisy machine are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "median_interval"]

_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A median and the bounds of its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """As in the tables: the median, its interval in brackets."""
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def holds(self, limit: float) -> bool:
        """Whether the figure may be at or below a limit: the lower bound is."""
        return self.low <= limit


def median_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The median of some values with its 95 % percentile bootstrap interval (Efron 1979).

    >>> median_interval([1.0, 1.0, 1.0])
    Interval(median=1.0, low=1.0, high=1.0)

    Args:
        values: One per repeat, for instance ratios of the times of two things measured next to each other.
        seed: Of the resampling.
    """
    samples = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(samples), size=(_RESAMPLES, len(samples)))
    low, high = np.percentile(np.median(samples[draws], axis=1), [2.5, 97.5])
    return Interval(float(np.median(samples)), float(low), float(high))
