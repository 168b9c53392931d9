"""Where the time of a step goes on each rank: measured cheaply, gathered with the fingerprints, written on rank 0."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.algorithms.stragglers import Explanation, Times, explain, link_seconds
from hvdlm.contracts import Adapter
from hvdlm.observe.eventfile import EventFile
from hvdlm.observe.events import Events
from hvdlm.observe.sinks import Sink
from hvdlm.private import open_private
from hvdlm.world import World

__all__ = ["FIELDS", "FILE", "Timing"]

_log = logging.getLogger("hvdlm")

FILE = "steps.jsonl"
FIELDS = 7
"""Numbers that each rank adds to the exchange: seconds, of these for data, blocked; samples, loss, steps, jitter."""
_TO_DEVIATION = 1.4826
"""Of a normal variable: the standard deviation over the median distance from the median, which outliers leave alone."""
_PROBE_BYTES = 1 << 18
_PROBES = 5
_IN_A_ROW = 3
_SECONDS_BETWEEN = 60.0
"""On a busy machine another rank is the last every few steps: that is told now and then, not each time."""


class Timing:
    """The time of one rank's steps.

    Args:
        adapter: The framework.
        world: Where this process stands.
        events: Where a straggler is written down.
        directory: Asked for the run directory on rank 0.
        clock: Seconds.
    """

    def __init__(
        self,
        adapter: Adapter,
        world: World,
        events: Events,
        directory: Callable[[], Path],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._adapter, self._world, self._events, self._directory = adapter, world, events, directory
        self._clock = clock
        self.data = 0.0
        """Seconds that the script waited for batches so far."""
        self.samples = 0
        """Samples that counted on this rank so far."""
        self.loss: Callable[[], float | None] = lambda: None
        self.on_explained: Callable[[str], None] = lambda _: None
        """Told in a few words, on every exchange."""
        self.explanation: Explanation | None = None
        """What holds the job up most, as far as the last exchange tells."""
        self._links: list[float] | None = None
        self._before: tuple[float, float, float, int, int] | None = None
        self._step: tuple[float, float] | None = None
        self._owns: list[float] = []
        self._file: EventFile | None = None
        self.sink: Sink | None = None
        """Where else metrics go."""
        self._told: tuple[Any, ...] | None = None
        self._same = 0
        self._said = -_SECONDS_BETWEEN

    def reduced(self) -> None:
        """Gradients were made global: a step is over, as far as other ranks are concerned."""
        now = (self._clock(), self._adapter.collectives.blocked()[1])
        if self._step is not None:
            self._owns.append(now[0] - self._step[0] - (now[1] - self._step[1]))
        self._step = now

    def own(self, steps: int) -> list[float]:
        """This rank's numbers since the last call; zeros the first time, when compilers and caches are still cold."""
        now = (self._clock(), self.data, self._adapter.collectives.blocked()[1], self.samples, steps)
        before, self._before = self._before, now
        owns, self._owns = self._owns, []
        if before is None:
            return [0.0] * FIELDS
        wall, data, blocked, samples, count = (new - old for new, old in zip(now, before, strict=True))
        loss = self.loss()
        return [wall, data, blocked, float(samples), 0.0 if loss is None else loss, float(count), _deviation(owns)]

    def gathered(self, table: Sequence[Sequence[float]], steps: int) -> None:
        """The numbers of all ranks are here. May probe the links, on all ranks alike."""
        count = table[0][5]
        if not count:
            return
        wall, data, blocked, samples = ([row[i] / count for row in table] for i in range(4))
        compute = [max(0.0, w - d - b) for w, d, b in zip(wall, data, blocked, strict=True)]
        times = Times(data, compute, blocked, samples, [row[6] for row in table])
        found = explain(times, self._links)
        if found is not None and found.cause == "communication" and self._links is None:
            self._links = self._probe()
            found = explain(times, self._links)
        self.explanation = found
        self.on_explained("" if found is None else found.short())
        if self._world.is_main:
            self._write(times, table, steps)
            self._tell(found, steps)
        # The probe and what was written are no part of the next steps.
        self._step = None
        self._before = (self._clock(), self.data, self._adapter.collectives.blocked()[1], self.samples, steps)

    def _probe(self) -> list[float]:
        """Seconds that a message takes over each rank's link: the least of some, since noise only adds."""
        collectives = self._adapter.collectives
        payload, best = bytes(_PROBE_BYTES), np.full(self._world.size, np.inf)
        for _ in range(_PROBES):
            for root in range(self._world.size):
                collectives.allgather(b"")
                start = self._clock()
                collectives.broadcast(payload if root == self._world.rank else b"", root)
                best[root] = min(best[root], self._clock() - start)
        table = np.zeros((self._world.size, self._world.size))
        table[self._world.rank] = best
        return link_seconds(collectives.allreduce(table.reshape(-1)).reshape(table.shape).tolist())

    def _write(self, times: Times, table: Sequence[Sequence[float]], steps: int) -> None:
        losses = [row[4] for row in table if row[4]]
        speed = sum(times.samples) / times.step if times.step else 0.0
        loss = sum(losses) / len(losses) if losses else None
        line = {
            "step": steps,
            "time": time.time(),
            "loss": loss,
            "samples_per_second": round(speed, 3),
            "step_seconds": round(times.step, 6),
            "communication": round(times.communication, 6),
            "data": [round(v, 6) for v in times.data],
            "compute": [round(v, 6) for v in times.compute],
            "waiting": [round(v, 6) for v in times.waiting],
            "samples": [round(v, 3) for v in times.samples],
            "jitter": [round(v, 6) for v in times.jitter],
        }
        directory = self._directory()
        with open_private(directory / FILE, "a") as file:
            file.write(json.dumps(line) + "\n")
        values = {"perf/samples_per_second": speed, "perf/step_ms": 1e3 * times.step}
        values |= {"perf/communication_ms": 1e3 * times.communication}
        values |= {} if loss is None else {"train/loss": loss}
        for rank in range(len(table)) if len(table) <= 16 else ():
            for name, seconds in (("data", times.data), ("compute", times.compute), ("wait", times.waiting)):
                values[f"rank{rank}/{name}_ms"] = 1e3 * seconds[rank]
            values |= {f"rank{rank}/share": times.samples[rank] / sum(times.samples)} if any(times.samples) else {}
        self.scalars(steps, values)

    def skewed(self, steps: int, skew: float) -> None:
        """How even the homes of samples were in an epoch that ended now. Every rank calls it."""
        if self._world.is_main:
            self.scalars(steps, {"data/skew": skew})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show values where the run's metrics are shown; on rank 0."""
        if self._file is None:
            self._file = EventFile(self._directory() / "metrics")
        self._file.scalars(step, values)
        if self.sink is not None:
            self.sink.scalars(step, values)

    def close(self) -> None:
        """Nothing more will be shown."""
        if self.sink is not None:
            self.sink.close()
            self.sink = None

    def _tell(self, found: Explanation | None, steps: int) -> None:
        """When a rank is the straggler for the same cause three times in a row; then at most once in a while."""
        key = None if found is None or found.rank is None else (found.rank, found.cause)
        self._same = self._same + 1 if key == self._told else 1
        self._told = key
        if key is not None and found is not None and self._same >= _IN_A_ROW:
            now = self._clock()
            if now - self._said >= _SECONDS_BETWEEN:
                self._said = now
                _log.warning("after step %d: %s", steps, found.sentence())
                self._events.add(
                    "straggler",
                    step=steps,
                    rank=found.rank,
                    cause=found.cause,
                    cost=round(found.cost, 4),
                    gain_balanced=found.gain_balanced,
                    gain_without=found.gain_without,
                )


def _deviation(seconds: Sequence[float]) -> float:
    if len(seconds) < 3:
        return 0.0
    usual = statistics.median(seconds)
    return _TO_DEVIATION * statistics.median(abs(s - usual) for s in seconds)
