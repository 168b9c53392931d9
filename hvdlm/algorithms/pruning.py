"""Which weights a pruned model keeps: gradual magnitude pruning (Zhu and Gupta 2017), unstructured or N of M.

Masks are functions of the weights alone, and of comparisons only: replicas that are equal bit for bit get equal masks
without asking each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["keep_largest", "keep_n_of_m", "sparsity_at"]

Array = npt.NDArray[Any]


def sparsity_at(step: int, *, begin: int, end: int, every: int, final: float) -> float | None:
    """The sparsity that masks made at a step have; None where no masks are made.

    It rises from 0 at ``begin`` to ``final`` at ``end``, steeply at first, while there is much to spare.

    >>> [sparsity_at(t, begin=0, end=100, every=50, final=0.8) for t in (0, 25, 50, 100, 150)]
    [0.0, None, 0.7000000000000001, 0.8, None]

    Args:
        step: Optimizer steps made so far.
        begin: First step at which masks are made.
        end: Last one; the sparsity stays afterwards.
        every: Steps between masks.
        final: Part of the weights that ends up as zeros, 0 to 1.
    """
    if step < begin or step > end or ((step - begin) % every and step != end):
        return None
    left = 1.0 - (step - begin) / (end - begin) if end > begin else 0.0
    return final * (1.0 - left**3)


def keep_largest(weights: Sequence[Array], sparsity: float) -> list[npt.NDArray[np.bool_]]:
    """Masks that keep the largest magnitudes of all these arrays together.

    Equal magnitudes are kept or dropped together, so that the result does not depend on the order of a sort; a weight
    that is not finite is kept, to be seen.

    >>> [m.tolist() for m in keep_largest([np.array([1.0, -3.0]), np.array([0.5, 2.0])], 0.5)]
    [[False, True], [False, True]]

    Args:
        weights: Arrays of any shapes.
        sparsity: Part of all elements to drop, 0 to 1.
    """
    magnitudes = [np.abs(w) for w in weights]
    count = math.floor(sparsity * sum(m.size for m in magnitudes))
    if count == 0:
        return [np.ones(w.shape, dtype=bool) for w in weights]
    flat = np.concatenate([m.reshape(-1) for m in magnitudes])
    threshold = np.partition(flat, count - 1)[count - 1]
    return [~(m <= threshold) for m in magnitudes]


def keep_n_of_m(weight: Array, n: int, m: int) -> npt.NDArray[np.bool_]:
    """A mask that keeps the ``n`` largest magnitudes of each ``m`` consecutive weights along the last axis.

    The first of equal ones is kept. A remainder shorter than ``m`` is kept whole.

    >>> keep_n_of_m(np.array([[1.0, -4.0, 3.0, 2.0]]), 2, 4).tolist()
    [[False, True, True, False]]

    Args:
        weight: Shape (..., k).
        n: Kept of each group.
        m: Size of a group.
    """
    whole = weight.shape[-1] // m * m
    mask = np.ones(weight.shape, dtype=bool)
    if whole:
        groups = np.abs(weight[..., :whole]).reshape(-1, m)
        order = np.argsort(-groups, axis=1, kind="stable")
        kept = np.zeros(groups.shape, dtype=bool)
        np.put_along_axis(kept, order[:, :n], True, axis=1)
        mask[..., :whole] = kept.reshape(*weight.shape[:-1], whole)
    return mask
