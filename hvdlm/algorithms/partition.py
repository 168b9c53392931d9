"""Who computes which part of a global batch.

Each worker gets an integer share of every batch in proportion to its weight, by largest remainder (Hamilton's method;
Balinski & Young, "Fair Representation", 1982). ``contiguous`` and ``random`` fill the shares in rank order. ``hash``
fills each worker's share with samples that are at home there (see :mod:`hvdlm.algorithms.rendezvous`), and the samples
that find their home's share full go to what is free elsewhere, as in consistent hashing with bounded loads (Mirrokni,
Thorup & Zadimoghaddam, SODA 2018).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.slots import slot_of

__all__ = [
    "STRATEGIES",
    "check_weights",
    "moved_fraction",
    "place",
    "skew",
    "spill_fraction",
    "split_shares",
]

Ids = npt.NDArray[np.int64]
Workers = npt.NDArray[np.int32]

STRATEGIES = ("hash", "random", "contiguous")
"""The ways to cut a batch; ``random`` cuts like ``contiguous``, it is the order that is random."""

_BLOCK = 1 << 14
"""Samples placed at once, in whole batches."""


def check_weights(weights: Sequence[float], num_workers: int | None = None) -> tuple[float, ...]:
    """The weights as floats, if they can be used.

    Args:
        weights: One per worker; 0 for a worker that computes nothing.
        num_workers: How many there have to be; any number if None.

    Raises:
        ValueError: They are none, too many or too few, not numbers, negative, not finite, or all zero.
    """
    try:
        checked = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError) as error:
        raise ValueError(f"weights are {weights!r}; allowed: one number per worker") from error
    if not checked:
        raise ValueError("weights are empty; allowed: one number per worker, at least one worker")
    if num_workers is not None and len(checked) != num_workers:
        raise ValueError(f"there are {len(checked)} weights for {num_workers} workers; allowed: one per worker")
    for worker, weight in enumerate(checked):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of worker {worker} is {weight}; allowed: finite numbers of 0 or more")
    if not any(checked):
        raise ValueError("all weights are 0; at least one worker needs a weight above 0")
    return checked


def split_shares(total: int, weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """Whole numbers in proportion to the weights that sum to ``total``: largest remainder, ties to the lower rank.

    >>> split_shares(10, [1, 1, 1]).tolist(), split_shares(10, [0, 1, 3]).tolist()
    ([4, 3, 3], [0, 3, 7])

    Args:
        total: What to split, 0 to 2**63 - 1.
        weights: One per worker; a worker of weight 0 gets nothing.

    Returns:
        int64, shape (W,). Each is less than 1 from the exact share.

    Raises:
        ValueError: The total is negative, or the weights cannot be used (see :func:`check_weights`).
    """
    if total < 0:
        raise ValueError(f"the number of samples to share is {total}; allowed: 0 or more")
    return np.array(_split(int(total), tuple(weights)), dtype=np.int64)


@functools.lru_cache(maxsize=256)
def _split(total: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    # In integers, so that every machine finds the same remainders and the shares of any total sum up.
    ratios = [weight.as_integer_ratio() for weight in check_weights(weights)]
    common = max(denominator for _, denominator in ratios)
    scaled = [numerator * (common // denominator) for numerator, denominator in ratios]
    whole = sum(scaled)
    shares, remainders = zip(*(divmod(total * part, whole) for part in scaled), strict=True)
    largest = sorted(range(len(scaled)), key=lambda worker: -remainders[worker])
    one_more = set(largest[: total - sum(shares)])
    return tuple(share + (worker in one_more) for worker, share in enumerate(shares))


def place(
    ids: Ids,
    batch_size: int,
    strategy: str,
    weights: Sequence[float],
    homes: Workers | None = None,
    seed: int = 0,
    keys: Ids | None = None,
) -> Workers:
    """The worker that computes each of the samples of consecutive global batches.

    >>> place(np.arange(7), 4, "contiguous", [1, 3]).tolist()
    [0, 1, 1, 1, 0, 1, 1]

    Args:
        ids: int64, shape (n,), in global order; batches start at 0, and the last one may be short.
        batch_size: Samples per global batch.
        strategy: One of :data:`STRATEGIES`.
        weights: One per worker. In each batch worker w computes ``split_shares(samples, weights)[w]`` samples.
        homes: Slot -> worker, int32; only for ``hash``.
        seed: Chooses the hash from id to slot; the same at every use of the same homes.
        keys: int64, shape (n,): what places each sample under ``hash``; the ids if None.

    Returns:
        int32, shape (n,).

    Raises:
        ValueError: Something is out of range; the message says what is allowed.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; allowed: 1 or more")
    if strategy not in STRATEGIES:
        raise ValueError(f"the strategy is {strategy!r}; allowed: {', '.join(map(repr, STRATEGIES))}")
    seats = _seats(len(ids), batch_size, weights)
    if strategy != "hash" or len(weights) == 1:
        return seats
    if homes is None:
        raise ValueError("the strategy 'hash' needs homes; make them with slot_homes(weights)")
    if homes.max() >= len(weights):
        raise ValueError(f"homes name worker {homes.max()} but there are only {len(weights)} weights")
    # Small integers are sorted by radix, in a pass or two; a block at a time stays in the core's cache.
    small = np.uint8 if len(weights) <= 1 << 8 else np.uint16 if len(weights) <= 1 << 16 else np.int32
    table = homes.astype(small)
    placed_by = ids if keys is None else keys
    block = max(1, _BLOCK // batch_size) * batch_size
    for start in range(0, len(ids), block):
        part = slice(start, start + block)
        home = table[slot_of(placed_by[part], len(table), seed)]
        seats[part] = _fill(home, seats[part], batch_size, weights)
    return seats


def _seats(num: int, batch_size: int, weights: Sequence[float]) -> Workers:
    """The worker of each position when shares are cut in rank order."""
    ranks = np.arange(len(weights), dtype=np.int32)
    full, rest = divmod(num, batch_size)
    # A batch larger than what is asked for is never laid out in full.
    batch = np.repeat(ranks, split_shares(batch_size, weights)) if full else ranks[:0]
    tail = np.repeat(ranks, split_shares(rest, weights)) if rest else ranks[:0]
    return np.concatenate((np.tile(batch, full), tail))


def _fill(home: npt.NDArray[Any], seats: Workers, batch_size: int, weights: Sequence[float]) -> Workers:
    """Give each position a seat at its home while there are any, then the free seats of its batch in rank order."""
    num = len(home)
    order = np.argsort(home, kind="stable")  # positions by (home, batch, position)
    sorted_home = home[order]
    batch = order // batch_size
    # The how-manieth of its (home, batch) each one is.
    index = np.arange(num)
    starts = index.copy()
    starts[1:][(sorted_home[1:] == sorted_home[:-1]) & (batch[1:] == batch[:-1])] = 0
    nth = index - np.maximum.accumulate(starts)
    # Shares and first seats of a home's worker, in a full batch and in a short last one.
    full, rest = divmod(num, batch_size)
    shares = split_shares(batch_size, weights)
    share, first = shares[sorted_home], (np.cumsum(shares) - shares)[sorted_home]
    if rest:
        tail_shares = split_shares(rest, weights)
        tail = np.flatnonzero(batch == full)
        share[tail] = tail_shares[sorted_home[tail]]
        first[tail] = (np.cumsum(tail_shares) - tail_shares)[sorted_home[tail]]
    seated = nth < share
    taken = np.zeros(num, dtype=bool)
    taken[(batch * batch_size + first + nth)[seated]] = True
    spilled = np.ones(num, dtype=bool)
    spilled[order[seated]] = False
    # Each batch has as many free seats as it has spilled samples, so both can be listed over all batches at once.
    result = home.astype(np.int32)
    result[spilled] = seats[~taken]
    return result


def spill_fraction(workers: Workers, home: Workers) -> float:
    """Fraction of samples that are not computed by the worker at which they are at home.

    Args:
        workers: int32, shape (n,), from :func:`place`.
        home: int32, shape (n,), from :func:`hvdlm.algorithms.slots.home_of`.
    """
    return moved_fraction(home, workers)


def moved_fraction(before: Workers, after: Workers) -> float:
    """Fraction of samples (or slots) whose worker changed.

    Args:
        before: Worker of each, shape (n,).
        after: The same under another number of workers or other weights, shape (n,).

    Raises:
        ValueError: The shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"{before.shape} workers before and {after.shape} after; allowed: equal shapes")
    return float(np.count_nonzero(before != after) / max(1, before.size))


def skew(counts: Sequence[int] | npt.NDArray[np.int64], weights: Sequence[float]) -> float:
    """Largest over mean of count / weight: 1.0 is a perfect balance, 1.1 means one worker has 10 % too much.

    >>> skew([9, 20, 33], [1, 2, 3])
    1.1

    Args:
        counts: Samples of each worker.
        weights: One per worker. Workers of weight 0 are left out if they have nothing; else the skew is infinite.

    Raises:
        ValueError: The weights cannot be used, or there are not as many as counts.
    """
    checked = check_weights(weights, len(counts))
    if any(count and not weight for count, weight in zip(counts, checked, strict=True)):
        return math.inf
    ratios = [float(count) / weight for count, weight in zip(counts, checked, strict=True) if weight]
    mean = math.fsum(ratios) / len(ratios)
    return max(ratios) / mean if mean else 1.0
