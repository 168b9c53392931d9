"""How replicas that trained on their own become one again: averages of what each has moved, and a step along them.

With H local steps between two synchronisations (local SGD; Stich 2019) worker i moves from the common start ``x`` to
``y_i``. The outer gradient is the mean of ``x - y_i``, weighted by the samples each has seen. A step of size 1 without
momentum along it is parameter averaging; Nesterov's momentum on it is DiLoCo (Douillard et al. 2023), whose authors
found an outer learning rate of 0.7 and a momentum of 0.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["mean_move", "nesterov"]

Array = npt.NDArray[Any]


def mean_move(start: Array, ends: Sequence[Array], samples: Sequence[float]) -> Array:
    """The mean of what workers have moved, weighted by samples.

    >>> mean_move(np.zeros(2), [np.array([1.0, 0.0]), np.array([0.0, 4.0])], [3, 1]).tolist()
    [0.75, 1.0]

    Args:
        start: Common start, any shape.
        ends: Where each worker is.
        samples: What each counts, not negative, not all zero. A worker with 0 is left out, NaN and all.

    Returns:
        The move, of the shape of ``start``.
    """
    total = float(sum(samples))
    moved = np.zeros_like(start)
    for end, count in zip(ends, samples, strict=True):
        if count:
            moved += (end - start) * (count / total)
    return moved


def nesterov(start: Array, moved: Array, velocity: Array, *, lr: float, momentum: float) -> tuple[Array, Array]:
    """One outer step with Nesterov's momentum, in the form of Sutskever et al. 2013 that frameworks use.

    >>> nesterov(np.zeros(1), np.ones(1), np.zeros(1), lr=1.0, momentum=0.0)[0].tolist()
    [1.0]

    Args:
        start: Where the local steps began.
        moved: See :func:`mean_move`.
        velocity: Of the step before; zeros at first.
        lr: Outer learning rate.
        momentum: 0 for none.

    Returns:
        (where the next local steps begin, velocity).
    """
    velocity = momentum * velocity + moved
    return start + lr * (moved + momentum * velocity), velocity
