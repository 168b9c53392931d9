"""How shares follow the speed of workers while a job runs: what they start from, and when all workers change them."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable

import numpy as np

from hvdlm.algorithms.balance import Balancer, bounded, clipped_mean
from hvdlm.algorithms.partition import check_weights
from hvdlm.contracts import Collectives
from hvdlm.errors import ConfigError
from hvdlm.options import Options
from hvdlm.plan import Partition
from hvdlm.world import World

__all__ = ["Pace", "starting_weights", "steps_between"]

_log = logging.getLogger("hvdlm")

_CALIBRATION_SECONDS = 1.0
_ALIKE = 1.05
"""Workers whose speeds differ by less get equal shares: the clock is no better than that."""
_EVERY = 4
"""Steps between two agreements on weights."""


def steps_between(options: Options) -> int:
    """Steps between two agreements on weights: workers that train on their own do not wait for each other more often
    than they meet.
    """
    return max(_EVERY, options.sync_every) if options.sync == "local" else _EVERY


def starting_weights(options: Options, world: World, collectives: Collectives) -> tuple[float, ...]:
    """The weights a job starts with, equal on all ranks; empty for equal shares.

    Raises:
        ConfigError: Their number is not that of the workers.
    """
    if options.balance == "none":
        return ()
    if options.weights:
        try:
            return check_weights(options.weights, world.size)
        except ValueError as error:
            example = ",".join(["1"] * world.size)
            raise ConfigError(f"weights: {error}.", hint=f"give one per worker: --weights {example}") from None
    if options.balance == "dynamic" or world.size == 1:
        return ()
    return _calibrated(world, collectives, _speed)


def _calibrated(world: World, collectives: Collectives, speed: Callable[[], float]) -> tuple[float, ...]:
    speeds = _gather(speed(), world, collectives)
    if max(speeds) < _ALIKE * min(speeds):
        return ()
    weights = bounded(speeds, Balancer.smallest, Balancer.largest)
    if world.is_main:
        _log.info("calibrated shares: %s", ", ".join(f"{w / sum(weights):.1%}" for w in weights))
    return weights


def _speed(seconds: float = _CALIBRATION_SECONDS) -> float:
    """Matrix products per second of wall time, so that a CPU quota or a busy neighbour shows."""
    left = np.full((192, 192), 0.5, dtype=np.float32)
    out = left @ left  # the first one starts threads
    count, start = 0, time.perf_counter()
    while True:
        np.matmul(left, left, out=out)
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return count / elapsed


def _gather(value: float, world: World, collectives: Collectives) -> list[float]:
    """One number of each rank, in one collective."""
    own = np.zeros(world.size, dtype=np.float64)
    own[world.rank] = value
    gathered: list[float] = collectives.allreduce(own).tolist()
    return gathered


def _at(plans: list[tuple[int, Partition]], batch: int) -> Partition:
    return next((partition for first, partition in reversed(plans) if first <= batch), plans[0][1])


class Pace:
    """One loader's shares, and with ``balance="dynamic"`` how they follow what each worker's steps take.

    A step is what the script does between being handed a batch and asking for the next one, without what it waited
    for other workers. Every few steps all workers exchange their figures, each computes the same new weights, and
    these hold from the first global batch on that none of them has planned yet (loader workers read ahead). Which
    samples make up a global batch never changes.

    Args:
        partition: How batches are cut at the start.
        world: Where this process stands.
        collectives: To exchange figures.
        waited: Seconds that this worker has waited for others so far.
        dynamic: Whether shares follow at all; else this costs nothing.
        clock: Seconds.
        every: Steps between two exchanges.
    """

    def __init__(
        self,
        partition: Partition,
        *,
        world: World,
        collectives: Collectives,
        waited: Callable[[], float],
        dynamic: bool,
        clock: Callable[[], float] = time.perf_counter,
        every: int = _EVERY,
    ) -> None:
        self._every = every
        self._world, self._collectives = world, collectives
        self._waited, self._clock = waited, clock
        self._dynamic = dynamic and world.size > 1
        self._plans: list[tuple[int, Partition]] = [(0, partition)]
        self._balancer = Balancer(tuple(partition.shares))
        self._steps: list[tuple[float, int]] = []
        self._began: tuple[float, float, int] | None = None
        self._warm = False
        self._sizes: set[int] = set()

    @property
    def partition(self) -> Partition:
        """How batches that are yet to be planned are cut."""
        return self._plans[-1][1]

    def partition_at(self, batch: int) -> Partition:
        """How a global batch of this epoch is cut."""
        return _at(self._plans, batch)

    def planner(self) -> Callable[[int], Partition]:
        """:meth:`partition_at` of this epoch, also when another has begun."""
        return functools.partial(_at, self._plans)

    def restart(self, weights: tuple[float, ...]) -> None:
        """Go on with the weights an earlier run had, if they can follow."""
        if self._dynamic and len(weights) == self._world.size:
            self._plans = [(0, self.partition.weighted(weights))]
            self._balancer = Balancer(weights)

    def epoch(self) -> None:
        """An epoch begins: its batches are counted from 0."""
        self._plans = [(0, self.partition)]
        self._began = None

    def handed_out(self, num_samples: int) -> None:
        """The script has a batch of this many samples; see also :meth:`asked`."""
        if self._dynamic:
            self._began = (self._clock(), self._waited(), num_samples)

    def disturbed(self) -> None:
        """The script does something else meanwhile: the step tells nothing."""
        self._began = None

    def asked(self, planned: int, num_samples: int | None = None) -> None:
        """The script asks for the next batch, on all ranks alike.

        Args:
            planned: Batches of this epoch planned so far on this rank.
            num_samples: What was in the last batch, where only now it is known.
        """
        if not self._dynamic:
            return
        if self._began is not None:
            start, waited, handed_out = self._began
            size = handed_out if num_samples is None else num_samples
            # The first step of a size may compile or allocate for it.
            seconds = self._clock() - start - (self._waited() - waited) if size in self._sizes else math.nan
            self._sizes.add(size)
            self._steps.append((seconds, size))
        else:
            self._steps.append((math.nan, 1))
        if not self._warm:
            self._warm = True  # first steps allocate and compile
            self._steps.clear()
        elif len(self._steps) >= self._every:
            self._agree(planned)

    def _agree(self, planned: int) -> None:
        known = [(seconds, n) for seconds, n in self._steps if seconds > 0]
        self._steps.clear()
        seconds = clipped_mean(*zip(*known, strict=True)) if known else 0.0  # 0: no measurement
        size = self._world.size
        figures = np.zeros(2 * size, dtype=np.float64)
        figures[self._world.rank], figures[size + self._world.rank] = seconds, planned
        figures = self._collectives.allreduce(figures)
        if not self._balancer.update(figures[:size].tolist()):
            return
        weights = self._balancer.weights
        self._plans.append((int(figures[size:].max()), self.partition.weighted(weights)))
        if self._world.is_main:
            shares = ", ".join(f"{w / sum(weights):.1%}" for w in weights)
            _log.info("shares from batch %d of the epoch on: %s", self._plans[-1][0], shares)
