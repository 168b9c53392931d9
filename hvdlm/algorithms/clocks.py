"""How far the clocks of workers are apart, from the times at which they enter and leave the same collectives.

Nobody leaves a collective before everybody has entered it. So of any two workers, neither's leaving comes before the
other's entering: that bounds the difference of their clocks from both sides (as in Cristian 1989), and each further
collective can only narrow the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["clock_offsets"]

Times = Sequence[Sequence[tuple[float, float]]]


def clock_offsets(times: Times) -> list[tuple[float, float]]:
    """For each worker (what is added to its clock to get that of worker 0, at most how wrong that is).

    Args:
        times: For each worker (entered, left) of each collective, in seconds of its own clock.

    Raises:
        ValueError: No times, or not equally many of all workers.

    >>> clock_offsets([[(0.0, 2.0), (3.0, 3.5)], [(101.0, 102.0), (103.2, 103.6)]])
    [(0.0, 0.0), (-100.15, 0.45)]
    """
    if not times or not times[0] or len({len(own) for own in times}) > 1:
        raise ValueError("equally many collectives are needed of every worker")
    result = [(0.0, 0.0)]
    for own in times[1:]:
        pairs = list(zip(times[0], own, strict=True))
        low = max(first[0] - other[1] for first, other in pairs)
        high = min(first[1] - other[0] for first, other in pairs)
        result.append((round((low + high) / 2, 9), round(abs(high - low) / 2, 9)))
    return result
