"""The keyed permutation is a permutation, can be entered anywhere, and looks random."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.permutation import MAX_SIZE, KeyedPermutation, feistel


def epoch_key(epoch: int) -> int:
    return derive_seed("order", 0, epoch)


def z_score(observed: npt.NDArray[np.int64], expected: float) -> float:
    """How many standard deviations a chi-square statistic is above its mean (normal for many cells)."""
    freedom = observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


# Pinned: a change of these would reorder the data of every resumed run.
GOLDEN = {
    10: [7, 3, 1, 9, 6],
    5000: [2439, 2876, 976, 4947, 3328],
    10**9: [470300568, 368005520, 586235295, 447937011, 799334099],
    2**62: [702822778802044576, 4304676239222721946, 4069394885361586009, 3251796882124646651, 261886271990906182],
}


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_values(size: int) -> None:
    assert KeyedPermutation(size, 7)(np.arange(5)).tolist() == GOLDEN[size]


@pytest.mark.parametrize("size", [*range(1, 70), 4095, 4096, 4097, 8191, 8192, 8193, 65_536, 65_537, 100_003])
@pytest.mark.parametrize("key", [0, 2**64 - 1])
def test_every_element_once(size: int, key: int) -> None:
    order = KeyedPermutation(size, key)
    elements = order(np.arange(size))
    assert elements.dtype == np.int64
    assert (np.bincount(elements, minlength=size) == 1).all()
    assert (order.inverse(elements) == np.arange(size)).all()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, MAX_SIZE) | st.integers(1, 10_000), st.integers(-(2**70), 2**70))
def test_any_position_alone_and_back(data: st.DataObject, size: int, key: int) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    order = KeyedPermutation(size, key)
    elements = order(positions)
    assert ((elements >= 0) & (elements < size)).all()
    assert (order.inverse(elements) == positions).all()
    assert (order(order.inverse(positions)) == positions).all()
    assert elements.tolist() == [int(order(np.array([position]))[0]) for position in positions]


@settings(deadline=None)
@given(st.integers(2, 62), st.integers(0, 2**32 - 1), st.integers(0, 2**62))
def test_feistel_inverts_itself(bits: int, key: int, value: int) -> None:
    values = np.array([value % (1 << bits)])
    keys = np.full(5, key, dtype=np.uint32)
    there = feistel(values, bits, keys)
    assert 0 <= there[0] < 1 << bits
    assert feistel(there, bits, keys, inverse=True)[0] == values[0]


def test_blocks_larger_than_the_working_arrays() -> None:
    order = KeyedPermutation(10**6, 5)
    whole = order(np.arange(300_000))
    assert (whole[200_000:200_010] == order(np.arange(200_000, 200_010))).all()
    assert len(np.unique(whole)) == 300_000


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_sizes_take_all_permutations_equally_often(size: int) -> None:
    num = math.factorial(size)
    seen = Counter(tuple(KeyedPermutation(size, epoch_key(e))(np.arange(size)).tolist()) for e in range(100 * num))
    assert len(seen) == num
    assert z_score(np.array(list(seen.values())), 100.0) < 5


@pytest.mark.parametrize("size", [4097, 8192, 10_000, 65_536, 10**9, 2**62])
def test_each_position_takes_all_elements_equally_often(size: int) -> None:
    positions = np.array([0, 1, size // 2, size - 1])
    elements = np.array([KeyedPermutation(size, epoch_key(e))(positions) for e in range(4000)])
    # Sixteenths are cut so that each holds an equal number of elements, but for one element at most.
    cells = (elements.astype(object) * 16 // size).astype(np.int64)
    for column in cells.T:
        assert z_score(np.bincount(column, minlength=16), 250.0) < 5
    # Pairs of positions are independent.
    assert z_score(np.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256), 4000 / 256) < 5


@pytest.mark.parametrize("size", [4096, 4097, 8192, 65_536, 10**6, 10**9])
def test_neighbours_and_consecutive_epochs_are_not_related(size: int) -> None:
    positions = np.arange(4000)
    now = KeyedPermutation(size, epoch_key(0))(positions)
    steps, parities, changes = (np.zeros(cells, dtype=np.int64) for cells in (64, 4, 64))
    correlations = []
    for epoch in range(1, 31):
        after = KeyedPermutation(size, epoch_key(epoch))(positions)
        steps += np.bincount((np.diff(now) % size) * 64 // size, minlength=64)
        parities += np.bincount((now[1:] & 1) * 2 + (now[:-1] & 1), minlength=4)
        changes += np.bincount(((after - now) % size) * 64 // size, minlength=64)
        correlations.append(np.corrcoef(now, after)[0, 1])
        now = after
    for counts in (steps, changes):
        assert z_score(counts, counts.sum() / 64) < 6
    # Almost whole permutations hold equal numbers of odd and even ids, so only an excess is a fault.
    assert z_score(parities, parities.sum() / 4) < 6
    assert np.abs(correlations).max() < 5 / math.sqrt(len(positions))


def test_takes_no_memory_whatever_the_size() -> None:
    tracemalloc.start()
    for size in (10**9, 2**62):
        KeyedPermutation(size, 1)(np.array([size - 1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_sizes_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=rf"is {size}; allowed: 1 to 2\*\*62"):
        KeyedPermutation(size, 0)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_out_of_range(position: int) -> None:
    with pytest.raises(IndexError, match=r"not all in \[0, 10\)"):
        KeyedPermutation(10, 0)(np.array([3, position]))
    with pytest.raises(IndexError):
        KeyedPermutation(10, 0).inverse(np.array([3, position]))


def test_no_positions() -> None:
    for size in (10, 10**9):
        assert KeyedPermutation(size, 0)(np.array([], dtype=np.int64)).shape == (0,)
