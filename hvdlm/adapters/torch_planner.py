"""Chooses how gradients travel from what it measures, says why in one line, and chooses again when that has changed."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_coded import BucketMaker, ReducerWire, bucket_maker, maker_for
from hvdlm.adapters.torch_reducer import Reducer
from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.algorithms.comm_model import Choice, Link, Load, choose, why_part
from hvdlm.algorithms.powersgd import thin_elements
from hvdlm.options import Options
from hvdlm.planning import (
    FIRST_LOOK,
    LOOK_EVERY,
    agree_on,
    allowed_codecs,
    beyond_none,
    drifted,
    measure_link,
    median,
)

__all__ = ["Planner", "codec_costs"]

_log = logging.getLogger("hvdlm")
_STEP_OF_BACKWARDS = 2.5
"""What is longer than this many backwards is no computing of the step: an evaluation, a slow disk."""
_TRIAL = (512, 512)


class _Alone(ReducerWire):
    """Moves nothing: what is left is the arithmetic."""

    def __init__(self, like: TorchWire) -> None:
        self.rank, self.size, self.sums_halves = like.rank, like.size, like.sums_halves

    def start(self, tensor: torch.Tensor, name: str) -> Any:
        return None

    def exchange(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        return None

    def collect(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        return None

    def arrived(self, handle: Any) -> bool:
        return True

    def wait(self, handle: Any) -> None:
        return None


def codec_costs(wire: TorchWire, codecs: Sequence[str], options: Options) -> dict[str, float]:
    """Seconds that each codec takes for an element, beyond filling a bucket that travels as it is."""
    gradient = torch.randn(_TRIAL)

    def trial(codec: str) -> Callable[[], None]:
        parameters = [torch.nn.Parameter(torch.zeros(_TRIAL)) for _ in range(4)]
        make = bucket_maker(codec, _Alone(wire), rank=options.powersgd_rank, ratio=options.topk_ratio)
        bucket = make("trial", parameters, torch.float32, torch.device("cpu"))

        def step() -> None:
            for p in parameters:
                bucket.fill(p, gradient, 0.5)
            bucket.launch(True)
            bucket.finish()

        return step

    return beyond_none(codecs, trial, 4 * gradient.numel())


class Planner:
    """Decides for one reducer.

    Args:
        reducer: Whose gradients.
        wire: Collectives.
        options: ``compression="auto"`` lets it choose the codec, ``fp16`` and ``bf16`` whether halves travel, and
            ``bucket_cap_mb=0`` the size of buckets.
        parameters: What is trained.
        watch: Tells when backward starts and ends.
        tell: Called with what was chosen and why; see :meth:`hvdlm.contracts.Recorder.event`.
        part: Lets workers train on their own from now on, on all ranks alike; None where that is not to be chosen.
        within_host: Whether all workers are on one host.
        make: How buckets are made under a codec.
    """

    def __init__(
        self,
        reducer: Reducer,
        wire: TorchWire,
        options: Options,
        parameters: Sequence[torch.nn.Parameter],
        watch: BackwardWatch,
        tell: Callable[..., object] = lambda *_, **__: None,
        part: Callable[[], None] | None = None,
        within_host: bool = False,
        make: Callable[[Options, TorchWire, str], BucketMaker] = maker_for,
    ) -> None:
        self._make = make
        self._part = None if options.exact else part
        self._reducer, self._wire, self._options, self._tell = reducer, wire, options, tell
        on_cpu = all(p.device.type == "cpu" for p in parameters)
        self._codecs, self._instead = allowed_codecs(options, within_host and on_cpu, wire.sums_halves)
        self._numel = sum(p.numel() for p in parameters)
        self._thin = thin_elements([p.shape for p in parameters], options.powersgd_rank)
        self._within_host = within_host
        self._link = measure_link(wire, wire.size, within_host)
        own = torch.get_num_threads() if on_cpu else math.inf
        self._processors = -agree_on(wire, -own)[0]  # of the worker that has fewest
        # What a codec costs matters where there is another one to take.
        costs = codec_costs(wire, self._codecs, options) if len(self._codecs) > 1 else {}
        self._costs = dict(zip(costs, agree_on(wire, *costs.values()), strict=True)) if costs else {}
        self.choice: Choice | None = None
        self._steps = 0
        self._began = self._waited_then = self._ended = 0.0
        self._backwards: list[float] = []
        self._computes: list[float] = []
        self._waits: list[float] = []
        self._usual_wait: float | None = None
        self._decide(0.0, 0.0)
        self._reductions = 0
        watch.before.append(self._before)
        watch.after.append(self._after)

    def _before(self, _: object) -> None:
        """A backward starts."""
        self._began, self._waited_then = time.perf_counter(), self._wire.waited

    def _after(self) -> None:
        """A backward has ended; only those that sent gradients count, which are the same on all workers."""
        if self._reducer.reductions == self._reductions:
            return
        self._reductions = self._reducer.reductions
        now, waited = time.perf_counter(), self._wire.waited - self._waited_then
        self._backwards.append(now - self._began - waited)
        if self._ended:
            self._computes.append(now - self._ended - waited)
        self._waits.append(waited)
        self._ended = now
        self._steps += 1
        if self._steps == FIRST_LOOK:
            self._replan(measured=True)
        elif self._steps % LOOK_EVERY == 0:
            (wait,) = agree_on(self._wire, median(self._waits))
            usual, self._usual_wait = self._usual_wait, wait
            (compute,) = agree_on(self._wire, median(self._computes))
            if drifted(wait, usual, compute):
                self._replan(measured=False)
                self._usual_wait = None
            self._clear()

    def pause(self, seconds: float) -> None:
        """So long something else ran between two steps: that is no computing of theirs."""
        if self._ended:
            self._ended += seconds

    def _replan(self, measured: bool) -> None:
        if not measured:
            self._link = measure_link(self._wire, self._wire.size, self._within_host)
        self._decide(*agree_on(self._wire, median(self._computes), median(self._backwards)))
        self._clear()

    def _clear(self) -> None:
        for values in (self._backwards, self._computes, self._waits):
            values.clear()
        self._ended = 0.0  # what lies between (an evaluation, a plan) is no step

    def _decide(self, compute: float, backward: float) -> None:
        compute = min(compute, _STEP_OF_BACKWARDS * backward)
        load = Load(
            self._numel,
            self._thin,
            self._options.topk_ratio,
            self._wire.size,
            compute,
            backward,
            processors=self._processors,
        )
        costs = {codec: cost * self._numel for codec, cost in self._costs.items()}
        fixed = int(self._options.bucket_cap_mb * 2**20)
        caps = {"caps": (fixed,)} if fixed else {}
        choice = choose(self._codecs, load, self._link, costs, **caps)
        # The first choice is made before a step was timed.
        alone = why_part(choice, load, self._link, self._options.sync_every) if self._part and compute else None
        if alone is not None and self._part is not None:
            self._tell("plan", sync="local", sync_every=self._options.sync_every, reason=alone)
            if self._wire.rank == 0:
                _log.warning("%s", alone)
            self._part()
            return
        choice = dataclasses.replace(choice, reason=self._instead + choice.reason)
        before, self.choice = self.choice, choice
        bucket = round(choice.cap_bytes / 2**20, 3)
        self._tell("plan", codec=choice.codec, bucket_mb=bucket, reason=choice.reason)
        if before is not None and (before.codec, before.cap_bytes) == (choice.codec, choice.cap_bytes):
            return
        self._reducer.rebuild(self._make(self._options, self._wire, choice.codec), choice.cap_bytes)
        if self._codecs != [self._options.compression] and self._wire.rank == 0:
            _log.warning("%s", choice.reason)

    @property
    def link(self) -> Link:
        """As measured last."""
        return self._link
