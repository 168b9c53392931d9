"""Which worker a slot of samples is at home at, so that few slots move when workers come, go or change weight.

Weighted rendezvous hashing: a slot goes to the worker with the smallest -ln(u) / weight, where u in (0, 1) is a hash of
slot and worker (Thaler & Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 1998; the
logarithmic form: Schindelhauer & Schomaker, "Weighted distributed hash tables", SPAA 2005). No worker gets more than
``load_bound`` times its share; slots that would exceed it go to the next best (Mirrokni, Thorup & Zadimoghaddam,
"Consistent hashing with bounded loads", SODA 2018).

Two things make it exact and fast. The u of one worker are a keyed permutation of fixed quantiles, one for each slot, so
-ln(u) takes known values: a worker can list its slots from the best on, and only pairs that can win are ever looked at
(of 1,024 workers, 12 per slot). And those values are harmonic sums, made by additions and divisions, which IEEE 754
rounds alike everywhere, as a logarithm's last bit is not: all machines find the same homes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.hashing import mix64
from hvdlm.algorithms.partition import check_weights
from hvdlm.algorithms.permutation import ROUNDS, feistel

__all__ = ["slot_homes"]

_WINDOW = 0.125
"""Candidate pairs looked at together, as a multiple of the number of slots."""


def slot_homes(
    weights: Sequence[float],
    num_slots: int = 1 << 16,
    load_bound: float = 1.005,
    worker_keys: Sequence[int] | None = None,
) -> npt.NDArray[np.int32]:
    """The worker at which each slot is at home.

    Args:
        weights: One per worker; a worker of weight 0 gets no slot.
        num_slots: A power of two, 4 to 2**24.
        load_bound: Largest multiple of its fair share (rounded up to whole slots) that a worker gets, 1 or more.
            Closer to 1 is better balanced and moves more on a resize.
        worker_keys: What names each worker; its rank if None. With lasting names, a worker may leave from the middle of
            the ranks and only its own slots move.

    Returns:
        int32, shape (num_slots,).

    Raises:
        ValueError: Something is out of range; the message says what is allowed.
    """
    shares = _shares(weights)
    bits = num_slots.bit_length() - 1
    if not 2 <= bits <= 24 or num_slots != 1 << bits:
        raise ValueError(f"the number of slots is {num_slots}; allowed: powers of two from 4 to 2**24")
    if not load_bound >= 1:
        raise ValueError(f"the load bound is {load_bound}; allowed: 1 or more")
    if worker_keys is not None and not len(set(worker_keys)) == len(worker_keys) == len(weights):
        raise ValueError(f"there are {len(worker_keys)} worker keys for {len(weights)} weights, or two are equal")
    names = np.array(range(len(weights)) if worker_keys is None else worker_keys, dtype=np.int64)
    keys = (mix64(mix64(names) + np.arange(ROUNDS, dtype=np.uint64)[:, None]) >> np.uint64(32)).astype(np.uint32)
    rooms = np.array([math.ceil(min(load_bound * num_slots * share, num_slots)) for share in shares])
    # The means of num_slots sorted exponential variates: -ln(u) at its quantiles, smallest first.
    waits = np.cumsum(1.0 / np.arange(num_slots, 0, -1))
    homes = np.full(num_slots, -1, dtype=np.int32)
    listed = np.zeros(len(shares), dtype=np.int64)
    until = 0.0
    while homes.min() < 0:
        # Pairs in order of cost, a window at a time: all that cost less are settled before.
        open_workers = np.flatnonzero((rooms > 0) & (shares > 0))
        until += _WINDOW / math.fsum(shares[open_workers])
        first = listed[open_workers]
        last = np.searchsorted(waits, until * shares[open_workers], side="right")
        listed[open_workers] = last
        workers = np.repeat(open_workers, last - first)
        nth = np.arange(len(workers)) - np.repeat(np.cumsum(last - first) - last, last - first)
        slots = feistel(nth, bits, keys[:, workers])
        useful = np.flatnonzero(homes[slots] < 0)
        costs = waits[nth[useful]] / shares[workers[useful]]
        useful = useful[np.argsort(costs, kind="stable")]
        _join(slots[useful], workers[useful], homes, rooms)
    return homes


def _join(
    slots: npt.NDArray[np.int64],
    workers: npt.NDArray[np.int64],
    homes: npt.NDArray[np.int32],
    rooms: npt.NDArray[np.int64],
) -> None:
    """Join each pair, in order, whose slot has no home yet and whose worker has room; changes homes and rooms."""
    _, best = np.unique(slots, return_index=True)
    wanted = np.bincount(workers[best], minlength=len(rooms))
    if (wanted <= rooms).all():
        homes[slots[best]] = workers[best]
        rooms -= wanted
        return
    # A worker fills up on the way: from there on, what it cannot take goes on to others.
    home, room = homes.data, rooms.data  # items of a memoryview are read and written faster than those of an array
    for slot, worker in zip(slots.tolist(), workers.tolist(), strict=True):
        if home[slot] < 0 and room[worker]:
            home[slot] = worker
            room[worker] -= 1


def _shares(weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """The weights, scaled to sum to 1 in a way that every machine rounds alike and that cannot overflow."""
    checked = check_weights(weights)
    largest = max(checked)
    scaled = [weight / largest for weight in checked]
    total = math.fsum(scaled)
    return np.array([weight / total for weight in scaled])
