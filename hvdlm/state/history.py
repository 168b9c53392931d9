"""The last commits of this process, which outlive a reset, and how workers agree on the one to go on from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from hvdlm.contracts import Collectives
from hvdlm.state.snapshot import Bytes, Entry, Snapshot

__all__ = ["History", "header_of", "send", "with_header"]

_KEPT = 2
"""A worker may fail while some have made a commit and others have not: the one before is held by all."""
_CHUNK_BYTES = 64 * 2**20


class History:
    """Commits held in this process's memory, the newest last.

    Args:
        keep: How many.
    """

    def __init__(self, keep: int = _KEPT) -> None:
        self._keep = keep
        self._commits: list[Snapshot] = []
        self.lost = 0
        """Steps this process had made beyond the commit that was agreed on last."""
        self.position = 0
        """Steps this process has made."""

    @property
    def numbers(self) -> list[int]:
        """Their numbers: optimizer steps of the whole training."""
        return [commit.number for commit in self.commits]

    @property
    def commits(self) -> tuple[Snapshot, ...]:
        """They themselves, each of them whole."""
        self._commits = [commit for commit in self._commits if commit.wait()]
        return tuple(self._commits)

    @property
    def newest(self) -> Snapshot | None:
        """The last one."""
        return self._commits[-1] if self._commits else None

    def spare(self) -> Snapshot | None:
        """A commit that may be overwritten by the next one; it is held no longer."""
        if len(self._commits) < self._keep:
            return None
        oldest = self._commits.pop(0)
        oldest.wait()
        return None if oldest.pins else oldest

    def add(self, snapshot: Snapshot) -> None:
        """Hold one more; the oldest goes."""
        older = [commit for commit in self._commits if commit.number < snapshot.number]
        self._commits = [*older, snapshot][-self._keep :]

    def clear(self) -> None:
        """Hold none."""
        self._commits.clear()

    def agree(self, collectives: Collectives) -> Snapshot | None:
        """The newest commit that all workers hold that hold any; sent to those that hold none. Every rank calls it.

        Where none is common to all, it is the newest of any worker: each of them is a whole state.

        Returns:
            The commit, the only one that every rank holds from now on; None if no worker holds one.
        """
        everyone = [json.loads(held) for held in collectives.allgather(json.dumps(self.numbers).encode())]
        holders = [set(numbers) for numbers in everyone if numbers]
        if not holders:
            return None
        common = set.intersection(*holders) or set.union(*holders)
        number = max(common)
        has = [number in numbers for numbers in everyone]
        own = next((commit for commit in self._commits if commit.number == number), None)
        if not all(has):
            received = send(own, collectives, has.index(True))
            own = own or received
        assert own is not None
        self._commits = [own]
        self.lost = max(0, self.position - number) if self.position else 0
        self.position = number
        return own


def send(snapshot: Snapshot | None, collectives: Collectives, root: int) -> Snapshot | None:
    """Give every rank the snapshot of rank ``root``, but for what is that worker's own; None if it has none.

    Every rank calls it.
    """
    own = None if snapshot is None else header_of(snapshot)
    header = json.loads(collectives.broadcast(json.dumps(own).encode(), root))
    if header is None:
        return None
    number, length = header[0], header[-1]
    data = np.empty(length, dtype=np.uint8) if snapshot is None else snapshot.data
    for start in range(0, length, _CHUNK_BYTES):
        end = min(length, start + _CHUNK_BYTES)
        sent = b"" if snapshot is None else snapshot.data[start:end].tobytes()
        received = collectives.broadcast(sent, root)
        if snapshot is None:
            data[start:end] = np.frombuffer(received, dtype=np.uint8)
    if snapshot is not None and snapshot.number == number:
        return snapshot
    return with_header(header, data).disown()


def header_of(snapshot: Snapshot) -> list[Any]:
    """All of a snapshot but its bytes, ready for JSON; the last item is their number."""
    entries = [[name, e.dtype, e.shape, e.start, e.end] for name, e in snapshot.entries.items()]
    return [snapshot.number, snapshot.tree, entries, len(snapshot.data)]


def with_header(header: list[Any], data: Bytes) -> Snapshot:
    """The snapshot that :func:`header_of` describes."""
    number, tree, listed, _ = header
    found = {name: Entry(dtype, tuple(shape), start, end) for name, dtype, shape, start, end in listed}
    return Snapshot(tree, found, data, number)
