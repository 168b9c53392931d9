"""Chooses how gradients travel under Keras, from what it measures.

A compiled step cannot be made anew from outside of ``fit``, so that it holds every way that may pay, and takes one. How
long it computes and waits is timed inside; the choice is made there too, between two steps, on all workers alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hvdlm.adapters.keras_bucket import Buckets, make_buckets, merged
from hvdlm.adapters.keras_wire import KerasWire
from hvdlm.algorithms.comm_model import Load, candidates, choose
from hvdlm.algorithms.powersgd import thin_elements
from hvdlm.contracts import Collectives
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

__all__ = ["PlannedBuckets", "buckets_for"]

_log = logging.getLogger("hvdlm")
_TRIAL = (512, 512)


class _Alone:
    """Moves nothing: what is left is the arithmetic."""

    def __init__(self, like: KerasWire) -> None:
        self.rank, self.size, self.sums_halves = like.rank, like.size, like.sums_halves

    def sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return tf.identity(tensor)

    def gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return tf.concat([tensor] * self.size, 0)

    def exchange(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return tf.identity(tensor)


class PlannedBuckets:
    """Has the face of :class:`hvdlm.adapters.keras_bucket.Buckets`.

    Args:
        wire: Collectives.
        name: Tells these collectives from those of others.
        options: ``compression="auto"``, and what codecs take.
        cap_bytes: Largest bucket.
        within_host: Whether all workers are on one host, and compute on its processors.
        tell: Called with what was chosen and why; see :meth:`hvdlm.contracts.Recorder.event`.
    """

    def __init__(
        self,
        wire: KerasWire,
        name: str,
        *,
        options: Options,
        cap_bytes: float,
        within_host: bool,
        tell: Callable[..., object],
    ) -> None:
        self._wire, self._name, self._options, self._cap = wire, name, options, cap_bytes
        self._within_host, self._tell = within_host, tell
        self._codecs, self._instead = allowed_codecs(options, within_host, wire.sums_halves)
        self.coded = len(self._codecs) > 1
        """Whether sums may need gradients whose sizes never change."""
        self._ways: dict[str, Buckets] = {}
        self._load: Load | None = None
        self._costs: dict[str, float] = {}
        self._usual: float | None = None
        self._given: Mapping[str, Mapping[str, Any]] = {}
        with tf.init_scope():
            self._link = measure_link(wire, wire.size, within_host)
            self._mode = tf.Variable(0, dtype=tf.int64, trainable=False, name="hvdlm_way")
            self._turns = tf.Variable(0, dtype=tf.int64, trainable=False, name="hvdlm_sums")
            self._ended = tf.Variable(0.0, dtype=tf.float64, trainable=False, name="hvdlm_sum_ended")
            # Seconds of computing before each of the last sums, and seconds of the sum.
            self._seconds = tf.Variable(np.zeros((LOOK_EVERY, 2)), dtype=tf.float64, trainable=False)

    @property
    def choice(self) -> str:
        """The codec of the next step."""
        return list(self._ways)[int(self._mode.numpy())]

    def sum(self, grads: Sequence[tf.Tensor], weight: tf.Tensor) -> list[tf.Tensor]:
        """See :meth:`hvdlm.adapters.keras_bucket.Buckets.sum`."""
        if not self._ways:
            with tf.init_scope():
                self._begin([tuple(grad.shape) for grad in grads])
        ways = list(self._ways.values())
        if len(ways) == 1:
            return ways[0].sum(grads, weight)
        with tf.control_dependencies(list(grads)):
            began, turn = tf.timestamp(), self._turns.assign_add(1)
        early = self._options.compression_warmup_steps
        now = turn - early
        look = tf.logical_or(tf.equal(now, FIRST_LOOK), tf.logical_and(now > 0, tf.equal(now % LOOK_EVERY, 0)))
        row = turn % LOOK_EVERY
        # The first sum, and the first after an evaluation, follows what is no step; medians leave that out.
        before = tf.where(self._ended > 0, began - self._ended, 0.0)
        way = tf.cond(
            look, lambda: tf.ensure_shape(tf.numpy_function(self._look, [turn], tf.int64), []), self._mode.read_value
        )
        way = tf.where(turn <= early, tf.zeros_like(way), way)
        settling = [ways[i] for i in self._owing]
        branches = [lambda each=each: each.sum(grads, weight) for each in ways]
        branches += [lambda each=each: each.sum(grads, weight, settle=True) for each in settling]
        sums: list[tf.Tensor] = list(tf.switch_case(tf.cast(way, tf.int32), branches))
        with tf.control_dependencies(sums):
            ended = tf.timestamp()
            kept = self._seconds.scatter_nd_update([[row]], [tf.stack([before, ended - began])])
            with tf.control_dependencies([kept, self._ended.assign(ended)]):
                return [tf.identity(each) for each in sums]

    @property
    def _owing(self) -> list[int]:
        """Places of the ways that remember what they have not sent yet."""
        return [i for i, way in enumerate(self._ways.values()) if way.owes]

    def _begin(self, shapes: Sequence[tuple[int, ...]]) -> None:
        options, wire = self._options, self._wire
        sizes = [int(np.prod(shape)) for shape in shapes]
        load = Load(sum(sizes), thin_elements(shapes, options.powersgd_rank), options.topk_ratio, wire.size, 0.0, 0.0)
        if len(self._codecs) > 1:
            costs = _codec_costs(wire, self._codecs, options)
            worst = agree_on(wire, *costs.values())
            self._costs = {codec: cost * load.num_elements for codec, cost in zip(costs, worst, strict=True)}
        self._load = load
        codecs = candidates(self._codecs, load, self._link, self._costs, int(self._cap))
        self._ways = {c: make_buckets(c, options, wire, f"{self._name}.{c}", self._cap) for c in codecs}
        for way in self._ways.values():
            way.load_state(self._given)
        self._decide(0.0)

    def _look(self, turn: npt.NDArray[np.int64]) -> int:
        """Between two steps, on all workers: the place of the next sum's way, which sends what another still owes."""
        rows = self._seconds.numpy()
        rows = rows[rows[:, 0] > 0]
        compute, wait = agree_on(self._wire, median(rows[:, 0]), median(rows[:, 1]))
        self._seconds.assign(tf.zeros_like(self._seconds))
        first = int(turn) - self._options.compression_warmup_steps == FIRST_LOOK
        before, usual, self._usual = int(self._mode.numpy()), self._usual, None if first else wait
        if not first and not drifted(wait, usual, compute):
            return before
        if not first:
            self._link, self._usual = measure_link(self._wire, self._wire.size, self._within_host), None
        self._decide(compute)
        now = int(self._mode.numpy())
        if now != before and before in self._owing:
            return len(self._ways) + self._owing.index(before)
        return now

    def _decide(self, compute: float) -> None:
        assert self._load is not None
        load = replace(self._load, compute=compute)
        choice = choose(list(self._ways), load, self._link, self._costs, caps=(int(self._cap),))
        reason = self._instead + choice.reason
        self._tell("plan", codec=choice.codec, bucket_mb=round(self._cap / 2**20, 3), reason=reason)
        mode = list(self._ways).index(choice.codec)
        if (not compute or mode != int(self._mode.numpy())) and self._wire.rank == 0:
            _log.warning("%s", reason)
        self._mode.assign(mode)

    def state(self) -> dict[str, dict[str, Any]]:
        """See :meth:`hvdlm.adapters.keras_bucket.Buckets.state`."""
        return {**merged(self._ways.values()), "made": {"sums": int(self._turns.numpy())}}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from :meth:`state`. The link is another one perhaps: the way is chosen anew."""
        self._given = {what: dict(state.get(what, {})) for what in ("residuals", "warm")}
        made = int(state.get("made", {}).get("sums", 0))
        self._turns.assign(min(made, self._options.compression_warmup_steps))
        self._ended.assign(0.0)
        for way in self._ways.values():
            way.load_state(self._given)

    def pool(self, collectives: Collectives) -> None:
        """See :meth:`hvdlm.adapters.keras_bucket.Buckets.pool`."""
        for way in self._ways.values():
            way.pool(collectives)


def buckets_for(
    options: Options, wire: KerasWire, name: str, cap_bytes: float, within_host: bool, tell: Callable[..., object]
) -> Buckets | PlannedBuckets:
    """How gradients travel under these options. Arguments are those of :class:`PlannedBuckets`."""
    if options.compression == "auto":
        return PlannedBuckets(wire, name, options=options, cap_bytes=cap_bytes, within_host=within_host, tell=tell)
    return make_buckets(options.compression, options, wire, name, cap_bytes, options.compression_warmup_steps)


def _codec_costs(wire: KerasWire, codecs: Sequence[str], options: Options) -> dict[str, float]:
    """Seconds that each codec takes for an element, beyond filling a bucket that travels as it is."""
    gradients = [tf.random.stateless_normal(_TRIAL, [0, i]) for i in range(4)]
    alone: Any = _Alone(wire)

    def trial(codec: str) -> Callable[[], object]:
        buckets = make_buckets(codec, options, alone, f"trial.{codec}", 2.0**30)
        # Not jitted, and traced once: as in a step.
        step: Callable[[], object] = tf.function(
            lambda: buckets.sum(gradients, tf.constant(0.5, tf.float64)), autograph=False
        )
        return step

    return beyond_none(codecs, trial, sum(int(tf.size(gradient)) for gradient in gradients))
