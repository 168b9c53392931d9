"""Passes over the data: handed out in order, and gone on with where a run left off."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import tensorflow as tf

from hvdlm.algorithms.ledger import Cursor
from hvdlm.plan import Share

__all__ = ["Passes", "Planned", "claiming"]


@dataclass(frozen=True)
class Planned:
    """A share, and where it stands in its pass over the data."""

    share: Share
    epoch: int
    first: bool
    last: bool


class Passes:
    """Hands out passes over the data in order, and remembers what was handed out until it is trained on."""

    def __init__(self, endless: bool) -> None:
        self._endless = endless
        self._number = 0
        self._done = Cursor()
        self._taken: collections.deque[Planned] = collections.deque()

    def start(self, number: int) -> None:
        """See :class:`hvdlm.adapters.keras_data.Feed`."""
        if not self._endless:
            self._number = number

    def resume(self, done: Cursor, stream: tuple[int, int] | None) -> None:
        """See :class:`hvdlm.adapters.keras_data.Feed`."""
        self._done, self._number = done, done.epoch

    def done_of(self, number: int) -> Cursor:
        """What was trained on of a pass before the run went on."""
        done, self._done = self._done, Cursor()
        return done if done.epoch == number else Cursor()

    def numbers(self) -> Iterator[int]:
        self._taken = collections.deque()
        return itertools.count(self._number) if self._endless else iter([self._number])

    def note(self, planned: Planned) -> None:
        self._taken.append(planned)

    def take(self, steps: int, count: int, total: int) -> list[Planned]:
        """See :class:`hvdlm.adapters.keras_data.Feed`."""
        return [self._taken.popleft() for _ in range(min(steps, len(self._taken)))]


def claiming(dataset: tf.data.Dataset, other: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset, saying of itself that it is as long as the other, whatever it yields: its first pass is shorter."""
    cardinality = other.cardinality()
    dataset.cardinality = lambda: cardinality
    return dataset
