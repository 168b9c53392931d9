"""Collectives of the Keras adapter among threads, each of which is a worker; for eager steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from hvdlm.adapters.fake import ThreadCollectives

__all__ = ["ThreadWire"]


class ThreadWire:
    """What buckets and planners use of :class:`hvdlm.adapters.keras_wire.KerasWire`."""

    sums_halves = False

    def __init__(self, collectives: ThreadCollectives) -> None:
        self._collectives, self._job, self.rank = collectives, collectives.job, collectives.rank
        self.size = collectives.job.size
        self.names: list[str] = []

    def allreduce(self, array: Any, op: Any = "sum") -> Any:
        return self._collectives.allreduce(array, op)

    def sum(self, tensor: Any, name: str) -> Any:
        self.names.append(name)
        return tf.constant(np.sum(self._job.exchange(self.rank, tensor.numpy()), axis=0))

    def exchange(self, tensor: Any, name: str) -> Any:
        return tf.constant(np.stack([rows[self.rank] for rows in self._job.exchange(self.rank, tensor.numpy())]))

    def gather(self, tensor: Any, name: str) -> Any:
        return tf.constant(np.concatenate(self._job.exchange(self.rank, tensor.numpy())))
