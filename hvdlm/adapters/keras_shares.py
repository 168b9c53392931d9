"""Which part of a global batch is whose under Keras, and how that follows the speed of workers.

Pipelines read ahead in threads of their own, so that a batch is planned before the steps that decide its shares are
made. New shares hold from the first batch on that no worker has planned, and nobody plans while workers agree on them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hvdlm.balancing import Pace
from hvdlm.contracts import Collectives
from hvdlm.plan import Partition
from hvdlm.world import World

__all__ = ["Shares"]

_PASS = 1 << 32
"""More batches than a pass over the data has: batches of all passes are numbered in one row."""


class Shares:
    """How batches are cut: by weights that stay, or with ``balance="dynamic"`` by those that each step's time gives.

    Args:
        partition: How batches are cut at the start.
        world: Where this process stands.
        collectives: To exchange figures.
        dynamic: Whether weights follow; else this costs nothing.
        clock: Seconds.
    """

    def __init__(
        self,
        partition: Partition,
        *,
        world: World,
        collectives: Collectives,
        dynamic: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.dynamic = dynamic and world.size > 1
        self._lock = threading.Lock()
        self._source = self._planned = 0
        self._pace = Pace(
            partition,
            world=world,
            collectives=collectives,
            waited=lambda: collectives.blocked()[1],
            dynamic=self.dynamic,
            clock=clock,
        )

    @property
    def now(self) -> Partition:
        """How a batch is cut that nobody has planned yet."""
        return self._pace.partition

    def follow(self) -> Callable[[int, int], Partition]:
        """A new source of batches is trained on, and earlier ones no more. Every rank calls it after the same step.

        Returns:
            Pass, number of a batch in it -> how that is cut; from then on it is planned. Any thread may ask. What it
            says of a batch never changes, and weights of an earlier source stay as they are.
        """
        with self._lock:
            self._pace.epoch()
            self._source, self._planned = self._source + 1, 0
            source, partition_at = self._source, self._pace.planner()

        def at(number: int, batch: int) -> Partition:
            key = number * _PASS + batch
            with self._lock:
                if source == self._source:
                    self._planned = max(self._planned, key + 1)
                return partition_at(key)

        return at

    def begin(self) -> None:
        """A step begins; its batch has arrived or is about to."""
        self._pace.handed_out(0)

    def end(self, num_samples: int) -> None:
        """It is made, of so many samples here. Every rank calls it after the same step."""
        if self.dynamic:
            with self._lock:
                self._pace.asked(self._planned, max(1, num_samples))

    def disturbed(self) -> None:
        """The script does something else meanwhile: the step tells nothing."""
        self._pace.disturbed()
