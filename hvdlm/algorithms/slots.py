"""Sample ids to slots: the small, fixed set of places that hash partitioning gives to workers.

Keys go to a fixed number of slots and slots to workers, as in the partitioning of Dynamo (DeCandia et al., "Dynamo:
Amazon's highly available key-value store", SOSP 2007, strategy 3), so a table of slots is all that a plan has to hold.
The slot of an id is stratified like a scrambled digital net (Owen, "Randomly permuted (t,m,s)-nets and
(t,s)-sequences", 1995): each aligned run of ``num_slots`` consecutive ids meets every slot exactly once. Slots of dense
ids are therefore equally full, where an independent hash would leave them uneven by the square root of their load.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.hashing import mix64

__all__ = ["home_of", "slot_counts", "slot_of"]

Ids = npt.NDArray[np.int64]
Workers = npt.NDArray[np.int32]


def slot_of(ids: Ids, num_slots: int, seed: int = 0) -> Ids:
    """The slot of each sample id or key hash.

    Args:
        ids: int64, shape (n,).
        num_slots: A power of two.
        seed: Chooses the hash.

    Returns:
        int64, shape (n,), each in [0, num_slots).

    Raises:
        ValueError: ``num_slots`` is not a power of two.
    """
    bits = num_slots.bit_length() - 1
    if num_slots < 1 or num_slots != 1 << bits:
        raise ValueError(f"the number of slots is {num_slots}; allowed: powers of two")
    # The hash of the high bits chooses which of the low bits are flipped.
    slots = mix64(ids >> bits, seed).view(np.int64)
    slots ^= ids
    slots &= num_slots - 1
    return slots


def slot_counts(num_samples: int, num_slots: int, seed: int = 0) -> Ids:
    """How many of the ids [0, num_samples) are in each slot, without going through them.

    >>> slot_counts(10**18, 4).tolist()
    [250000000000000000, 250000000000000000, 250000000000000000, 250000000000000000]

    Args:
        num_samples: 0 or more.
        num_slots: A power of two.
        seed: As given to :func:`slot_of`.

    Returns:
        int64, shape (num_slots,).

    Raises:
        ValueError: ``num_slots`` is not a power of two.
    """
    runs, rest = divmod(num_samples, num_slots)
    last = np.arange(num_samples - rest, num_samples, dtype=np.int64)
    return runs + np.bincount(slot_of(last, num_slots, seed), minlength=num_slots)


def home_of(ids: Ids, homes: Workers, seed: int = 0) -> Workers:
    """The worker at which each sample is at home.

    Args:
        ids: int64, shape (n,).
        homes: int32, shape (slots,), from :func:`hvdlm.algorithms.rendezvous.slot_homes`.
        seed: As given to :func:`slot_of`.

    Returns:
        int32, shape (n,).
    """
    return homes[slot_of(ids, len(homes), seed)]
