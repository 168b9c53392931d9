"""Flat buckets of gradients in a TensorFlow graph: weighted, summed over workers, as they are or as scaled fp16.

The same arithmetic as :mod:`hvdlm.adapters.torch_bucket`. What a bucket remembers between steps (the exponent that
brings its largest magnitude into the range of fp16) is a variable, so that it works the same in a graph, in a loop
inside a graph and eagerly. Every rank sees the same sums, so every rank takes the same branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.adapters.keras_codecs import Coder
from hvdlm.adapters.keras_wire import KerasWire
from hvdlm.algorithms.codecs import CODECS
from hvdlm.contracts import Collectives
from hvdlm.options import Options

__all__ = ["Buckets", "layout", "make_buckets", "merged"]

_TARGET_EXP = 12
"""The scaled absolute maximum is brought to 2**12: 16 times under the fp16 limit, 2**36 above its smallest number."""
_MAX_DROP_EXP = 20
"""A maximum that fell by more than 2**20 in one step is at the bottom of the fp16 range, where it has few bits left."""
_MAX_EXP = 126
"""The largest power of two that float32 can scale by."""
_UNKNOWN = -1000
"""Exponent of a bucket that has not been summed in full precision yet."""


def layout(grads: Sequence[tf.Tensor], cap_bytes: float) -> list[tuple[tf.DType, list[int]]]:
    """Group gradients into buckets of at most ``cap_bytes`` per data type: (type of the sum, indices).

    From last to first, roughly the order in which backward reaches them. Half floats are summed as float32.
    """
    buckets: list[tuple[tf.DType, list[int]]] = []
    opened: dict[tf.DType, tuple[list[int], int]] = {}
    for i in reversed(range(len(grads))):
        dtype = tf.float64 if grads[i].dtype == tf.float64 else tf.float32
        size = (grads[i].shape.num_elements() or 0) * dtype.size
        members, used = opened.get(dtype, ([], 0))
        if not members or used + size > cap_bytes:
            members, used = [], 0
            buckets.append((dtype, members))
        members.append(i)
        opened[dtype] = (members, used + size)
    return buckets


class Buckets:
    """Sums lists of gradients over workers.

    Args:
        wire: Collectives.
        name: Tells these collectives from those of others.
        codec: How gradients travel.
        rank: Of PowerSGD.
        ratio: Part of the gradient that top-k sends.
        cap_bytes: Largest bucket.
        warm_up: Sums that go as they are, before any is coded.
    """

    def __init__(
        self, wire: KerasWire, name: str, *, codec: str, rank: int, ratio: float, cap_bytes: float, warm_up: int = 0
    ) -> None:
        self._wire, self._name, self._warm_up = wire, name, warm_up
        self._codec, self._rank, self._ratio, self._cap = codec, rank, ratio, cap_bytes
        # The allreduce carries these two, over Gloo half floats too slowly.
        self.coded = codec != "none" and not (codec == "fp16" and wire.sums_halves)
        """Whether sums go by other collectives, which need gradients whose sizes never change."""
        self._coders: dict[tuple[Any, ...], Coder] = {}
        self._exponents: dict[tuple[Any, ...], tf.Variable] = {}
        with tf.init_scope():
            self._made = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._given: Mapping[str, Mapping[str, Any]] = {}

    @property
    def owes(self) -> bool:
        """Whether the codec remembers what it has not sent yet."""
        return CODECS[self._codec].feedback

    def sum(self, grads: Sequence[tf.Tensor], weight: tf.Tensor, *, settle: bool = False) -> list[tf.Tensor]:
        """Sum over ranks of weight * gradient, in the gradients' own types.

        Args:
            grads: Dense gradients; the same list on every rank. Their shapes are known, at least where they are coded.
            weight: float64 scalar; where it is 0 even a NaN counts nothing.
            settle: Send it as it is, and with it all that the codec has not sent yet: the last sum before another way.
        """
        sums: list[tf.Tensor] = list(grads)
        early = self._made.assign_add(1) <= self._warm_up if self._warm_up else tf.constant(False)
        for number, (dtype, members) in enumerate(layout(grads, self._cap)):
            parts = [tf.reshape(tf.cast(grads[i], dtype), [-1]) for i in members]
            flat = tf.concat(parts, 0) if len(parts) > 1 else parts[0]
            flat = tf.math.multiply_no_nan(flat, tf.cast(weight, dtype))
            known = [grads[i].shape.num_elements() for i in members]
            sizes = [tf.size(parts[n]) if size is None else size for n, size in enumerate(known)]
            name = f"{self._name}.{number}"
            if self.coded:
                coder = self._coder(name, dtype, [tuple(grads[i].shape) for i in members])
                if settle:
                    total = self._wire.sum(flat + coder.take(), f"{name}.settled")
                else:
                    total = self._either(early, flat, f"{name}.plain", coder.sum)
            else:
                total = self._sum_flat(flat, name, (number, str(dtype), *known), early)
            pieces = tf.split(total, tf.stack(sizes), num=len(sizes)) if len(sizes) > 1 else [total]
            for i, piece in zip(members, pieces, strict=True):
                sums[i] = tf.cast(tf.reshape(piece, tf.shape(grads[i])), grads[i].dtype)
        return sums

    def _either(self, early: tf.Tensor, flat: tf.Tensor, name: str, coded: Callable[[tf.Tensor], tf.Tensor]) -> Any:
        if not self._warm_up:
            return coded(flat)
        return tf.cond(early, lambda: self._wire.sum(flat, name), lambda: tf.ensure_shape(coded(flat), flat.shape))

    def _sum_flat(self, flat: tf.Tensor, name: str, key: tuple[Any, ...], early: tf.Tensor) -> tf.Tensor:
        if self._codec == "none":
            return self._wire.sum(flat, name)
        exponent = self._exponent_of(key)
        known = tf.logical_and(tf.not_equal(exponent, _UNKNOWN), tf.logical_not(early))
        exponent_used = tf.minimum(tf.where(known, exponent, 0), _MAX_EXP)
        scale = tf.cast(exponent_used, tf.float64)

        def exact() -> tf.Tensor:
            return self._wire.sum(flat, f"{name}.exact")

        def half() -> tf.Tensor:
            sent = tf.cast(flat * tf.cast(tf.pow(tf.constant(2.0, tf.float64), scale), flat.dtype), tf.float16)
            received = tf.cast(self._wire.sum(sent, f"{name}.half"), flat.dtype)
            total = received * tf.cast(tf.pow(tf.constant(2.0, tf.float64), -scale), flat.dtype)
            # Not finite, or so small that fp16 rounded too much of it away: the sum again in full precision.
            found = _next_exponent(total)
            fits = tf.logical_and(tf.not_equal(found, _UNKNOWN), found - exponent_used <= _MAX_DROP_EXP)
            return tf.cond(fits, lambda: total, exact)

        total = tf.cond(known, half, exact)
        exponent.assign(_next_exponent(total))
        return total

    def _coder(self, name: str, dtype: tf.DType, shapes: list[tuple[int, ...]]) -> Coder:
        key = (name, str(dtype), *shapes)
        if key not in self._coders:
            self._coders[key] = Coder(
                self._wire, name, codec=self._codec, rank=self._rank, ratio=self._ratio, shapes=shapes, dtype=dtype
            )
            with tf.init_scope():
                self._coders[key].load_state(self._given)
        return self._coders[key]

    def state(self) -> dict[str, dict[str, Any]]:
        """What codecs remember between two steps; see :meth:`hvdlm.adapters.keras_codecs.Coder.state`."""
        return {**merged(self._coders.values()), "made": {"sums": int(self._made.numpy())}}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from :meth:`state`, also in what is made when the first step is traced."""
        self._given = {what: dict(state.get(what, {})) for what in ("residuals", "warm")}
        self._made.assign(int(state.get("made", {}).get("sums", 0)))
        for coder in self._coders.values():
            coder.load_state(self._given)

    def pool(self, collectives: Collectives) -> None:
        """Share out among all workers what they have not sent yet. Every rank calls it."""
        for coder in self._coders.values():
            own = coder.residuals()
            if own:
                flat = np.concatenate([part.reshape(-1) for part in own])
                coder.load_residuals([collectives.allreduce(flat) / self._wire.size])

    def _exponent_of(self, key: tuple[Any, ...]) -> tf.Variable:
        if key not in self._exponents:
            with tf.init_scope():  # a variable outlives the graph that is being traced
                self._exponents[key] = tf.Variable(_UNKNOWN, dtype=tf.int32, trainable=False)
        return self._exponents[key]


