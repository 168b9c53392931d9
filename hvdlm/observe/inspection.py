"""Looks at the whole job every few steps, in one small collective: are the replicas equal, where does the time go?

Every rank hashes each tensor that has to be equal and sends one number made of all of them. Only where these differ do
the numbers of the single tensors travel, so that the first that differs can be named.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import xxhash

from hvdlm.algorithms.fingerprint import Difference, differences
from hvdlm.contracts import Adapter, Fingerprint
from hvdlm.errors import MismatchError
from hvdlm.observe.events import Events
from hvdlm.observe.timing import FIELDS, Timing
from hvdlm.options import Options
from hvdlm.world import World

__all__ = ["Inspection"]

_log = logging.getLogger("hvdlm")

_EXACT_BITS = 52
"""A float64 holds integers of so many bits exactly, also after zeros are added to it."""


class Inspection:
    """Compares the replicas of one job.

    Args:
        adapter: The framework.
        world: Where this process stands.
        options: ``fingerprint_every``, ``timings_every`` and ``on_divergence``.
        events: Where findings are written down.
        timing: This rank's times, which travel along.
    """

    def __init__(self, adapter: Adapter, world: World, options: Options, events: Events, timing: Timing) -> None:
        self._adapter, self._world, self._events = adapter, world, events
        self._timing = timing
        self._every = options.fingerprint_every
        self._times_every = options.timings_every
        self._action = options.on_divergence
        self._steps = self._last_equal = 0
        self._told: set[str] = set()

    def reduced(self) -> None:
        """Gradients were made global, on every rank alike; the step that uses them has not been made yet.

        Raises:
            MismatchError: Replicas differ and ``on_divergence`` is ``stop``; on every rank alike.
        """
        if self._times_every:
            self._timing.reduced()
        compare = bool(self._every and self._steps and self._steps % self._every == 0)
        if compare or (self._times_every and self._steps % self._times_every == 0):
            self.look(compare)
        self._steps += 1

    def look(self, compare: bool) -> None:
        """Exchange figures now; every rank calls it.

        Args:
            compare: Whether the replicas are compared too.

        Raises:
            MismatchError: See :meth:`reduced`.
        """
        prints = self._adapter.fingerprints() if compare else []
        whole = xxhash.xxh3_64(_packed(prints)).intdigest() >> (64 - _EXACT_BITS)
        table = np.zeros((self._world.size, 1 + FIELDS), dtype=np.float64)
        table[self._world.rank] = [float(whole), *self._timing.own(self._steps)]
        rows = self._adapter.collectives.allreduce(table.reshape(-1)).reshape(table.shape).tolist()
        if len({row[0] for row in rows}) > 1:
            self._diverged(prints)
        elif compare:
            self._last_equal = self._steps
        self._timing.gathered([row[1:] for row in rows], self._steps)

    def _diverged(self, prints: Sequence[Fingerprint]) -> None:
        payloads = self._adapter.collectives.allgather(_packed(prints))
        if len({len(payload) for payload in payloads}) > 1:
            counts = ", ".join(str(len(payload) // 8) for payload in payloads)
            raise MismatchError(
                f"replicas differ after step {self._steps}: the ranks hold {counts} tensors.",
                hint="change the model on every rank alike",
            )
        found = differences([np.frombuffer(payload, "<u8").tolist() for payload in payloads])
        trained = [d for d in found if prints[d.index].trained]
        # A statistic that the model keeps may differ without spoiling what is trained: that is told, and told once.
        only_buffers = not trained and self._action == "stop"
        shown = [d for d in found if prints[d.index].name not in self._told] if only_buffers else found
        self._told |= {prints[d.index].name for d in found}
        if not shown:
            return
        first = (trained or shown)[0]
        message = self._message(prints, found, first)
        action = "warn" if only_buffers else self._action
        self._events.add(
            "divergence",
            step=self._steps,
            last_equal_step=self._last_equal,
            tensor=prints[first.index].name,
            ranks=list(first.odd),
            tensors=len(found),
            action=action,
        )
        if action == "stop":
            raise MismatchError(
                message,
                hint="hvdlm verify looks for the cause; on_divergence='resync' (--on-divergence resync) goes on with "
                f"the state of rank {first.root}",
            )
        if self._world.is_main:
            done = f"; all ranks now have the state of rank {first.root}" if action == "resync" else ""
            _log.warning("%s%s", message, done)
        if action == "resync":
            self._adapter.resync([prints[d.index].name for d in found], first.root)
            self._last_equal = self._steps

    def _message(self, prints: Sequence[Fingerprint], found: Sequence[Difference], first: Difference) -> str:
        odd = set(first.odd)
        most = [rank for rank in range(self._world.size) if rank not in odd]
        kind = "" if prints[first.index].trained else " (a buffer)"
        more = f", the first of {len(found)} of {len(prints)} tensors," if len(found) > 1 else ""
        return (
            f"replicas differ after step {self._steps} (equal after step {self._last_equal}): "
            f"{prints[first.index].name}{kind}{more} is not the same on {_ranks(first.odd)} as on {_ranks(most)}"
        )


def _packed(prints: Sequence[Fingerprint]) -> bytes:
    return np.array([p.digest for p in prints], dtype="<u8").tobytes()


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
