"""Keeps the state of a training while it runs, and leads a script that is called again to where it was.

Commits are copies in memory, taken between two steps; some of them are also written to a store. A script that starts
again (after a reset, with ``--resume``, in a worker that joins) runs from its top: completed epochs are passed without
training, and where the position of the last commit is reached the state is put back.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hvdlm.algorithms.schedule import Interval, Schedule
from hvdlm.contracts import Adapter
from hvdlm.options import Options, lr_factor
from hvdlm.state.course import Counted
from hvdlm.state.extras import Extras
from hvdlm.state.history import History
from hvdlm.state.snapshot import Snapshot
from hvdlm.state.writer import Writer
from hvdlm.world import World

__all__ = ["Steward"]

_log = logging.getLogger("hvdlm")


class Steward:
    """See :class:`hvdlm.contracts.Course`.

    Args:
        adapter: Takes and restores states.
        options: When, and where to.
        world: Where this process stands.
        account: Counts steps; is kept with the state.
        extras: What the person registered, by name; may grow.
        history: Commits that outlive this session.
        writer: Writes to a store; None if there is none. Acts on rank 0.
        on_event: Told of commits, restores and checkpoints.
    """

    def __init__(
        self,
        adapter: Adapter,
        options: Options,
        world: World,
        account: Counted,
        extras: Mapping[str, Any],
        history: History | None = None,
        writer: Writer | None = None,
        on_event: Callable[[str, dict[str, Any]], None] = lambda name, fields: None,
    ) -> None:
        self._adapter, self._options, self._world = adapter, options, world
        self._account, self._writer = account, writer
        self.extras = Extras(extras)
        """What the person registered."""
        self._history = history or History(2 if options.elastic else 1)
        self.on_event = on_event
        self.on_boundary: list[Callable[[bool], None]] = []
        """Called between two steps with whether a commit was just made; they may raise."""
        self._commits = Schedule(Interval.parse(options.commit_every)) if options.elastic else None
        self._writes = Schedule(Interval.parse(options.checkpoint_every)) if writer is not None else None
        self._target: Snapshot | None = None
        self._cursors: dict[str, int] = {}
        self._began = False
        self._last_commit = self._last_whole = -1
        self._last_written = -1
        self._told: set[str] = set()
        self._calls = 0
        self._epoch = 0
        self._drawn_by_hand = True
        self.skipping = False

    @property
    def position(self) -> int:
        """Optimizer steps of the whole training so far; batches where no optimizer was seen."""
        return self._account.steps or self._account.batches

    # The beginning.

    def begin(self) -> None:
        """Find the state to go on from and set out for it, or take the first commit. Every rank calls it.

        Raises:
            CheckpointError: There is none and there has to be, or it is of another model or a newer version.
        """
        if self._began:
            return
        self._began = True
        snapshot = self._history.agree(self._adapter.collectives)
        cause = "reset"
        if snapshot is None and self._writer is not None:
            snapshot, cause = (
                self._writer.open_for_all(self._options.resume, self._world, self._adapter.collectives),
                "resume",
            )
        self._start_schedules()
        if snapshot is None:
            if self._commits is not None:
                self.commit_now()
            return
        self._history.add(snapshot)
        self._target, self._cause = snapshot, cause
        self._cursors = {name: int(state["cursor"]["epoch"]) for name, state in snapshot.tree["loaders"].items()}
        if snapshot.number == 0:
            self._arrive()
            return
        self.skipping = True
        # At once, so that what the script evaluates or saves on its way is the model of that position.
        self._adapter.restore(snapshot, whole=False, lr_factor=1.0)
        if self._world.is_main:
            _log.warning(
                "going on from step %d: completed epochs are passed without training. What the script does itself on "
                "its way (counters of its own, evaluations, prints) runs again; `for epoch in hvdlm.epochs(E)` and "
                "hvdlm.register(name, object) spare it",
                snapshot.number,
            )

    def _start_schedules(self) -> None:
        for schedule in (self._commits, self._writes):
            if schedule is not None:
                schedule.start(self.position)

    # On the way to the committed position. See hvdlm.contracts.Course.

    def done(self, loader: str, epoch: int) -> bool:
        """See :class:`hvdlm.contracts.Course`."""
        self._drawn_by_hand = False
        if not self.skipping:
            return False
        if epoch < self._cursors.get(loader, -1):
            return True
        self._arrive()
        return False

    def evaluation(self, batches: Iterator[Any]) -> Iterator[Any]:
        """See :class:`hvdlm.contracts.Course`. On the way its result is of no use, but it must have one."""
        return itertools.islice(batches, 1) if self.skipping else batches

    def epochs(self, numbers: Sequence[int]) -> Iterator[int]:
        """The epochs that are left; the state is restored before the first."""
        self._calls += 1
        first = 0
        if self.skipping:
            assert self._target is not None
            calls, epoch = self._target.tree["hvdlm"]["epochs"]
            if self._calls < calls:
                return
            if self._calls == calls:
                first = epoch
                self._arrive()
                self._calls = calls
        for self._epoch in range(first, len(numbers)):
            yield numbers[self._epoch]
        self._epoch = len(numbers)

    def _arrive(self) -> None:
        """The position is reached: everything is as it was when the commit was made."""
        start = time.monotonic()
        snapshot = self._target
        assert snapshot is not None
        self.skipping = False
        size = snapshot.tree["hvdlm"]["world_size"]
        factor = lr_factor(self._options, self._world.size) / lr_factor(self._options, size)
        kept = self._adapter.restore(snapshot, whole=True, lr_factor=factor)
        self._account.load_state_dict(kept["account"])
        self._calls, self._epoch = snapshot.tree["hvdlm"]["epochs"]
        self.extras.put_back(kept)
        self._last_commit, self._target = snapshot.number, None
        if self._commits is None and not self._world.is_main:
            self._history.clear()  # only rank 0 writes, and nothing else is done with it
        self._start_schedules()
        self._event("restore", cause=self._cause, seconds=round(time.monotonic() - start, 3))

    # Between two steps.

    def backward(self) -> None:
        """See :class:`hvdlm.contracts.Course`."""
        if self._drawn_by_hand:
            self.boundary()

    def boundary(self) -> None:
        """See :class:`hvdlm.contracts.Course`."""
        if self.skipping:
            assert self._target is not None
            # A script without loaders of ours makes its steps again, in vain, until it has made as many.
            if not self._cursors and self.position >= self._target.number:
                self._arrive()
            return
        position = self.position
        self._history.position = position
        made = False
        due = self._commits is not None and self._commits.due(position)
        write = self._writes is not None and self._writes.due(position)
        # Replicas that train on their own are no state until they have met.
        ready = self._adapter.synchronised()
        if ready and (due or write) and position != self._last_commit:
            made = self.commit_now(whole=write)
        if ready and write:
            self._write(position)
        for hook in self.on_boundary:
            hook(made)

    def grown(self) -> None:
        """See :class:`hvdlm.contracts.Course`."""
        if self._commits is not None and not self.skipping and self.position == self._last_commit:
            self._last_commit = -1
            self.commit_now()

    def commit_now(self, whole: bool = False) -> bool:
        """Take a commit between these two steps; every rank does it at the same ones. False if it was taken already.

        Args:
            whole: Whether it has to hold what each worker alone has: some will not be there to go on with it.
        """
        position = self.position
        if self.skipping or position == (self._last_whole if whole else self._last_commit):
            return False
        start = time.monotonic()
        self._adapter.synchronise()
        # What takes a collective first: a commit is in the history only when it is whole.
        account = self._account.state_dict()
        self._adapter.pool(whole)
        # Without elastic it is only to be written, and rank 0 does that.
        if self._commits is not None or self._world.is_main:
            self._history.add(self._capture(account, self._history.spare()))
        if self._commits is not None:
            self._commits.done(position, self._slowest)
        self._last_commit, self._last_whole = position, position if whole else self._last_whole
        self._event("commit", seconds=round(time.monotonic() - start, 4))
        return True

    def _slowest(self, seconds: float) -> float:
        return float(self._adapter.collectives.allreduce(np.array([seconds], dtype=np.float64), "max")[0])

    def _capture(self, account: dict[str, Any], old: Snapshot | None) -> Snapshot:
        snapshot = self._adapter.capture({**self.extras.states(), "account": account}, old)
        snapshot.number = self.position
        snapshot.tree["hvdlm"] = {
            "epochs": [self._calls, self._epoch],
            "framework": self._adapter.name,
            "world_size": self._world.size,
        }
        return snapshot

    # The store.

    def _write(self, position: int) -> None:
        assert self._writes is not None
        self._writes.done(position, self._slowest)
        self._submit()

    def _submit(self) -> bool:
        """Hand the newest commit to the writer, once; whether there is one. Acts on rank 0."""
        newest = self._history.newest
        if self._writer is None or not self._world.is_main or newest is None:
            return False
        if newest.number != self._last_written:
            self._last_written = newest.number
            self._writer.submit(newest)
        return True

    def write_now(self, timeout: float) -> bool:
        """Write the newest commit and wait ``timeout`` seconds for it; whether it is in the store. Acts on rank 0."""
        return self._submit() and self._writer is not None and self._writer.wait(timeout)

    def finish(self) -> None:
        """The script has come to its end: so has its state. Every rank calls it."""
        if not self._began:
            return
        if self.skipping:
            self._arrive()
        if self._writer is not None:
            self.commit_now(whole=True)
            self.write_now(_SECONDS_TO_FINISH)

    def close(self) -> None:
        """End the writer; makes no collective, safe to repeat."""
        if self._writer is not None:
            self._writer.close()

    def _event(self, name: str, **fields: Any) -> None:
        self.on_event(name, {"step": self.position, **fields})


_SECONDS_TO_FINISH = 120.0
"""How long the end of a run waits for a store that fails, before it gives up on the last checkpoint."""