def make_buckets(
    codec: str, options: Options, wire: KerasWire, name: str, cap_bytes: float, warm_up: int = 0
) -> Buckets:
    """Buckets under a codec, which need not be the one of the options."""
    rank, ratio = options.powersgd_rank, options.topk_ratio
    return Buckets(wire, name, codec=codec, rank=rank, ratio=ratio, cap_bytes=cap_bytes, warm_up=warm_up)


def merged(parts: Iterable[Coder | Buckets]) -> dict[str, dict[str, Any]]:
    """What all of them remember between two steps; their names differ."""
    states = [part.state() for part in parts]
    return {what: {k: v for state in states for k, v in state[what].items()} for what in ("residuals", "warm")}


def _next_exponent(total: tf.Tensor) -> tf.Tensor:
    """The power of two that brings the largest magnitude to the target; unknown if one is not finite."""
    largest = tf.cast(tf.reduce_max(tf.abs(total)), tf.float32)
    # The exponent's bits, since a logarithm need not round alike on different processors.
    exponent = tf.bitwise.right_shift(tf.bitcast(largest, tf.int32), 23) - 126
    # All zeros give the largest exponent: whatever comes next is in range or found out, however small.
    found = _TARGET_EXP - exponent
    return tf.where(tf.reduce_all(tf.math.is_finite(total)), found, _UNKNOWN)
