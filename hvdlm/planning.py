"""Measures the link between workers. Every worker ends with the same figures, so all choose alike."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.comm_model import Link
from hvdlm.contracts import Collectives

__all__ = ["agree_on", "measure_link"]

_SMALL_REPEATS = 5
_SIZES = (2**18, 2**21, 2**23)
"""Float32 elements of growing probes: 1, 8 and 32 MB."""
_ENOUGH_SECONDS = 0.03
"""A probe that took this long says enough; a slow link is not kept busy with larger ones."""


def agree_on(collectives: Collectives, *values: float) -> list[float]:
    """The largest of each value over workers: what the slowest has measured."""
    return [float(value) for value in collectives.allreduce(np.array(values, dtype=np.float64), "max")]


def measure_link(collectives: Collectives, workers: int, within_host: bool = False) -> Link:
    """Latency of a small sum and bandwidth of a large one. Takes some 20 ms, or a second at 10 Mbit.

    Args:
        collectives: Between all workers.
        workers: How many there are.
        within_host: Whether all of them are on one host.
    """
    small = np.ones(2, dtype=np.float32)
    times = [_timed(collectives, small) for _ in range(_SMALL_REPEATS)]
    (latency,) = agree_on(collectives, float(np.min(times)))
    bandwidth = 0.0
    for elements in _SIZES:
        probe = np.zeros(elements, dtype=np.float32)
        once = _timed(collectives, probe)
        (seconds,) = agree_on(collectives, once)
        if seconds < _ENOUGH_SECONDS:  # another's work may have come between
            (seconds,) = agree_on(collectives, min(once, _timed(collectives, probe)))
        travelled = 2 * (workers - 1) / workers * probe.nbytes
        bandwidth = travelled / max(seconds - latency, seconds / 2)
        if seconds > _ENOUGH_SECONDS:
            break
    return Link(latency, bandwidth, within_host)


def _timed(collectives: Collectives, probe: npt.NDArray[np.float32]) -> float:
    start = time.perf_counter()
    collectives.allreduce(probe)
    return time.perf_counter() - start
