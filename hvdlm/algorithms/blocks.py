"""A random order of rows that lie in blocks, such that few blocks are in use at any time.

Blocks are permuted first, then rows within windows of a few consecutive blocks: an out-of-core shuffle in two levels as
in MosaicML Streaming's ``py1b`` and TensorFlow's shuffle of file names followed by a shuffle buffer, but with random
access. Blocks that can only be read one after the other (a compressed file without seek points) form a segment, which
is moved as a whole and keeps the order of its blocks.

The slots of a global batch are dealt to lanes, each of which walks through blocks of its own. Workers compute runs of
consecutive slots, so a worker reads the blocks of its lanes and not those of the others; and since lanes have nothing
to do with the number of workers, neither has the order.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.permutation import KeyedPermutation

__all__ = ["BlockOrder"]

Ids = npt.NDArray[np.int64]

_TABLE_ROWS = 1 << 17
"""Largest window whose rows are permuted at once."""
_PIECE_ROWS = 1 << 15
"""Of larger windows so many places are looked up at once."""
_KEPT_ROWS = 1 << 21
"""Rows of such tables that are kept, 8 bytes each; they are used up one after the other, so the oldest one goes."""


class BlockOrder:
    """Position -> row, for rows that lie in blocks; memory grows with the blocks, not with the rows.

    >>> order = BlockOrder(np.array([0, 4, 6, 10]), key=3, window=1)
    >>> order(np.arange(10)).tolist()
    [4, 5, 9, 7, 8, 6, 0, 3, 1, 2]

    Args:
        first_rows: First row of each block, and behind them the number of rows; int64, shape (blocks + 1,), ascending
            from 0.
        key: Any integer. See :func:`hvdlm.algorithms.hashing.derive_seed`.
        window: Blocks within which rows are permuted.
        batch_size: Samples per global batch, to whose slots the lanes belong.
        lanes: Runs of slots that walk through blocks of their own; at most ``batch_size`` are used.
        segments: First block of each segment, ascending from 0; each block is one of its own if None.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        first_rows: Ids,
        key: int,
        *,
        window: int = 8,
        batch_size: int = 1,
        lanes: int = 1,
        segments: Ids | None = None,
    ) -> None:
        rows = np.asarray(first_rows, dtype=np.int64)
        if len(rows) < 2 or rows[0] != 0 or (np.diff(rows) < 0).any() or rows[-1] < 1:
            raise ValueError("first_rows has to ascend from 0 to the number of rows, which has to be 1 or more")
        for name, value in (("window", window), ("batch_size", batch_size), ("lanes", lanes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        self.key, self.window = key, window
        self.size = int(rows[-1])
        self._blocks = _permute(len(rows) - 1, key, segments)
        self._first_rows = rows[:-1][self._blocks]
        # The blocks end to end in their new order: block i holds places [starts[i], starts[i + 1]).
        self._starts = np.concatenate(([0], np.cumsum(np.diff(rows)[self._blocks])))
        self._windows = np.append(self._starts[:-1:window], self.size)
        self._batch_size = batch_size
        lanes = min(lanes, batch_size)
        self._tables: dict[tuple[int, int], Ids] = {}
        self._slots = np.arange(lanes + 1, dtype=np.int64) * batch_size // lanes

    def __repr__(self) -> str:
        return f"BlockOrder(size={self.size}, blocks={len(self._blocks)}, window={self.window}, key={self.key})"

    def __call__(self, positions: Ids) -> Ids:
        """The rows at some positions.

        Args:
            positions: int64, shape (n,), each in [0, size).

        Returns:
            int64, shape (n,).

        Raises:
            IndexError: A position is out of range.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= self.size):
            raise IndexError(f"positions from {positions.min()} to {positions.max()} are not all in [0, {self.size})")
        begin, end = self._whole_batches(positions)
        if begin == end:
            return self._rows(self._places(positions))
        # Whole batches one after the other, as an epoch is read: each lane reads consecutive places.
        rows = np.empty(len(positions), dtype=np.int64)
        batches = rows[begin:end].reshape(-1, self._batch_size)
        first = int(positions[begin]) // self._batch_size
        steps = self.size // self._batch_size
        for slot, behind in itertools.pairwise(self._slots.tolist()):
            width = behind - slot
            place = steps * slot + first * width
            batches[:, slot:behind] = self._run(place, place + len(batches) * width).reshape(-1, width)
        for part in (slice(0, begin), slice(end, None)):
            rows[part] = self._rows(self._places(positions[part]))
        return rows

    def _whole_batches(self, positions: Ids) -> tuple[int, int]:
        """The part of consecutive positions that is whole batches; nothing where positions are not consecutive."""
        if not len(positions) or (np.diff(positions) != 1).any():
            return 0, 0
        begin = int(-positions[0] % self._batch_size)
        return begin, max(begin, begin + (len(positions) - begin) // self._batch_size * self._batch_size)

    def _run(self, place: int, end: int) -> Ids:
        """The rows at consecutive places."""
        number = int(np.searchsorted(self._windows, place, side="right")) - 1
        parts = []
        while place < end:
            start, behind = int(self._windows[number]), int(self._windows[number + 1])
            size = behind - start
            piece = size if size <= _TABLE_ROWS else _PIECE_ROWS
            while place < min(behind, end):
                first = place - (place - start) % piece
                table = self._table(number, first - start, min(piece, behind - first))
                parts.append(table[place - first : min(end, behind) - first])
                place += len(parts[-1])
            number += 1
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _table(self, number: int, begin: int, size: int) -> Ids:
        """The rows at ``size`` places of a window from its place ``begin`` on, kept while a lane goes through them."""
        table = self._tables.get((number, begin))
        if table is None:
            whole = int(self._windows[number + 1] - self._windows[number])
            table = self._whole(number, whole) if size == whole else self._piece(number, begin, size)
            while self._tables and sum(map(len, self._tables.values())) + size > _KEPT_ROWS:
                self._tables.pop(next(iter(self._tables)))
            self._tables[number, begin] = table
        return table

    def _whole(self, number: int, size: int) -> Ids:
        first, last = number * self.window, min((number + 1) * self.window, len(self._blocks))
        # Row r of the i-th block here stands at place starts[i] + r, before rows are permuted.
        shifts = self._first_rows[first:last] - (self._starts[first:last] - self._starts[first])
        places = self._order_within(number, size)(np.arange(size, dtype=np.int64))
        rows = np.repeat(shifts, np.diff(self._starts[first : last + 1]))[places]
        rows += places
        return rows

    def _piece(self, number: int, begin: int, size: int) -> Ids:
        start = int(self._windows[number]) + begin
        return self._within(number, np.arange(start, start + size, dtype=np.int64))

    def _order_within(self, number: int, size: int) -> KeyedPermutation:
        return KeyedPermutation(size, derive_seed("window", self.key, number))

    def _rows(self, places: Ids) -> Ids:
        """The rows at some places, in any order."""
        numbers = np.searchsorted(self._windows, places, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        bounds = np.flatnonzero(np.diff(numbers[order], prepend=-1, append=-1))
        rows = np.empty(len(places), dtype=np.int64)
        for first, last in itertools.pairwise(bounds.tolist()):
            chosen = order[first:last]
            rows[chosen] = self._within(int(numbers[chosen[0]]), places[chosen])
        return rows

    def blocks_of_window(self, number: int) -> Ids:
        """The blocks whose rows are mixed in one window."""
        return self._blocks[number * self.window : (number + 1) * self.window]

    def _places(self, positions: Ids) -> Ids:
        """Where in the permuted blocks each position reads, before rows are permuted.

        Lane l has places [steps * slots[l], steps * slots[l + 1]) and takes as many of them a batch as it has slots. A
        short last batch takes what is left at the end.
        """
        if len(self._slots) == 2:
            return positions
        steps = self.size // self._batch_size
        batches, slots = np.divmod(positions, self._batch_size)
        lanes = np.searchsorted(self._slots, slots, side="right") - 1
        firsts, widths = self._slots[:-1][lanes], np.diff(self._slots)[lanes]
        places = steps * firsts + batches * widths + slots - firsts
        return np.where(batches < steps, places, positions)

    def _within(self, number: int, places: Ids) -> Ids:
        """The rows at places of one window."""
        start = int(self._windows[number])
        order = self._order_within(number, int(self._windows[number + 1]) - start)
        moved = order(places - start) + start
        first = number * self.window
        starts = self._starts[first : first + self.window + 1]
        # side="right" passes over empty blocks, which start where the next one does.
        blocks = first + np.searchsorted(starts, moved, side="right") - 1
        return np.asarray(self._first_rows[blocks] + moved - self._starts[blocks], dtype=np.int64)


def _permute(num_blocks: int, key: int, segments: Ids | None) -> Ids:
    """The blocks in an order in which segments are permuted."""
    firsts = np.arange(num_blocks, dtype=np.int64) if segments is None else np.asarray(segments, dtype=np.int64)
    if len(firsts) < 1 or firsts[0] != 0 or firsts[-1] >= num_blocks or (np.diff(firsts) < 1).any():
        raise ValueError(f"segments have to ascend from 0 to at most {num_blocks - 1}, the last block")
    order = KeyedPermutation(len(firsts), derive_seed("blocks", key))(np.arange(len(firsts), dtype=np.int64))
    lengths = np.diff(np.append(firsts, num_blocks))[order]
    ends = np.cumsum(lengths)
    within = np.arange(num_blocks, dtype=np.int64) - np.repeat(ends - lengths, lengths)
    return np.asarray(np.repeat(firsts[order], lengths) + within, dtype=np.int64)
