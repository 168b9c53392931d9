"""The account of one run: what adapters tell while it trains (:class:`hvdlm.contracts.Recorder`), counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.contracts import Adapter
from hvdlm.environment import Environment
from hvdlm.errors import DataError
from hvdlm.observe.coverage import Coverage, expected_sum
from hvdlm.observe.events import Events
from hvdlm.observe.inspection import Inspection
from hvdlm.observe.progress import Progress
from hvdlm.observe.sinks import open_sink
from hvdlm.observe.timeline import Timeline
from hvdlm.observe.timing import Timing
from hvdlm.observe.watchdog import Watchdog
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.world import World

__all__ = ["Account", "watch"]


class Account:
    """Counters of one run. See :class:`hvdlm.contracts.Recorder`.

    Args:
        adapter: The framework.
        progress: Shows what happens.
        partition: The option of that name, read when an epoch starts.
    """

    def __init__(self, adapter: Adapter, progress: Progress, partition: Callable[[], str]) -> None:
        self.inspection: Inspection | None = None
        """Looks at the replicas now and then, once there are some."""
        self.timing: Timing | None = None
        """Takes the time of steps."""
        self.timeline: Timeline | None = None
        """Notes what is done when, where a trace was asked for."""
        self.after_reduction: Callable[[], None] | None = None
        """Called each time gradients were made global, on every rank alike."""
        self._adapter, self._progress, self._partition = adapter, progress, partition
        self.batches = self.steps = self.samples = self.missing = self.repeated = 0
        self.reductions = self._own = self._own_before = 0
        self.skew: float | None = None
        """How even the homes of samples were in the last epoch."""
        self.events = Events(None)
        """Told of each epoch's shares."""
        self.drawn_at_random = False
        self.loss_first: tuple[Any, Share | None] | None = None
        self.loss_last: tuple[Any, Share | None] | None = None
        self.coverage: dict[tuple[str, int], Coverage] = {}
        self.expected: dict[int, int] = {}
        self._covered: dict[tuple[str, int], tuple[int, int, int]] = {}
        self._began: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The counts, to be kept with the state of the training. Every rank calls it between the same two steps."""
        first = None
        if self.loss_first is not None:
            value, share = self.loss_first
            first = [self._adapter.number(value), *((share.count, share.total) if share is not None else (1, 0))]
        counts = [self.batches, self.steps, self.samples, self.missing, self.repeated]
        # Of passes that a run which has just gone on has not come to yet.
        waiting = [[*key, [count, hashes], planned] for key, (count, hashes, planned) in self._covered.items()]
        return {
            "counts": counts,
            "drawn_at_random": self.drawn_at_random,
            "loss_first": first,
            "coverage": [
                [*key, coverage.total(self._adapter.collectives.allreduce), coverage.num_planned]
                for key, coverage in self.coverage.items()
            ]
            + waiting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these counts: what was counted beyond them is trained on again."""
        self.batches, self.steps, self.samples, self.missing, self.repeated = state["counts"]
        self.drawn_at_random = state["drawn_at_random"]
        self.loss_first = self.loss_last = None
        if state["loss_first"] is not None:
            value, count, total = state["loss_first"]
            self.loss_first = value, Share(np.empty(0, dtype=np.int64), count, total) if total else None
        self.coverage.clear()
        self._covered = {(loader, epoch): (*total, planned) for loader, epoch, total, planned in state["coverage"]}

    def begin(self, clock: Callable[[], float] = time.monotonic) -> None:
        """The first of what is counted happens now, if nothing did before."""
        if self._began is None:
            self._began = clock()

    def seconds(self, clock: Callable[[], float] = time.monotonic) -> float:
        """Seconds since the beginning; 0 before it."""
        return 0.0 if self._began is None else clock() - self._began

    def shown_loss(self) -> float | None:
        """The last loss of this worker."""
        return None if self.loss_last is None else self._adapter.number(self.loss_last[0])

    def batch(self, share: Share, epoch: int, loader: str) -> None:
        """A training batch was handed to the script."""
        self.begin()
        self.batches += 1
        self.samples += share.total
        self._own += share.count
        if self.timing is not None:
            self.timing.samples += share.count
        coverage = self.coverage.get((loader, epoch))
        if coverage is not None and not share.is_filler:
            coverage.add(share.ids)
        self._progress.batch(share.total, self.shown_loss)

    def loss(self, value: Any, share: Share | None) -> None:
        """A backward started from this scalar."""
        self.begin()
        self.loss_last = (value, share)
        if self.loss_first is None:
            self.loss_first = (value, share)
        if self.timeline is not None:
            self.timeline.reached("forward")

    def shares(self, own: int | None = None) -> list[float] | None:
        """Each worker's part of the samples computed: of all, or of those that ``own`` are this worker's. Every rank
        calls it; None in one process, or if there are none.
        """
        counts = [
            int(count) for count in self._adapter.collectives.allgather(str(self._own if own is None else own).encode())
        ]
        total = sum(counts)
        return [round(count / total, 6) for count in counts] if total and len(counts) > 1 else None

    def sharing(self) -> dict[str, Any]:
        """Who computed how much, for the summary. Every rank calls it."""
        return {"shares": self.shares(), "skew": self.skew}

    def step(self) -> None:
        """An optimizer made a step."""
        self.begin()
        self.steps += 1
        if self.timeline is not None:
            self.timeline.reached("optimizer step")

    def data(self, seconds: float) -> None:
        """The script waited for a batch."""
        if self.timing is not None:
            self.timing.data += seconds
        if self.timeline is not None:
            self.timeline.data(seconds)

    def note(self, text: str) -> None:
        """Something for the line of progress."""
        self._progress.note = text

    def reduced(self) -> None:
        """Gradients were made global."""
        self.reductions += 1
        if self.timeline is not None:
            self.timeline.reached("backward")
        if self.inspection is not None:
            self.inspection.reduced()
        if self.after_reduction is not None:
            self.after_reduction()

    def close_timeline(self) -> None:
        """Write the trace, if there is one. Every rank calls it."""
        if self.timeline is not None:
            self.timeline.close()

    def event(self, name: str, **facts: Any) -> None:
        """Something happened that the run's events and its report show."""
        self.events.add(name, **facts)

    def epoch(self, loader: str, number: int, num_samples: int, num_planned: int, steps: int) -> None:
        """A training loader starts an epoch."""
        self._progress.epoch(number, steps)
        # Under "none" every worker reads everything: nothing can be missing, and repeating is what was asked for.
        if num_samples and self._partition() != "none":
            count, sum_of_hashes, planned = self._covered.pop((loader, number), (0, 0, num_planned))
            self.coverage[(loader, number)] = Coverage(num_samples, planned, before=(count, sum_of_hashes))
        self.drawn_at_random |= not num_samples

    def epoch_done(self, loader: str, number: int, skew: float | None = None) -> None:
        """A training loader was read to its end, on every rank."""
        self.skew = self.skew if skew is None else skew
        if skew is not None and self.timing is not None:
            self.timing.skewed(self.steps, skew)
        shares = self.shares(self._own - self._own_before)
        self._own_before = self._own
        if shares is not None:
            self.events.add("shares", loader=loader, epoch=number + 1, shares=shares, skew=skew)
        coverage = self.coverage.pop((loader, number), None)
        if coverage is None:
            return
        if coverage.num_samples not in self.expected:
            self.expected[coverage.num_samples] = expected_sum(coverage.num_samples)
        counted = coverage.missing_and_repeated(
            self._adapter.collectives.allreduce, self.expected[coverage.num_samples]
        )
        if counted is None:
            raise DataError(
                f"epoch {number + 1} of {loader}: the workers together did not see every sample exactly once.",
                hint="check that all workers read the same dataset",
            )
        self.missing += counted[0]
        self.repeated += counted[1]


