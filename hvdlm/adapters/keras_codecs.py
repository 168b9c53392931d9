"""Codecs on TensorFlow tensors: the arithmetic of :mod:`hvdlm.algorithms.codecs`, in graphs and eagerly.

What a codec remembers between steps is in variables. Every rank computes the same collectives in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.adapters.keras_wire import KerasWire
from hvdlm.algorithms.codecs import CODECS, MIN_EXP, TOP_EXP, Codec
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.powersgd import matrix_shape, start

__all__ = ["Coder", "decode", "encode"]

_CODES = {"fp16": tf.float16, "bf16": tf.bfloat16, "int8": tf.int8}
# Bits of an exponent: type of equal width, places it is shifted by, what stands for 2**0.
_BITS = {"float32": (tf.int32, 23, 127), "float64": (tf.int64, 52, 1023)}


def encode(codec: Codec, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """See :func:`hvdlm.algorithms.codecs.encode`; a bfloat16 is one here."""
    blocks = tf.reshape(values, [-1, codec.block])
    largest = tf.reduce_max(tf.abs(blocks), axis=1)
    if codec.name == "int8":
        floor = tf.constant(2.0 ** MIN_EXP[values.dtype.name], values.dtype)
        scales = tf.where(largest < floor, floor, largest) / tf.constant(127, values.dtype)
        codes = tf.cast(tf.round(blocks * (1 / scales)[:, None]), tf.int8)
        return scales, tf.reshape(codes, [-1])
    finite = tf.where(tf.math.is_finite(blocks), tf.abs(blocks), tf.zeros_like(blocks))
    largest = tf.reduce_max(finite, axis=1)
    bits, places, zero = _BITS[values.dtype.name]
    exponents = tf.bitwise.right_shift(tf.bitcast(largest, bits), tf.constant(places, bits)) - (zero - 1)
    exponents = tf.maximum(exponents, tf.constant(MIN_EXP[values.dtype.name], bits)) - TOP_EXP[codec.name]
    scales = tf.bitcast(tf.bitwise.left_shift(exponents + zero, tf.constant(places, bits)), values.dtype)
    scaled = blocks * (1 / scales)[:, None]
    if codec.name == "bf16":
        scaled = tf.cast(scaled, tf.float32)
    codes = tf.cast(scaled, _CODES[codec.name])
    return scales, tf.reshape(codes, [-1])


def decode(codec: Codec, scales: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
    """See :func:`hvdlm.algorithms.codecs.decode`."""
    values = tf.reshape(tf.cast(codes, scales.dtype), [-1, codec.block]) * scales[:, None]
    return tf.reshape(values, [-1])


class Coder:
    """Sums the flat gradients of one bucket, encoded.

    Args:
        wire: Collectives.
        name: Of the collectives.
        codec: Name of the codec.
        rank: Of PowerSGD.
        ratio: Part of the gradient that top-k sends.
        shapes: Of the gradients, one after the other in the bucket.
        dtype: float32 or float64.
    """

    def __init__(
        self,
        wire: KerasWire,
        name: str,
        *,
        codec: str,
        rank: int,
        ratio: float,
        shapes: Sequence[Sequence[int]],
        dtype: tf.DType,
    ) -> None:
        self._wire, self._name, self._codec = wire, name, CODECS[codec]
        self._rank, self._ratio = rank, ratio
        self._shapes, self._dtype = [tuple(shape) for shape in shapes], dtype
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._length = sum(self._sizes)
        step = wire.size * self._codec.block if self._codec.block else 1
        self._padded = -(-self._length // step) * step
        self._own: Any = None
        self._kept: Any = None
        self._warm: dict[int, Any] = {}
        with tf.init_scope():  # variables outlive the graph that is being traced
            if self._codec.feedback:
                self._own = tf.Variable(tf.zeros(self._padded, dtype), trainable=False)
            if self._codec.block and self._codec.feedback:
                self._kept = tf.Variable(tf.zeros(self._padded // wire.size, dtype), trainable=False)
            if codec == "powersgd":
                for i, shape in enumerate(self._shapes):
                    matrix = matrix_shape(shape, rank)
                    if matrix is not None:
                        seeded = start(derive_seed("powersgd", name, i), matrix[1], rank)
                        self._warm[i] = tf.Variable(tf.constant(seeded, dtype), trainable=False)

    def sum(self, flat: tf.Tensor) -> tf.Tensor:
        """The sum over ranks of weighted gradients, one after the other."""
        wanted = tf.pad(flat, [[0, self._padded - self._length]])
        if self._own is not None:
            wanted = wanted + self._own
        if self._codec.block:
            return self._exchange(wanted)[: self._length]
        return self._topk(wanted) if self._codec.name == "topk" else self._powersgd(wanted)

    def _exchange(self, wanted: tf.Tensor) -> tf.Tensor:
        scales, codes = self._encode(wanted, self._own)
        received = self._wire.exchange(self._pack(scales, codes, self._wire.size), f"{self._name}.out")
        parts = [decode(self._codec, *self._unpack(received[r : r + 1])) for r in range(self._wire.size)]
        total = tf.add_n(parts) if self._kept is None else tf.add_n([self._kept.read_value(), *parts])
        scales, codes = self._encode(total, self._kept)
        everything = self._wire.gather(self._pack(scales, codes, 1), f"{self._name}.back")
        everything = tf.ensure_shape(everything, [self._wire.size, None])
        chunks = [decode(self._codec, *self._unpack(everything[r : r + 1])) for r in range(self._wire.size)]
        return tf.concat(chunks, 0)

    def _encode(self, values: tf.Tensor, residual: Any) -> tuple[tf.Tensor, tf.Tensor]:
        scales, codes = encode(self._codec, values)
        if residual is not None:
            finite = tf.repeat(tf.math.is_finite(scales), self._codec.block)
            residual.assign(tf.where(finite, values - decode(self._codec, scales, codes), residual))
        return scales, codes

    def _pack(self, scales: tf.Tensor, codes: tf.Tensor, rows: int) -> tf.Tensor:
        as_bytes = [tf.reshape(tf.bitcast(part, tf.uint8), [rows, -1]) for part in (scales, codes)]
        return tf.concat(as_bytes, 1)

    def _unpack(self, row: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chunk = self._padded // self._wire.size
        at = chunk // self._codec.block * self._dtype.size
        scales = tf.bitcast(tf.reshape(row[0, :at], [-1, self._dtype.size]), self._dtype)
        codes = row[0, at : at + chunk * self._codec.code_bytes]
        width = self._codec.code_bytes
        codes = tf.reshape(codes, [-1, width]) if width > 1 else codes
        return scales, tf.bitcast(codes, _CODES[self._codec.name])

    def _topk(self, wanted: tf.Tensor) -> tf.Tensor:
        count = max(1, math.ceil(self._ratio * self._length))
        magnitude = tf.where(tf.math.is_nan(wanted), tf.constant(np.inf, wanted.dtype), tf.abs(wanted))
        at = tf.math.top_k(magnitude, count, sorted=False).indices
        values = tf.gather(wanted, at)
        left = tf.tensor_scatter_nd_update(wanted, at[:, None], tf.zeros_like(values))
        self._own.assign(tf.where(tf.math.is_finite(left), left, tf.zeros_like(left)))
        places = tf.reshape(self._wire.gather(at, f"{self._name}.places"), [self._wire.size, count])
        values = tf.reshape(self._wire.gather(values, f"{self._name}.top"), [self._wire.size, count])
        total = tf.zeros_like(wanted)
        for r in range(self._wire.size):  # one by one: in one go the order, and the last bit, could differ
            total = tf.tensor_scatter_nd_add(total, places[r][:, None], values[r])
        return total

    def _powersgd(self, wanted: tf.Tensor) -> tf.Tensor:
        parts = tf.split(wanted, self._sizes)
        matrices = {i: tf.reshape(parts[i], [s[0], -1]) for i, s in enumerate(self._shapes) if i in self._warm}
        first = [tf.matmul(m, self._warm[i]) for i, m in matrices.items()]
        whole = [part for i, part in enumerate(parts) if i not in matrices]
        sent = tf.concat([tf.reshape(t, [-1]) for t in (*first, *whole)], 0)
        summed = tf.split(self._wire.sum(sent, f"{self._name}.p"), [int(np.prod(t.shape)) for t in (*first, *whole)])
        if not matrices:
            return tf.concat(summed, 0)
        thin = summed[: len(first)]
        sound = tf.reduce_all([tf.reduce_all(tf.math.is_finite(t)) for t in thin])
        bases, factors = {}, {}
        for (i, m), p in zip(matrices.items(), thin, strict=True):
            p = tf.reshape(tf.where(sound, p, tf.ones_like(p)), [-1, self._rank])
            bases[i] = tf.linalg.qr(p / _positive(tf.reduce_max(tf.abs(p), axis=0))).q
            factors[i] = tf.matmul(m, bases[i], transpose_a=True)
        sizes = [int(np.prod(f.shape)) for f in factors.values()]
        sent = tf.concat([tf.reshape(f, [-1]) for f in factors.values()], 0)
        totals = tf.split(self._wire.sum(tf.where(sound, sent, tf.zeros_like(sent)), f"{self._name}.q"), sizes)
        rest = iter(summed[len(first) :])
        result, left = [], []
        for i, size in enumerate(self._sizes):
            if i not in matrices:
                result.append(next(rest))
                left.append(tf.zeros([size], wanted.dtype))
                continue
            total = tf.reshape(totals.pop(0), [-1, self._rank])
            matrix = tf.matmul(bases[i], total, transpose_b=True)
            result.append(tf.reshape(tf.where(sound, matrix, tf.constant(np.nan, matrix.dtype)), [-1]))
            lost = matrices[i] - tf.matmul(bases[i], factors[i], transpose_b=True)
            left.append(tf.reshape(lost, [-1]))
            largest = tf.reduce_max(tf.abs(total), axis=0)
            keep = tf.logical_and(sound, largest > 0)
            self._warm[i].assign(tf.where(keep, total / _positive(largest), self._warm[i]))
        self._own.assign(tf.where(sound, tf.concat(left, 0), self._own))
        return tf.concat(result, 0)

    def take(self) -> tf.Tensor:
        """What this worker has not sent yet, one gradient after the other; it owes nothing then. With feedback only."""
        owed = self._own.read_value()
        if self._kept is not None:
            chunk = self._padded // self._wire.size
            owed += tf.pad(self._kept, [[self._wire.rank * chunk, (self._wire.size - 1 - self._wire.rank) * chunk]])
            self._kept.assign(tf.zeros_like(self._kept))
        self._own.assign(tf.zeros_like(self._own))
        return owed[: self._length]

    def residuals(self) -> list[Any]:
        """What this worker has not sent yet: an array for each gradient; empty without feedback."""
        if self._own is None:
            return []
        if self._kept is not None:
            chunk = self._padded // self._wire.size
            at = np.arange(self._wire.rank * chunk, (self._wire.rank + 1) * chunk)
            self._own.assign(tf.tensor_scatter_nd_add(self._own, at[:, None], self._kept))
            self._kept.assign(tf.zeros_like(self._kept))
        flat = self._own.numpy()[: self._length]
        parts = np.split(flat, np.cumsum(self._sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def load_residuals(self, given: Sequence[Any]) -> None:
        """Go on from what :meth:`residuals` returned, on this or another number of workers."""
        if self._own is None:
            return
        flat = np.concatenate([np.asarray(part).reshape(-1) for part in given])
        self._own.assign(np.pad(flat, (0, self._padded - self._length)))
        if self._kept is not None:
            self._kept.assign(tf.zeros_like(self._kept))

    def state(self) -> dict[str, dict[str, Any]]:
        """What is remembered between steps, by place in the bucket: own residuals, and what all ranks begin with."""
        residuals = {f"{self._name}.{i}": part for i, part in enumerate(self.residuals())}
        return {"residuals": residuals, "warm": {f"{self._name}.{i}": v.numpy() for i, v in self._warm.items()}}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from :meth:`state`; what was not there, or has another shape, starts anew."""
        residuals, warm = state.get("residuals", {}), state.get("warm", {})
        parts = [residuals.get(f"{self._name}.{i}") for i in range(len(self._shapes))]
        self.load_residuals(
            [
                np.zeros(shape) if part is None or np.shape(part) != shape else part
                for part, shape in zip(parts, self._shapes, strict=True)
            ]
        )
        for i, v in self._warm.items():
            kept = warm.get(f"{self._name}.{i}")
            if kept is not None and np.shape(kept) == tuple(v.shape):
                v.assign(kept)


def _positive(largest: tf.Tensor) -> tf.Tensor:
    return tf.where(largest > 0, largest, tf.ones_like(largest))
