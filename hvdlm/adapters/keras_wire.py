"""Horovod's collectives, as hvdlm uses them under Keras: on tensors inside graphs, on NumPy arrays for agreements."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from hvdlm.contracts import Op

__all__ = ["KerasWire"]

_EXECUTE = "tensorflow/python/eager/execute.py"
"""Where the main thread is while TensorFlow runs a compiled step."""


T = TypeVar("T")


class KerasWire:
    """Collectives among the workers of a job, through ``horovod.tensorflow``.

    Args:
        hvd: The initialised ``horovod.tensorflow`` module.
    """

    on_wait: Callable[[str, float, float], None] | None = None

    def __init__(self, hvd: Any) -> None:
        self._hvd = hvd
        self.rank, self.size = int(hvd.rank()), int(hvd.size())
        self.sums_halves = bool(hvd.mpi_enabled())
        """Whether the allreduce adds half floats as fast as it moves them: MPI's does, Gloo's adds them one by one."""
        self.waited = 0.0
        """Seconds in collectives outside of compiled steps so far."""
        self._step_waits: tf.Variable | None = None
        self._at: tuple[str, float] | None = None
        self._in_step: float | None = None

    def blocked(self) -> tuple[tuple[str, float] | None, float]:
        """See :class:`hvdlm.contracts.Collectives`. What steps wait counts after :meth:`time_steps`."""
        in_steps = 0.0 if self._step_waits is None else float(self._step_waits.numpy())
        return self._waiting(), self.waited + in_steps

    def time_steps(self) -> None:
        """Count from now on what steps wait in sums, compiled or not."""
        if self._step_waits is None:
            with tf.init_scope():
                self._step_waits = tf.Variable(0.0, dtype=tf.float64, trainable=False, name="hvdlm_step_waits")

    def timed(self, tensors: Any, work: Callable[[], T]) -> T:
        """What ``work`` makes of tensors, counted from when all of them are there to when all it makes is."""
        if self._step_waits is None:
            return work()
        with tf.control_dependencies(_leaves(tensors)):
            begin = tf.timestamp()
        result = work()
        with tf.control_dependencies(_leaves(result)):
            self._step_waits.assign_add(tf.timestamp() - begin)
        return result

    def end_timeline(self) -> None:
        """See :class:`hvdlm.contracts.Collectives`."""
        self._hvd.stop_timeline()

    def _waiting(self) -> tuple[str, float] | None:
        """The collective this worker waits in, and since when.

        Inside a compiled step Python does not know which one it is.
        """
        at = self._at
        if at is not None:
            return at
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is None or not frame.f_code.co_filename.endswith(_EXECUTE):
            self._in_step = None
            return None
        self._in_step = self._in_step or time.monotonic()
        return "a compiled step", self._in_step

    @contextlib.contextmanager
    def _waits(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        self._at = (name, start)
        try:
            yield
        finally:
            end = time.monotonic()
            self.waited += end - start
            self._at = None
            if self.on_wait is not None:
                self.on_wait(name, start, end)

    def sum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of ``tensor`` over ranks. In a graph the name ties the ranks' operations together."""
        # Without the name scope, which holds counters of layers and calls that may differ between ranks.
        return self._hvd.allreduce(tensor, name=_plain(name), op=self._hvd.Sum, ignore_name_scope=True)

    def gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensors of all ranks one after the other along the first axis, whose length may differ."""
        return self._hvd.allgather(tensor, name=_plain(name), ignore_name_scope=True)

    def exchange(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Row k of ``tensor`` goes to rank k; the rows that ranks send here, in their order."""
        received = self._hvd.alltoall(tensor, name=_plain(name), ignore_name_scope=True)
        return tf.ensure_shape(received, tensor.shape)

    def allreduce(self, array: npt.NDArray[Any], op: Op = "sum") -> npt.NDArray[Any]:
        """See :class:`hvdlm.contracts.Collectives`."""
        kind = {"sum": self._hvd.Sum, "max": self._hvd.Max, "min": self._hvd.Min}[op]
        name = f"hvdlm_{op}_{array.dtype}"
        with self._waits(name):
            result: npt.NDArray[Any] = self._hvd.allreduce(tf.constant(np.array(array)), name=name, op=kind).numpy()
        return result.reshape(np.shape(array))

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """See :class:`hvdlm.contracts.Collectives`."""
        with self._waits("hvdlm_broadcast"):
            length = self._hvd.broadcast(tf.constant([len(payload)], tf.int64), root, name="hvdlm_broadcast_length")
            size = int(length.numpy()[0])
            if not size:
                return b""
            own = np.zeros(size, np.uint8)
            if self._hvd.rank() == root:
                own = np.frombuffer(payload, np.uint8)
            sent: bytes = self._hvd.broadcast(tf.constant(own), root, name="hvdlm_broadcast_bytes").numpy().tobytes()
        return sent

    def allgather(self, payload: bytes) -> list[bytes]:
        """See :class:`hvdlm.contracts.Collectives`."""
        with self._waits("hvdlm_allgather"):
            lengths = self._hvd.allgather(tf.constant([len(payload)], tf.int64), name="hvdlm_allgather_lengths").numpy()
            if not lengths.any():
                return [b""] * len(lengths)
            # Horovod's allgather of an empty tensor is fragile: every rank sends at least one byte.
            own = tf.constant(np.frombuffer(payload + b"\0", np.uint8))
            everything = self._hvd.allgather(own, name="hvdlm_allgather_bytes").numpy().tobytes()
        result, at = [], 0
        for length in lengths.tolist():
            result.append(everything[at : at + length])
            at += length + 1
        return result


def _leaves(tensors: Any) -> list[tf.Tensor]:
    return [leaf for leaf in tf.nest.flatten(tensors, expand_composites=True) if tf.is_tensor(leaf)]


def _plain(name: str) -> str:
    """A name that TensorFlow takes for an operation."""
    return "".join(c if c.isalnum() else "_" for c in name)
