"""Every batch is cut exactly, by any weights, and hash placement keeps samples at home where shares allow."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hvdlm.algorithms.partition import (
    STRATEGIES,
    check_weights,
    moved_fraction,
    place,
    skew,
    spill_fraction,
    split_shares,
)
from hvdlm.algorithms.permutation import KeyedPermutation
from hvdlm.algorithms.rendezvous import slot_homes
from hvdlm.algorithms.slots import home_of, slot_counts, slot_of

WEIGHT = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1e6, allow_subnormal=False))
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=8).filter(any)


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1) | st.integers(0, 100), WEIGHTS)
def test_shares_sum_up_and_are_less_than_one_off(total: int, weights: list[float]) -> None:
    shares = split_shares(total, weights)
    assert shares.dtype == np.int64
    assert sum(shares.tolist()) == total
    whole = sum(map(Fraction, weights))
    for share, weight in zip(shares.tolist(), weights, strict=True):
        assert abs(share - total * Fraction(weight) / whole) < 1
        assert weight or not share


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_equal_weights_give_the_first_ranks_one_more(total: int, num: int) -> None:
    assert split_shares(total, [0.3] * num).tolist() == [total // num + (w < total % num) for w in range(num)]


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        (0, [1, 2], [0, 0]),
        (1, [1, 1, 1], [1, 0, 0]),
        (1, [1, 1, 2], [0, 0, 1]),
        (2, [1, 1, 2], [1, 0, 1]),
        (10, [0, 1, 0, 3], [0, 3, 0, 7]),
        (7, [1e-300, 1e300], [0, 7]),
        (3, [1e308, 1e308, 1e308], [1, 1, 1]),
    ],
)
def test_shares_by_largest_remainder(total: int, weights: list[float], shares: list[int]) -> None:
    assert split_shares(total, weights).tolist() == shares


def test_shares_handed_out_can_be_changed_by_their_owner() -> None:
    split_shares(10, [1, 1])[0] = 99
    assert split_shares(10, [1, 1]).tolist() == [5, 5]


def by_hand(home: list[int], batch_size: int, strategy: str, weights: list[float]) -> list[int]:
    """The definition, a sample at a time."""
    placed = []
    for start in range(0, len(home), batch_size):
        batch = home[start : start + batch_size]
        free = split_shares(len(batch), weights).tolist()
        workers = [-1] * len(batch)
        if strategy == "hash":
            for position, worker in enumerate(batch):
                if free[worker]:
                    free[worker] -= 1
                    workers[position] = worker
        for position, worker in enumerate(workers):
            if worker < 0:
                workers[position] = next(rank for rank, left in enumerate(free) if left)
                free[workers[position]] -= 1
        placed += workers
    return placed


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 200),
    st.integers(1, 70),
    st.sampled_from(STRATEGIES),
    WEIGHTS,
    st.integers(0, 3),
    st.sampled_from([4, 64]),
)
def test_place_is_the_definition(
    num: int, batch_size: int, strategy: str, weights: list[float], seed: int, num_slots: int
) -> None:
    ids = KeyedPermutation(1000, seed)(np.arange(num))
    # Homes made for other weights: placement has to be exact whatever they are.
    homes = slot_homes([1] * len(weights), num_slots)
    workers = place(ids, batch_size, strategy, weights, homes, seed)
    assert workers.dtype == np.int32
    assert workers.tolist() == by_hand(home_of(ids, homes, seed).tolist(), batch_size, strategy, weights)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 700), st.sampled_from(STRATEGIES), WEIGHTS)
def test_each_batch_is_cut_by_the_shares(num: int, batch_size: int, strategy: str, weights: list[float]) -> None:
    homes = slot_homes(weights, 256)
    workers = place(np.arange(num), batch_size, strategy, weights, homes)
    for start in range(0, num, batch_size):
        batch = workers[start : start + batch_size]
        assert (np.bincount(batch, minlength=len(weights)) == split_shares(len(batch), weights)).all()


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 6), st.sampled_from(STRATEGIES))
def test_blocks_of_whole_batches_are_placed_as_in_one_go(
    num_batches: int, batch_size: int, cut: int, strategy: str
) -> None:
    assume(cut < num_batches)
    ids = np.arange(num_batches * batch_size - batch_size // 2)
    homes = slot_homes([1, 2, 1], 64)
    whole = place(ids, batch_size, strategy, [1, 2, 1], homes)
    parts = [place(part, batch_size, strategy, [1, 2, 1], homes) for part in np.split(ids, [cut * batch_size])]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("num_workers", [255, 256, 257, 1000])
def test_many_workers(num_workers: int) -> None:
    homes = slot_homes([1] * num_workers)
    ids = np.arange(5000)
    workers = place(ids, 1500, "hash", [1] * num_workers, homes)
    assert workers.tolist() == by_hand(home_of(ids, homes).tolist(), 1500, "hash", [1] * num_workers)


@pytest.mark.parametrize("batch_size", [100, 1500, 16_384, 30_000, 99_999])
def test_more_than_is_placed_at_once(batch_size: int) -> None:
    ids = KeyedPermutation(10**6, 2)(np.arange(50_000))
    weights = [1.0, 2.0, 0.5]
    homes = slot_homes(weights)
    expected = by_hand(home_of(ids, homes).tolist(), batch_size, "hash", weights)
    assert place(ids, batch_size, "hash", weights, homes).tolist() == expected


def test_golden_values() -> None:
    # Pinned: a change of these would send samples of a resumed run to other workers.
    ids = np.array([0, 1, 65_535, 65_536, 10**9, 2**62, -1])
    assert slot_of(ids, 2**16, seed=3).tolist() == [5817, 5816, 59718, 21302, 39588, 21705, 29205]
    assert place(ids, 4, "hash", [1, 1, 2], slot_homes([1, 1, 2]), seed=3).tolist() == [2, 2, 1, 0, 2, 1, 0]


def test_one_worker_needs_no_homes() -> None:
    assert place(np.arange(5), 2, "hash", [3.0]).tolist() == [0] * 5


def test_hash_keeps_samples_at_home_as_random_does_not() -> None:
    ids = KeyedPermutation(10**6, 1)(np.arange(2**17))
    weights = [1.0, 1.0, 2.0, 4.0]
    homes = slot_homes(weights)
    home = home_of(ids, homes)
    spill = {s: spill_fraction(place(ids, 4096, s, weights, homes), home) for s in STRATEGIES}
    assert spill["hash"] < 0.02
    assert spill["random"] > 0.5


@pytest.mark.parametrize("start", [0, 3 * 64, 2**40])
def test_slots_of_consecutive_ids_are_all_different(start: int) -> None:
    slots = slot_of(np.arange(start, start + 64), 64, seed=4)
    assert sorted(slots.tolist()) == list(range(64))


@settings(deadline=None)
@given(st.integers(0, 500), st.sampled_from([1, 4, 64]), st.integers(0, 5))
def test_slot_counts_are_those_of_the_ids(num: int, num_slots: int, seed: int) -> None:
    expected = np.bincount(slot_of(np.arange(num), num_slots, seed), minlength=num_slots)
    assert (slot_counts(num, num_slots, seed) == expected).all()


@pytest.mark.parametrize("stride", [2, 16, 1000, 2**16, 2**20, 2**32])
def test_slots_of_spaced_ids_are_spread_too(stride: int) -> None:
    occupied = np.bincount(slot_of(np.arange(2**18) * stride, 256), minlength=256)
    assert abs(occupied / 1024 - 1).max() < 6 / math.sqrt(1024)


def test_seed_changes_the_slots() -> None:
    ids = np.arange(2**20)
    assert np.mean(slot_of(ids, 2**16, 1) == slot_of(ids, 2**16, 2)) < 0.1


def test_slots_that_are_no_power_of_two() -> None:
    for num_slots in (0, 3, -4):
        with pytest.raises(ValueError, match="allowed: powers of two"):
            slot_of(np.arange(3), num_slots)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1], "weight of worker 1 is -1.0; allowed: finite numbers of 0 or more"),
        ([math.nan], "weight of worker 0 is nan"),
        ([1, math.inf], "weight of worker 1 is inf"),
        ([0, 0.0], "all weights are 0"),
        ([], "weights are empty"),
        (["a"], r"weights are \['a'\]; allowed: one number per worker"),
        ([None], r"weights are \[None\]"),
        (5, "weights are 5"),
    ],
)
def test_weights_that_cannot_be_used(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(weights)


def test_weights_of_the_wrong_length() -> None:
    with pytest.raises(ValueError, match="there are 3 weights for 2 workers"):
        check_weights([1, 2, 3], 2)
    assert check_weights(range(1, 3), 2) == (1.0, 2.0)


@pytest.mark.parametrize("call", [lambda w: split_shares(4, w), lambda w: place(np.arange(4), 2, "contiguous", w)])
def test_weights_are_checked_where_they_are_used(call: object) -> None:
    for weights in ([1, -1], [math.nan, 1], [0, 0]):
        with pytest.raises(ValueError, match="weight"):
            call(weights)  # type: ignore[operator]


def test_arguments_out_of_range() -> None:
    ids = np.arange(4)
    with pytest.raises(ValueError, match="batch size is 0; allowed: 1 or more"):
        place(ids, 0, "hash", [1, 1], None)
    with pytest.raises(ValueError, match="strategy is 'hsah'; allowed: 'hash', 'random', 'contiguous'"):
        place(ids, 2, "hsah", [1, 1], None)
    with pytest.raises(ValueError, match="needs homes"):
        place(ids, 2, "hash", [1, 1], None)
    with pytest.raises(ValueError, match="homes name worker 2 but there are only 2 weights"):
        place(ids, 2, "hash", [1, 1], slot_homes([1, 1, 1]))
    with pytest.raises(ValueError, match="is -1; allowed: 0 or more"):
        split_shares(-1, [1])


def test_moved_fraction() -> None:
    before: npt.NDArray[np.int32] = np.array([0, 0, 1, 1], dtype=np.int32)
    assert moved_fraction(before, np.array([0, 2, 1, 1], dtype=np.int32)) == 0.25
    assert moved_fraction(before[:0], before[:0]) == 0.0
    with pytest.raises(ValueError, match="equal shapes"):
        moved_fraction(before, before[:2])


def test_skew() -> None:
    assert skew([10, 20], [1, 2]) == 1.0
    assert skew([3, 1], [1, 1]) == 1.5
    assert skew([5, 0], [1, 0]) == 1.0
    assert skew([5, 1], [1, 0]) == math.inf
    assert skew([0, 0], [1, 1]) == 1.0
    with pytest.raises(ValueError, match="2 weights for 3 workers"):
        skew([1, 2, 3], [1, 1])