def watch(
    account: Account,
    adapter: Adapter,
    world: World,
    options: Options,
    events: Events,
    directory: Callable[[], Path],
    environment: Environment,
) -> Watchdog | None:
    """Begin to look at the replicas, at what time goes into, and at collectives that do not end.

    Args:
        account: Told of each step.
        adapter: The framework.
        world: Where this process stands.
        options: How often, and what then.
        events: Where findings are written down.
        directory: The run directory, made when it is asked for.
        environment: Where rank 0 may listen, and where Horovod writes its timeline, if it does.

    Returns:
        What watches collectives, to be closed; None if nothing does.
    """
    account.timing = timing = Timing(adapter, world, events, directory)
    if world.is_main:
        timing.sink = open_sink(options.metrics, events.without_secrets(options.to_dict()))
    timing.loss, timing.on_explained = account.shown_loss, account.note
    account.inspection = Inspection(adapter, world, options, events, timing)
    if environment.timeline not in (None, "DYNAMIC"):
        account.timeline = Timeline(str(environment.timeline), world, adapter.collectives)
    if not options.watchdog_seconds:
        return None
    return Watchdog(
        world,
        adapter.collectives,
        waiting=lambda: adapter.collectives.blocked()[0],
        steps=lambda: account.reductions,
        seconds=options.watchdog_seconds,
        events=events,
        address=environment.address,
    )
