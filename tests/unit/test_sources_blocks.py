"""The block-wise order holds every row once, stays within its windows, and lets workers read different blocks."""

from __future__ import annotations

import time
import tracemalloc
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm.algorithms import blocks
from hvdlm.algorithms.blocks import BlockOrder
from hvdlm.plan import Partition


def firsts(counts: list[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


BLOCKS = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


@settings(max_examples=200, deadline=None)
@given(BLOCKS, st.integers(0, 2**64), st.integers(1, 9), st.integers(1, 50), st.integers(1, 8), st.data())
def test_every_row_once(
    counts: list[int], key: int, window: int, batch_size: int, lanes: int, data: st.DataObject
) -> None:
    segments = [0, *sorted(data.draw(st.sets(st.integers(0, len(counts) - 1)), "segments") - {0})]
    order = BlockOrder(
        firsts(counts), key, window=window, batch_size=batch_size, lanes=lanes, segments=np.array(segments)
    )
    rows = order(np.arange(order.size))
    assert sorted(rows.tolist()) == list(range(sum(counts)))
    # Any positions in any order give what the whole epoch gives.
    some = np.array(data.draw(st.lists(st.integers(0, order.size - 1), max_size=20), "positions"), dtype=np.int64)
    assert order(some).tolist() == rows[some].tolist()


@settings(max_examples=100, deadline=None)
@given(BLOCKS, st.integers(0, 2**64), st.integers(1, 9))
def test_rows_stay_within_their_window(counts: list[int], key: int, window: int) -> None:
    starts = firsts(counts)
    order = BlockOrder(starts, key, window=window)
    rows = order(np.arange(order.size))
    found = np.searchsorted(starts, rows, side="right") - 1
    begin = 0
    for number in range(-(-len(counts) // window)):
        members = order.blocks_of_window(number)
        size = sum(counts[block] for block in members)
        assert len(members) <= window
        assert set(found[begin : begin + size].tolist()) <= set(members.tolist())
        begin += size
    assert begin == order.size


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.integers(1, 9), st.integers(1, 50), st.integers(1, 8), st.sampled_from([7, 1 << 17]), st.data())
def test_consecutive_positions_give_what_each_gives(
    counts: list[int], window: int, batch_size: int, lanes: int, table_rows: int, data: st.DataObject
) -> None:
    """Whole batches are read by another way than single positions, and large windows in pieces."""
    # Two of them: one that has kept pieces of windows would look for them under other limits in vain.
    order, other = (BlockOrder(firsts(counts), 5, window=window, batch_size=batch_size, lanes=lanes) for _ in range(2))
    start = data.draw(st.integers(0, order.size - 1))
    positions = np.arange(start, data.draw(st.integers(start + 1, order.size)))
    with patch.multiple(blocks, _TABLE_ROWS=table_rows, _PIECE_ROWS=5, _KEPT_ROWS=3 * table_rows):
        rows = order(positions).tolist()
        assert order(positions[::-1]).tolist() == rows[::-1]
    assert rows == [int(other(np.array([p]))[0]) for p in positions]


def test_blocks_of_a_segment_keep_their_order() -> None:
    starts = firsts([10] * 40)
    order = BlockOrder(starts, 5, window=1, segments=np.arange(0, 40, 4))
    found = order(np.arange(400))[::10] // 10
    for run in found.reshape(10, 4):
        assert run.tolist() == list(range(run[0], run[0] + 4))
        assert run[0] % 4 == 0
    assert found[::4].tolist() != sorted(found[::4].tolist())


def test_golden_values() -> None:
    """Pinned: a change of these would reorder the data of every resumed run."""
    order = BlockOrder(firsts([100, 50, 70, 1, 200]), 7, window=2, batch_size=16, lanes=4)
    assert order(np.arange(0, 421, 60)).tolist() == GOLDEN


GOLDEN = [195, 317, 366, 73, 213, 318, 419, 348]


def test_epochs_differ_and_look_random() -> None:
    starts = firsts([100] * 100)
    one, two = (BlockOrder(starts, key, window=8)(np.arange(10_000)) for key in (1, 2))
    assert (one == two).mean() < 0.01
    # Neighbours in the file are seldom neighbours in the order.
    assert (np.diff(one) == 1).mean() < 0.01


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_each_worker_reads_its_own_blocks(workers: int) -> None:
    starts = firsts([64] * 512)
    order = BlockOrder(starts, 3, window=4, batch_size=64, lanes=16)
    ids = order(np.arange(order.size))
    read = []
    for rank in range(workers):
        partition = Partition(strategy="random", rank=rank, size=workers, seed=0)
        mine = np.concatenate([share.ids for share in partition.cut(ids, 64)])
        read.append(len(np.unique(mine // 64)))
    # Without lanes every worker would read all 512; with them its own part, and windows at the seams of lanes.
    assert max(read) <= 512 / workers + 8 * 16 / workers
    assert BlockOrder(starts, 3, window=4)(np.arange(64)).max() < order.size


def test_a_billion_rows_take_little_memory_and_time() -> None:
    starts = np.arange(0, 10**9 + 1, 10**5)
    tracemalloc.start()
    order = BlockOrder(starts, 3, window=8, batch_size=512, lanes=32)
    positions = np.arange(5 * 10**8, 5 * 10**8 + 65_536)
    order(positions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6
    begin = time.perf_counter()
    order(positions)
    assert time.perf_counter() - begin < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_rows": np.array([0])}, "first_rows"),
        ({"first_rows": np.array([0, 5, 3])}, "first_rows"),
        ({"first_rows": np.array([0, 0])}, "first_rows"),
        ({"window": 0}, "window is 0"),
        ({"lanes": 0}, "lanes is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"segments": np.array([1])}, "segments"),
        ({"segments": np.array([0, 9])}, "segments"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    arguments = {"first_rows": np.array([0, 3, 5]), "key": 0, **changes}
    with pytest.raises(ValueError, match=message):
        BlockOrder(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_out_of_range(position: int) -> None:
    with pytest.raises(IndexError, match=r"\[0, 5\)"):
        BlockOrder(np.array([0, 3, 5]), 0)(np.array([position]))
