"""PowerSGD: gradients of matrices as products of two thin ones (Vogels, Karimireddy & Jaggi 2019). Reference version.

One step of subspace iteration, started from where the last one ended: P = sum(M_i Q), orthonormalised; Q = sum(M_i' P).
The sum of the matrices is taken to be P Q'. Both sums are of rank-thin matrices, which Horovod's allreduce carries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["matrix_shape", "orthonormal", "powersgd_sum", "start", "thin_elements", "warm"]

Array = npt.NDArray[Any]


def matrix_shape(shape: Sequence[int], rank: int) -> tuple[int, int] | None:
    """Rows and columns of the matrix a gradient is taken for; None where its two factors would not be half its size.

    >>> matrix_shape((256, 64, 2), 4), matrix_shape((256,), 4), matrix_shape((4, 100), 4)
    ((256, 128), None, None)
    """
    if len(shape) < 2:
        return None
    rows, columns = int(shape[0]), int(np.prod(shape[1:]))
    return (rows, columns) if 2 * rank * (rows + columns) <= rows * columns else None


def thin_elements(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """How many numbers stand for gradients of these shapes: those of the factors, and of what is sent whole.

    >>> thin_elements([(256, 128), (256,)], 4)
    1792
    """
    matrices = [(shape, matrix_shape(shape, rank)) for shape in shapes]
    return sum(math.prod(shape) if matrix is None else rank * sum(matrix) for shape, matrix in matrices)


def start(seed: int, columns: int, rank: int) -> Array:
    """A random matrix to begin from: float32, (columns, rank); equal on all workers."""
    return np.random.default_rng(seed).standard_normal((columns, rank)).astype(np.float32)


def orthonormal(p: Array) -> Array:
    """An orthonormal basis of the columns. They are scaled first: squares of 1e30 are no float32 numbers."""
    largest = np.abs(p).max(axis=0)
    q: Array = np.linalg.qr(p / np.where(largest > 0, largest, 1))[0]
    return q


def warm(q: Array, before: Array) -> Array:
    """Where the next step starts: the factor with columns of size 1. A column of zeros would stay zero for ever: there
    the step starts again from where this one did.
    """
    largest = np.abs(q).max(axis=0)
    return np.where(largest > 0, q / np.where(largest > 0, largest, 1), before)


def powersgd_sum(own: Sequence[Array], residuals: Sequence[Array], q: Array) -> tuple[Array, Array]:
    """The sum of matrices as a product of thin ones; updates the residuals in place.

    Args:
        own: Each worker's matrix, already weighted.
        residuals: What each worker's matrices have lost so far.
        q: (columns, rank): where the last step ended.

    Returns:
        The sum, and what the next step starts from. If a matrix is not finite the sum is NaN and nothing else changes.
    """
    wanted = [values + residual for values, residual in zip(own, residuals, strict=True)]
    with np.errstate(all="ignore"):
        p: Array = np.sum([m @ q for m in wanted], axis=0)
    if not np.isfinite(p).all():
        return np.full_like(own[0], np.nan), q
    p = orthonormal(p)
    factors = [m.T @ p for m in wanted]
    total_factor: Array = np.sum(factors, axis=0)
    for residual, m, factor in zip(residuals, wanted, factors, strict=True):
        residual[:] = m - p @ factor.T
    return p @ total_factor.T, warm(total_factor, q)
